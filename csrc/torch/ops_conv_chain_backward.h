// The gradients of ops_conv_chain.h's.
#pragma once

#include "ops_conv_chain.h"
#include "ops_training_conv.h"

namespace fused_resnet::glue {

// What a convolution's gradient is computed of: a * grad + b * y + c.
inline Prologue gradient(const char* op, const Tensor& grad, MaybeTensor& y, MaybeTensor& a,
                         MaybeTensor& b, MaybeTensor& c) {
  check_dim(op, "grad", grad, 4);
  dtype_of(op, "grad", grad);
  given_together(op, "y, b", {&y, &b});
  Prologue in{};
  in.scale = channel_vector(op, "a", a, grad);
  in.slope = channel_vector(op, "b", b, grad);
  in.shift = channel_vector(op, "c", c, grad);
  if (y) {
    check_like_grad(op, "y", *y, grad);
    check_sizes(op, "y", *y, sizes_of(grad));
    y = in_format(y, true);
    in.other = y->const_data_ptr();
  }
  return in;
}

// A ReluMask and what is made with it: sums of no channels where there is no mask.
struct Masked {
  MaybeTensor x, scale, shift, mean, invstd;
  Tensor sum_g = {}, sum_gx = {};

  ReluMask describe(const char* op, const Tensor& dx) {
    ReluMask mask{};
    if (x) {
      check_like_grad(op, "x", *x, dx);
      check_sizes(op, "x", *x, sizes_of(dx));
      x = in_format(x, true);
      mask.x = x->const_data_ptr();
      mask.scale = channel_vector(op, "scale", scale, dx);
      mask.shift = channel_vector(op, "shift", shift, dx);
      mask.mean = channel_vector(op, "mean", mean, dx);
      mask.invstd = channel_vector(op, "invstd", invstd, dx);
    }
    sum_g = new_vector(dx, x ? dx.size(1) : 0, accumulation_type(dx.scalar_type()));
    sum_gx = torch::stable::empty_like(sum_g);
    mask.sum_g = sum_g.mutable_data_ptr();
    mask.sum_gx = sum_gx.mutable_data_ptr();
    return mask;
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bn_backward_conv_dgrad(
    Tensor grad, MaybeTensor y, Tensor a, MaybeTensor b, MaybeTensor c, Tensor weight,
    MaybeTensor added, MaybeTensor x, MaybeTensor scale, MaybeTensor shift, MaybeTensor mean,
    MaybeTensor invstd, Ints input_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
    int64_t added_stride, bool tf32) {
  constexpr const char* kOp = "bn_backward_conv_dgrad";
  given_together(kOp, "x, scale, shift, mean, invstd", {&x, &scale, &shift, &mean, &invstd});
  MaybeTensor factor = a;
  BnBackwardConvDgradArgs args{};
  args.in = gradient(kOp, grad, y, factor, b, c);
  ConvDgradTensors in{grad, weight, added};
  FR_CHECK(added_stride >= 1, kOp, ": added_stride must be at least 1, got ", added_stride);
  args.conv = in.describe(kOp, input_size, stride, padding, dilation, groups, added_stride);
  args.added_stride = added_stride;
  args.conv.tf32 = tf32;
  Tensor dx = in.output(args.conv);
  Masked masked{x, scale, shift, mean, invstd};
  args.mask = masked.describe(kOp, dx);
  check_status(kOp, Device(dx).launch(args));
  return {in.returned(dx), masked.sum_g, masked.sum_gx};
}

template <class Device>
Tensor bn_backward_conv_wgrad(Tensor grad, MaybeTensor y, MaybeTensor a, MaybeTensor b,
                              MaybeTensor c, Tensor x, MaybeTensor scale, MaybeTensor shift,
                              MaybeTensor center, std::string act, Ints kernel_size, Ints stride,
                              Ints padding, Ints dilation, int64_t groups, bool tf32) {
  constexpr const char* kOp = "bn_backward_conv_wgrad";
  BnBackwardConvWgradArgs args{};
  args.in = gradient(kOp, grad, y, a, b, c);
  check_dim(kOp, "x", x, 4);
  args.center = channel_vector(kOp, "center", center, x);
  ConvWgradTensors in{grad, x, scale, shift};
  args.conv = in.describe(kOp, act, kernel_size, stride, padding, dilation, groups);
  args.conv.tf32 = tf32;
  Tensor dw = in.output(args.conv);
  check_status(kOp, Device(dw).launch(args));
  return dw;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> relu_backward_conv_wgrad(Tensor grad, Tensor out, Tensor x,
                                                            MaybeTensor scale, MaybeTensor shift,
                                                            MaybeTensor center, std::string act,
                                                            bool tf32) {
  constexpr const char* kOp = "relu_backward_conv_wgrad";
  check_dim(kOp, "grad", grad, 4);
  dtype_of(kOp, "grad", grad);
  check_like_grad(kOp, "out", out, grad);
  check_sizes(kOp, "out", out, sizes_of(grad));
  check_dim(kOp, "x", x, 4);
  ReluBackwardConvWgradArgs args{};
  args.center = channel_vector(kOp, "center", center, x);
  const bool channels_last = suggests_channels_last(grad);
  ConvWgradTensors in{grad, x, scale, shift};
  args.conv = in.describe(kOp, act, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1);
  args.conv.tf32 = tf32;
  out = in_format(out, true);
  args.out = out.const_data_ptr();
  Tensor g = new_output(grad, sizes_of(grad), true);
  Tensor sum_g = new_vector(grad, grad.size(1), accumulation_type(grad.scalar_type()));
  Tensor dw = in.output(args.conv);
  args.g = g.mutable_data_ptr();
  args.sum_g = sum_g.mutable_data_ptr();
  check_status(kOp, Device(g).launch(args));
  return {channels_last ? g : in_format(g, false), sum_g, dw};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bn_act_gram_backward(
    Tensor grad, Tensor weight, Tensor x, MaybeTensor scale, MaybeTensor shift, Tensor center,
    std::string act, Tensor matrix, Tensor offset, MaybeTensor added, MaybeTensor mean,
    MaybeTensor invstd, int64_t stride, bool tf32) {
  constexpr const char* kOp = "bn_act_gram_backward";
  FR_CHECK(stride >= 1, kOp, ": stride must be at least 1, got ", stride);
  FR_CHECK(stride == 1 || !mean, kOp, ": stride must be 1 with mean and invstd, got ", stride);
  check_dim(kOp, "grad", grad, 4);
  BnActGramBackwardArgs args{};
  args.dtype = dtype_of(kOp, "grad", grad);
  args.tf32 = tf32;
  args.in = prologue(kOp, x, scale, shift, act);
  check_like_grad(kOp, "x", x, grad);
  check_like_grad(kOp, "weight", weight, grad);
  check_like_grad(kOp, "matrix", matrix, grad);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.stride = stride;
  args.rows = grad.size(1);
  const Ints sizes = every(sizes_of(x), stride);
  check_sizes(kOp, "grad", grad, {sizes[0], args.rows, sizes[2], sizes[3]});
  check_sizes(kOp, "weight", weight, {args.rows, args.channels, 1, 1});
  check_sizes(kOp, "matrix", matrix, {args.channels, args.channels});
  center = channel_vector(kOp, "center", center, x);
  offset = channel_vector(kOp, "offset", offset, x);
  const bool masks = given_together(kOp, "mean, invstd", {&mean, &invstd});
  if (masks) given_together(kOp, "mean, scale", {&mean, &scale});
  if (added) {
    check_like_grad(kOp, "added", *added, grad);
    check_sizes(kOp, "added", *added, sizes);
  }
  const bool channels_last = suggests_channels_last(x);
  grad = in_format(grad, true);
  x = in_format(x, true);
  added = in_format(added, true);
  Tensor dx = new_output(x, sizes, true);
  Masked masked{masks ? MaybeTensor(x) : std::nullopt, scale, shift, mean, invstd};
  args.mask = masked.describe(kOp, dx);
  args.grad = grad.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.x = x.const_data_ptr();
  args.in.center = center.const_data_ptr();
  args.matrix = matrix.const_data_ptr();
  for (int d = 0; d < 2; ++d) {
    args.weight_stride[d] = weight.stride(d);
    args.matrix_stride[d] = matrix.stride(d);
  }
  args.offset = offset.const_data_ptr();
  args.added = pointer(added);
  args.dx = dx.mutable_data_ptr();
  check_status(kOp, Device(dx).launch(args));
  return {channels_last ? dx : in_format(dx, false), masked.sum_g, masked.sum_gx};
}

}  // namespace fused_resnet::glue
