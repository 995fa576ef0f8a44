// Ops that pool what they convolve.
#pragma once

#include "../kernels/api_pool.h"
#include "ops.h"

namespace fused_resnet::glue {

template <class Device>
Tensor conv_bn_act_maxpool(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor shift,
                           Ints stride, Ints padding, Ints dilation, Ints kernel_size,
                           Ints pool_stride, Ints pool_padding, Ints pool_dilation, bool ceil_mode,
                           std::string act, bool tf32) {
  constexpr const char* kOp = "conv_bn_act_maxpool";
  ConvBnActTensors in{x, weight, scale, shift, std::nullopt};
  ConvBnActMaxpoolArgs args{};
  args.conv = in.describe(kOp, stride, padding, dilation, 1, act);
  args.conv.tf32 = tf32;
  const Pooling pooling{kernel_size, pool_stride, pool_padding, pool_dilation};
  pooling.check(kOp);
  args.pool = pooling.forward_shape(kOp, in.out_sizes(args.conv.shape), ceil_mode);
  Tensor out = new_output(in.x, out_sizes(args.pool), true);
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return in_format(out, in.channels_last);
}

template <class Device>
Tensor conv_bn_act_avgpool(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor shift,
                           MaybeTensor residual, Ints stride, Ints padding, Ints dilation,
                           int64_t groups, std::string act, bool tf32) {
  constexpr const char* kOp = "conv_bn_act_avgpool";
  ConvBnActTensors in{x, weight, scale, shift, residual};
  ConvBnActAvgpoolArgs args{};
  args.conv = in.describe(kOp, stride, padding, dilation, groups, act);
  args.conv.tf32 = tf32;
  const ConvShape& s = args.conv.shape;
  Tensor out = new_output(in.x, {s.batch, s.out_channels, 1, 1}, in.channels_last);
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return out;
}

}  // namespace fused_resnet::glue
