// The ops of 8-bit inference.
#pragma once

#include "../kernels/api_int8.h"
#include "ops.h"

namespace fused_resnet::glue {

inline int zero_of(const char* op, const char* argument, int64_t zero) {
  FR_CHECK(zero >= 0 && zero <= 255, op, ": ", argument, " must be from 0 to 255, got ", zero);
  return static_cast<int>(zero);
}

template <class Device>
Tensor quantize(Tensor x, double scale, int64_t zero) {
  constexpr const char* kOp = "quantize";
  check_type(kOp, "x", x, ScalarType::Float);
  FR_CHECK(scale > 0, kOp, ": scale must be positive, got ", scale);
  QuantizeArgs args{};
  args.inverse = static_cast<float>(1 / scale);
  args.zero = zero_of(kOp, "zero", zero);
  const bool channels_last = suggests_channels_last(x);
  x = in_format(x, channels_last);
  Tensor out = torch::stable::empty(sizes_of(x), ScalarType::Byte, std::nullopt, x.device(),
                                    std::nullopt, format_of(channels_last));
  args.x = static_cast<const float*>(x.const_data_ptr());
  args.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  args.numel = x.numel();
  check_status(kOp, Device(out).launch(args));
  return out;
}

inline ConvShape int8_shape(const char* op, const Tensor& weight, int64_t groups) {
  const ConvShape s = conv_shape(op, weight, groups);
  check_type(op, "weight", weight, ScalarType::Char);
  // Of 32 bits, 31 hold so many products of 255 and 128.
  constexpr int64_t kMost = INT32_MAX / (255 * 128);
  const int64_t terms = s.in_channels / s.groups * s.kernel[0] * s.kernel[1];
  FR_CHECK(terms <= kMost, op, ": weight must have at most ", kMost,
           " values for an output channel, got ", terms);
  return s;
}

template <class Device>
Tensor conv_int8_pack(Tensor weight, int64_t groups) {
  constexpr const char* kOp = "conv_int8_pack";
  ConvInt8PackArgs args{};
  args.shape = int8_shape(kOp, weight, groups);
  args.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  for (int d = 0; d < 4; ++d) args.weight_stride[d] = weight.stride(d);
  Tensor packed = new_packed(Device::int8_packed_size(args.shape), ScalarType::Byte, weight);
  args.packed = packed.mutable_data_ptr();
  check_status(kOp, Device(packed).launch(args));
  return packed;
}

template <class Device>
Tensor conv_int8(Tensor x, int64_t x_zero, Tensor weight, Tensor scale, Tensor shift,
                 MaybeTensor residual, double residual_scale, Ints stride, Ints padding,
                 Ints dilation, int64_t groups, std::string act, std::optional<int64_t> out_zero,
                 MaybeTensor packed) {
  constexpr const char* kOp = "conv_int8";
  check_dim(kOp, "x", x, 4);
  check_type(kOp, "x", x, ScalarType::Byte);
  ConvInt8Args args{};
  args.act = act_of(kOp, act);
  ConvShape& s = args.shape;
  s = int8_shape(kOp, weight, groups);
  check_device(kOp, "weight", weight, x);
  set_input(kOp, s, x, weight, stride, padding, dilation);
  check_channels(kOp, "scale", scale, s.out_channels, ScalarType::Float, x);
  check_channels(kOp, "shift", shift, s.out_channels, ScalarType::Float, x);
  const Ints sizes = ConvBnActTensors::out_sizes(s);
  if (residual) {
    const ScalarType type = residual->scalar_type();
    FR_CHECK(type == ScalarType::Byte || type == ScalarType::Float, kOp,
             ": residual must be uint8 or float32, got ", name(type));
    check_device(kOp, "residual", *residual, x);
    check_sizes(kOp, "residual", *residual, sizes);
    args.residual_is_float = type == ScalarType::Float;
  }
  // As conv_bn_act: the kernel works in channels_last, a contiguous caller gets its layout back.
  const bool alike = s.batch == 0 || s.out_height * s.out_width <= 1 || s.out_channels == 1;
  const bool channels_last = suggests_channels_last(x) || suggests_channels_last(weight);
  x = in_format(x, true);
  scale = in_order(scale);
  shift = in_order(shift);
  residual = in_format(residual, true);
  args.x = x.const_data_ptr();
  args.x_zero = zero_of(kOp, "x_zero", x_zero);
  if (packed) {
    check_channels(kOp, "packed", *packed, Device::int8_packed_size(s), ScalarType::Byte, x);
    packed = in_order(*packed);
    args.packed = packed->const_data_ptr();
  } else {
    args.weight = weight.const_data_ptr();
    for (int d = 0; d < 4; ++d) args.weight_stride[d] = weight.stride(d);
  }
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.shift = static_cast<const float*>(shift.const_data_ptr());
  args.residual = pointer(residual);
  args.residual_scale = static_cast<float>(residual_scale);
  args.out_is_float = !out_zero;
  args.out_zero = out_zero ? zero_of(kOp, "out_zero", *out_zero) : 0;
  Tensor out =
      torch::stable::empty(sizes, out_zero ? ScalarType::Byte : ScalarType::Float, std::nullopt,
                           x.device(), std::nullopt, format_of(channels_last || !alike));
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return in_format(out, channels_last);
}

}  // namespace fused_resnet::glue
