// Pooling in training. The kernels work in channels_last; contiguous tensors are converted.
#pragma once

#include "ops_training.h"

namespace fused_resnet::glue {

struct Pooling {
  Ints kernel_size, stride, padding, dilation;

  // x [N, C, H, W] pooled to out_height by out_width.
  PoolShape shape(const Tensor& x, int64_t out_height, int64_t out_width) const {
    PoolShape s{};
    s.batch = x.size(0);
    s.channels = x.size(1);
    s.height = x.size(2);
    s.width = x.size(3);
    s.out_height = out_height;
    s.out_width = out_width;
    for (int i = 0; i < 2; ++i) {
      s.kernel[i] = kernel_size[i];
      s.stride[i] = stride[i];
      s.padding[i] = padding[i];
      s.dilation[i] = dilation[i];
    }
    return s;
  }

  void check(const char* op) const {
    check_pooling(op, kernel_size, stride, padding, dilation);
    FR_CHECK(
        kernel_size[0] <= 255 && kernel_size[1] <= 255 && kernel_size[0] * kernel_size[1] <= 255,
        op, ": kernel_size must have at most 255 positions, got ", text(kernel_size));
  }

  int64_t length(const Tensor& x, int i, bool ceil_mode) const {
    return pooled(x.size(2 + i), kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode);
  }

  // The shape that grad, out and argmax have to fit.
  PoolShape backward_shape(const char* op, const Tensor& x, Tensor& grad, Tensor& out,
                           Tensor& argmax) const {
    check(op);
    check_dim(op, "x", x, 4);
    check_dim(op, "grad", grad, 4);
    for (int i = 0; i < 2; ++i) {
      const int64_t least = length(x, i, false), most = length(x, i, true);
      FR_CHECK(grad.size(2 + i) == least || grad.size(2 + i) == most, op, ": grad must have ",
               least, " or ", most, " positions in dimension ", 2 + i, ", got ", grad.size(2 + i));
    }
    const Ints sizes = {x.size(0), x.size(1), grad.size(2), grad.size(3)};
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
    return shape(x, sizes[2], sizes[3]);
  }
};

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
  const bool channels_last = suggests_channels_last(x);
  const int64_t out_height = pooling.length(x, 0, ceil_mode);
  const int64_t out_width = pooling.length(x, 1, ceil_mode);
  FR_CHECK(out_height > 0 && out_width > 0, kOp, ": kernel_size ", text(kernel_size),
           " is larger than the padded input ", text(sizes_of(x)));
  x = in_format(x, true);
  scale = in_order(scale);
  shift = in_order(shift);
  const Ints sizes = {x.size(0), x.size(1), out_height, out_width};
  Tensor out = new_image(x, sizes, x.scalar_type());
  Tensor argmax = new_image(x, sizes, ScalarType::Byte);
  BnActMaxpoolTrainArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  args.shape = pooling.shape(x, out_height, out_width);
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
      Pooling{kernel_size, stride, padding, dilation}.backward_shape(kOp, x, grad, out, argmax);
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
      Pooling{kernel_size, stride, padding, dilation}.backward_shape(kOp, x, grad, out, argmax);
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
