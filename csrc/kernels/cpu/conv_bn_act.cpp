#include "conv_walk.h"

FR_NAMESPACE_BEGIN

Status conv_bn_act(const ConvBnActArgs& args, const Pool& pool) {
  if (args.wgmma) return Status::unsupported;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    return convolve<T>(args, 0, sizeof(T), sizeof(T), pool);
  });
}

FR_NAMESPACE_END
