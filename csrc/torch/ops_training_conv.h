// The gradients of a convolution, as ops_training.h has the other ops of training.
#pragma once

#include "ops_training.h"

namespace fused_resnet::glue {

// The sizes of every `stride`-th row and column of an image.
inline Ints every(const Ints& sizes, int64_t stride) {
  return {sizes[0], sizes[1], (sizes[2] + stride - 1) / stride, (sizes[3] + stride - 1) / stride};
}

// The tensors of a ConvDgradArgs, checked and channels_last.
struct ConvDgradTensors {
  Tensor grad, weight;
  MaybeTensor added;
  bool channels_last = false;

  ConvDgradArgs describe(const char* op, const Ints& input_size, const Ints& stride,
                         const Ints& padding, const Ints& dilation, int64_t groups,
                         int64_t added_stride = 1) {
    check_dim(op, "grad", grad, 4);
    check_pair(op, "input_size", input_size, 0);
    ConvDgradArgs args{};
    args.dtype = dtype_of(op, "grad", grad);
    ConvShape& s = args.shape;
    s = conv_shape(op, weight, groups);
    check_like_grad(op, "weight", weight, grad);
    const Ints sizes = {grad.size(0), s.in_channels, input_size[0], input_size[1]};
    set_geometry(op, s, sizes, stride, padding, dilation);
    check_sizes(op, "grad", grad, {s.batch, s.out_channels, s.out_height, s.out_width});
    if (added) {
      check_like_grad(op, "added", *added, grad);
      check_sizes(op, "added", *added, every(sizes, added_stride));
    }
    channels_last = suggests_channels_last(grad) || suggests_channels_last(weight);
    grad = in_format(grad, true);
    added = in_format(added, true);
    args.grad = grad.const_data_ptr();
    args.weight = weight.const_data_ptr();
    for (int d = 0; d < 4; ++d) args.weight_stride[d] = weight.stride(d);
    args.added = pointer(added);
    return args;
  }

  // What the kernel writes to, and what the caller gets of it.
  Tensor output(ConvDgradArgs& args) const {
    const ConvShape& s = args.shape;
    Tensor dx = new_output(grad, {s.batch, s.in_channels, s.height, s.width}, true);
    args.dx = dx.mutable_data_ptr();
    return dx;
  }
  Tensor returned(const Tensor& dx) const { return channels_last ? dx : in_format(dx, false); }
};

template <class Device>
Tensor conv_dgrad(Tensor grad, Tensor weight, MaybeTensor added, Ints input_size, Ints stride,
                  Ints padding, Ints dilation, int64_t groups, bool tf32) {
  constexpr const char* kOp = "conv_dgrad";
  ConvDgradTensors in{grad, weight, added};
  ConvDgradArgs args = in.describe(kOp, input_size, stride, padding, dilation, groups);
  args.tf32 = tf32;
  Tensor dx = in.output(args);
  check_status(kOp, Device(dx).launch(args));
  return in.returned(dx);
}

template <class Device>
void conv_dgrad_(Tensor grad, Tensor weight, Tensor added, Ints input_size, Ints stride,
                 Ints padding, Ints dilation, int64_t groups, bool tf32) {
  constexpr const char* kOp = "conv_dgrad_";
  ConvDgradTensors in{grad, weight, added};
  ConvDgradArgs args = in.describe(kOp, input_size, stride, padding, dilation, groups);
  args.tf32 = tf32;
  // What is not channels_last is worked on in a copy and written back.
  args.dx = in.added->mutable_data_ptr();
  check_status(kOp, Device(added).launch(args));
  write_back(kOp, "added", added, *in.added);
}

// The tensors of a ConvWgradArgs, checked and channels_last.
struct ConvWgradTensors {
  Tensor grad, x;
  MaybeTensor scale, shift;

  ConvWgradArgs describe(const char* op, const std::string& act, const Ints& kernel_size,
                         const Ints& stride, const Ints& padding, const Ints& dilation,
                         int64_t groups) {
    check_dim(op, "grad", grad, 4);
    check_dim(op, "x", x, 4);
    ConvWgradArgs args{};
    args.dtype = dtype_of(op, "grad", grad);
    args.act = act_of(op, act);
    check_like_grad(op, "x", x, grad);
    check_pair(op, "kernel_size", kernel_size, 1);
    FR_CHECK(groups >= 1 && x.size(1) % groups == 0 && grad.size(1) % groups == 0, op,
             ": groups must be positive and divide the channels ", x.size(1), " and ", grad.size(1),
             ", got ", groups);
    FR_CHECK(scale.has_value() == shift.has_value(), op,
             ": scale and shift must be given together, got one");
    if (scale) {
      scale = channel_vector(op, "scale", *scale, x);
      shift = channel_vector(op, "shift", *shift, x);
    }
    ConvShape& s = args.shape;
    s.in_channels = x.size(1);
    s.out_channels = grad.size(1);
    s.kernel[0] = kernel_size[0];
    s.kernel[1] = kernel_size[1];
    s.groups = groups;
    set_geometry(op, s, sizes_of(x), stride, padding, dilation);
    check_sizes(op, "grad", grad, {s.batch, s.out_channels, s.out_height, s.out_width});
    grad = in_format(grad, true);
    x = in_format(x, true);
    args.grad = grad.const_data_ptr();
    args.x = x.const_data_ptr();
    args.scale = pointer(scale);
    args.shift = pointer(shift);
    return args;
  }

  Tensor output(ConvWgradArgs& args) const {
    const ConvShape& s = args.shape;
    Tensor dw =
        torch::stable::empty({s.out_channels, s.in_channels / s.groups, s.kernel[0], s.kernel[1]},
                             accumulation_type(grad.scalar_type()), std::nullopt, grad.device(),
                             std::nullopt, format_of(true));
    args.dw = dw.mutable_data_ptr();
    return dw;
  }
};

template <class Device>
Tensor conv_wgrad(Tensor grad, Tensor x, MaybeTensor scale, MaybeTensor shift, std::string act,
                  Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                  bool tf32) {
  constexpr const char* kOp = "conv_wgrad";
  ConvWgradTensors in{grad, x, scale, shift};
  ConvWgradArgs args = in.describe(kOp, act, kernel_size, stride, padding, dilation, groups);
  args.tf32 = tf32;
  Tensor dw = in.output(args);
  check_status(kOp, Device(dw).launch(args));
  return dw;
}

}  // namespace fused_resnet::glue
