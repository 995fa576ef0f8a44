#include "conv_panels.h"

FR_NAMESPACE_BEGIN

Status conv_pack(const ConvPackArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    pack_panels<T>(panels_of<T>(args.shape), args.shape, static_cast<const T*>(args.weight),
                   args.weight_stride, static_cast<Element<T>*>(args.packed), pool);
    return Status::ok;
  });
}

int64_t conv_packed_size(DType dtype, const ConvShape& shape) {
  int64_t size = 0;
  dispatch(dtype, [&](auto type) {
    const Panels panels = panels_of<decltype(type)>(shape);
    size = panels.count * panels.elements();
    return Status::ok;
  });
  return size;
}

DType conv_packed_dtype(DType dtype) {
  DType packed = dtype;
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    if (sizeof(Element<T>) != sizeof(T)) packed = DType::f32;
    return Status::ok;
  });
  return packed;
}

FR_NAMESPACE_END
