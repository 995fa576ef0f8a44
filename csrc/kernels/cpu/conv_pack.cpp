#include "conv_panels.h"

FR_NAMESPACE_BEGIN

Status conv_pack(const ConvPackArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const Panels panels = panels_of<Acc<T>>(args.shape);
    parallel(pool, panels.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pack_panel(panels, args.shape, static_cast<const T*>(args.weight), args.weight_stride, i,
                   static_cast<Acc<T>*>(args.packed) + i * panels.elements());
    });
    return Status::ok;
  });
}

int64_t conv_packed_size(DType dtype, const ConvShape& shape) {
  const Panels p = dtype == DType::f64 ? panels_of<double>(shape) : panels_of<float>(shape);
  return p.count * p.elements();
}

FR_NAMESPACE_END
