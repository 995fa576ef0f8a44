#include "maxpool.cuh"

namespace fused_resnet::cuda {

Status bn_act_maxpool(const BnActMaxpoolArgs& args, const Place& place) {
  return dispatch(args.dtype, [&](auto type) {
    return launch_maxpool<decltype(type), false>(args, args.channels_last, nullptr, place);
  });
}

}  // namespace fused_resnet::cuda
