// Winograd's form of a convolution.
#pragma once

#include "../kernels/api_winograd.h"
#include "ops.h"

namespace fused_resnet::glue {

// Checks what Winograd's form asks for of a weight, and of a tile.
inline ConvShape winograd_shape(const char* op, const Tensor& weight, int64_t tile) {
  const ConvShape s = conv_shape(op, weight, 1);
  check_type(op, "weight", weight, ScalarType::Float);
  FR_CHECK(s.kernel[0] == 3 && s.kernel[1] == 3, op, ": weight must be of a kernel 3x3, got ",
           text(sizes_of(weight)));
  FR_CHECK(tile == 2 || tile == 4, op, ": tile must be 2 or 4, got ", tile);
  return s;
}

// Elements of a packed weight: of a 1x1 convolution's for each product of a tile.
template <class Device>
int64_t winograd_packed_size(ConvShape s, int64_t tile) {
  s.kernel[0] = s.kernel[1] = 1;
  return (tile + 2) * (tile + 2) * Device::packed_size(DType::f32, s);
}

template <class Device>
Tensor conv_winograd_pack(Tensor weight, int64_t tile) {
  constexpr const char* kOp = "conv_winograd_pack";
  ConvWinogradPackArgs args{};
  args.tile = tile;
  args.pack.shape = winograd_shape(kOp, weight, tile);
  args.pack.weight = weight.const_data_ptr();
  for (int d = 0; d < 4; ++d) args.pack.weight_stride[d] = weight.stride(d);
  Tensor packed =
      new_packed(winograd_packed_size<Device>(args.pack.shape, tile), ScalarType::Float, weight);
  args.pack.packed = packed.mutable_data_ptr();
  check_status(kOp, Device(packed).launch(args));
  return packed;
}

template <class Device>
Tensor conv_bn_act_winograd(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor shift,
                            MaybeTensor residual, Ints padding, int64_t tile, std::string act,
                            MaybeTensor packed) {
  constexpr const char* kOp = "conv_bn_act_winograd";
  winograd_shape(kOp, weight, tile);
  ConvBnActTensors in{x, weight, scale, shift, residual};
  ConvBnActWinogradArgs args{in.describe(kOp, {1, 1}, padding, {1, 1}, 1, act), tile};
  if (packed) {
    check_channels(kOp, "packed", *packed, winograd_packed_size<Device>(args.conv.shape, tile),
                   ScalarType::Float, x);
    packed = in_order(*packed);
    args.conv.weight = nullptr;
    args.conv.packed = packed->const_data_ptr();
  }
  Tensor out = in.output(args.conv);
  check_status(kOp, Device(out).launch(args));
  return in.returned(out);
}

}  // namespace fused_resnet::glue
