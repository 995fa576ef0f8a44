// Pooling in training. The kernels work in channels_last; contiguous tensors are converted.
#pragma once

#include "ops_training.h"

namespace fused_resnet::glue {

inline void check_positions(const char* op, const Ints& kernel_size) {
  FR_CHECK(kernel_size[0] <= 255 && kernel_size[1] <= 255 && kernel_size[0] * kernel_size[1] <= 255,
           op, ": kernel_size must have at most 255 positions, got ", text(kernel_size));
}

// The shape that grad, out and argmax have to fit.
inline PoolShape backward_shape(const char* op, const Pooling& pooling, const Tensor& x,
                                Tensor& grad, Tensor& out, Tensor& argmax) {
  pooling.check(op);
  check_positions(op, pooling.kernel_size);
  check_dim(op, "x", x, 4);
  check_dim(op, "grad", grad, 4);
  for (int i = 0; i < 2; ++i) {
    const int64_t least = pooling.length(sizes_of(x), i, false);
    const int64_t most = pooling.length(sizes_of(x), i, true);
    FR_CHECK(grad.size(2 + i) == least || grad.size(2 + i) == most, op, ": grad must have ", least,
             " or ", most, " positions in dimension ", 2 + i, ", got ", grad.size(2 + i));
  }
  const PoolShape shape = pooling.shape(sizes_of(x), grad.size(2), grad.size(3));
  const Ints sizes = out_sizes(shape);
  check_like(op, "grad", grad, x);
  check_sizes(op, "grad", grad, sizes);
  check_like(op, "out", out, x);
  check_sizes(op, "out", out, sizes);
  FR_CHECK(argmax.scalar_type() == ScalarType::Byte, op, ": argmax must be uint8");
  FR_CHECK(argmax.is_cpu() == x.is_cpu() && argmax.get_device() == x.get_device(), op,
           ": argmax must be on the device of x");
  check_sizes(op, "argmax", argmax, sizes);
  grad = in_format(grad, true);
  out = in_format(out, true);
  argmax = in_format(argmax, true);
  return shape;
}

inline Tensor new_image(const Tensor& like, const Ints& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt,
                              format_of(true));
}

// A channels_last result in the caller's format, strides of lengths of one included.
inline Tensor as_format(const Tensor& t, bool channels_last) {
  return channels_last ? t : torch::stable::contiguous(t, format_of(false));
}

template <class Device>
std::tuple<Tensor, Tensor> bn_act_maxpool_train(Tensor x, Tensor scale, Tensor shift,
                                                Ints kernel_size, Ints stride, Ints padding,
                                                Ints dilation, bool ceil_mode, std::string act) {
  constexpr const char* kOp = "bn_act_maxpool_train";
  check_bn_act(kOp, x, scale, shift, std::nullopt);
  const Pooling pooling{kernel_size, stride, padding, dilation};
  pooling.check(kOp);
  check_positions(kOp, kernel_size);
  const bool channels_last = suggests_channels_last(x);
  const PoolShape shape = pooling.forward_shape(kOp, sizes_of(x), ceil_mode);
  x = in_format(x, true);
  scale = in_order(scale);
  shift = in_order(shift);
  Tensor out = new_image(x, out_sizes(shape), x.scalar_type());
  Tensor argmax = new_image(x, out_sizes(shape), ScalarType::Byte);
  BnActMaxpoolTrainArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  args.shape = shape;
  args.x = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.argmax = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  check_status(kOp, Device(out).launch(args));
  return {as_format(out, channels_last), as_format(argmax, channels_last)};
}

template <class Device>
std::tuple<Tensor, Tensor> bn_act_maxpool_backward_reduce(Tensor grad, Tensor out, Tensor argmax,
                                                          Tensor x, Tensor mean, Tensor invstd,
                                                          Ints kernel_size, Ints stride,
                                                          Ints padding, Ints dilation,
                                                          std::string act) {
  constexpr const char* kOp = "bn_act_maxpool_backward_reduce";
  BnActMaxpoolBackwardReduceArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  args.shape =
      backward_shape(kOp, Pooling{kernel_size, stride, padding, dilation}, x, grad, out, argmax);
  mean = channel_vector(kOp, "mean", mean, x);
  invstd = channel_vector(kOp, "invstd", invstd, x);
  x = in_format(x, true);
  Tensor sum_g = torch::stable::empty_like(mean), sum_gx = torch::stable::empty_like(mean);
  args.grad = grad.const_data_ptr();
  args.out = out.const_data_ptr();
  args.argmax = static_cast<const uint8_t*>(argmax.const_data_ptr());
  args.x = x.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.invstd = invstd.const_data_ptr();
  args.sum_g = sum_g.mutable_data_ptr();
  args.sum_gx = sum_gx.mutable_data_ptr();
  check_status(kOp, Device(x).launch(args));
  return {sum_g, sum_gx};
}

template <class Device>
Tensor bn_act_maxpool_backward(Tensor grad, Tensor out, Tensor argmax, Tensor x, Tensor scale,
                               MaybeTensor mean, MaybeTensor invstd, MaybeTensor sum_g,
                               MaybeTensor sum_gx, double count, Ints kernel_size, Ints stride,
                               Ints padding, Ints dilation, std::string act) {
  constexpr const char* kOp = "bn_act_maxpool_backward";
  BnActMaxpoolBackwardArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  args.shape =
      backward_shape(kOp, Pooling{kernel_size, stride, padding, dilation}, x, grad, out, argmax);
  scale = channel_vector(kOp, "scale", scale, x);
  BatchSumsTensors batch{mean, invstd, sum_g, sum_gx, count};
  args.batch = batch.describe(kOp, x, x);
  const bool channels_last = suggests_channels_last(x);
  x = in_format(x, true);
  Tensor dx = new_image(x, sizes_of(x), x.scalar_type());
  args.grad = grad.const_data_ptr();
  args.out = out.const_data_ptr();
  args.argmax = static_cast<const uint8_t*>(argmax.const_data_ptr());
  args.x = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  check_status(kOp, Device(dx).launch(args));
  return as_format(dx, channels_last);
}

}  // namespace fused_resnet::glue
