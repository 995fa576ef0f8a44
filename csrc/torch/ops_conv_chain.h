// The ops of chains: convolutions that normalise what they read, and reduce what they write.
#pragma once

#include <tuple>

#include "../kernels/api_chain.h"
#include "ops_training.h"

namespace fused_resnet::glue {

// `names`, as a message has them, are of tensors that are all given, or none.
inline bool given_together(const char* op, const char* names,
                           std::initializer_list<const MaybeTensor*> tensors) {
  size_t given = 0;
  for (const MaybeTensor* t : tensors) given += t->has_value();
  FR_CHECK(given == 0 || given == tensors.size(), op, ": ", names, " must be given together, got ",
           given, " of ", tensors.size());
  return given > 0;
}

// A number for each channel of x, or none.
inline const void* channel_vector(const char* op, const char* argument, MaybeTensor& t,
                                  const Tensor& x) {
  if (!t) return nullptr;
  t = channel_vector(op, argument, *t, x);
  return t->const_data_ptr();
}

// What a convolution reads of a raw x.
inline Prologue prologue(const char* op, const Tensor& x, MaybeTensor& scale, MaybeTensor& shift,
                         const std::string& act) {
  check_dim(op, "x", x, 4);
  dtype_of(op, "x", x);
  Prologue in{};
  in.act = act_of(op, act);
  given_together(op, "scale, shift", {&scale, &shift});
  in.scale = channel_vector(op, "scale", scale, x);
  in.shift = channel_vector(op, "shift", shift, x);
  return in;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bn_act_conv_stats(Tensor x, MaybeTensor scale, MaybeTensor shift,
                                                     std::string act, Tensor weight, Ints stride,
                                                     Ints padding, Ints dilation, int64_t groups,
                                                     bool tf32) {
  constexpr const char* kOp = "bn_act_conv_stats";
  BnActConvStatsArgs args{};
  args.in = prologue(kOp, x, scale, shift, act);
  ConvBnActTensors in{x, weight, {}, {}, {}};
  args.conv = in.describe(kOp, stride, padding, dilation, groups, "none");
  args.conv.tf32 = tf32;
  Tensor y = in.output(args.conv);
  Tensor mean = new_vector(y, y.size(1), accumulation_type(y.scalar_type()));
  Tensor m2 = torch::stable::empty_like(mean);
  args.mean = mean.mutable_data_ptr();
  args.m2 = m2.mutable_data_ptr();
  check_status(kOp, Device(y).launch(args));
  return {in.returned(y), mean, m2};
}

// A 1x1 convolution of x2 to the sizes of another's output.
inline Projection projection(const char* op, const ConvShape& s, const Tensor& x, MaybeTensor& x2,
                             MaybeTensor& weight2, MaybeTensor& scale2, const Ints& stride2) {
  Projection p{};
  if (!given_together(op, "x2, weight2", {&x2, &weight2})) {
    FR_CHECK(!scale2, op, ": scale2 must be given with x2 and weight2");
    return p;
  }
  check_dim(op, "x2", *x2, 4);
  check_like(op, "x2", *x2, x);
  check_pair(op, "stride2", stride2, 1);
  p.channels = x2->size(1);
  p.height = x2->size(2);
  p.width = x2->size(3);
  for (int i = 0; i < 2; ++i) p.stride[i] = stride2[i];
  const Ints reached = {x2->size(0), (p.height + stride2[0] - 1) / stride2[0],
                        (p.width + stride2[1] - 1) / stride2[1]};
  const Ints wanted = {s.batch, s.out_height, s.out_width};
  FR_CHECK(reached == wanted, op, ": x2 must have ", text(wanted),
           " images, rows and columns by stride2, got ", text(sizes_of(*x2)));
  check_like(op, "weight2", *weight2, x);
  check_sizes(op, "weight2", *weight2, {s.out_channels, p.channels, 1, 1});
  if (scale2) {
    check_channels(op, "scale2", *scale2, s.out_channels, accumulation_type(x.scalar_type()), x);
    scale2 = in_order(*scale2);
  }
  x2 = in_format(x2, true);
  p.x = x2->const_data_ptr();
  p.weight = weight2->const_data_ptr();
  for (int i = 0; i < 2; ++i) p.weight_stride[i] = weight2->stride(i);
  p.scale = pointer(scale2);
  return p;
}

template <class Device>
Tensor bn_act_conv_bn_act(Tensor x, MaybeTensor in_scale, MaybeTensor in_shift, std::string in_act,
                          Tensor weight, MaybeTensor scale, MaybeTensor shift, MaybeTensor residual,
                          Ints stride, Ints padding, Ints dilation, int64_t groups, std::string act,
                          MaybeTensor x2, MaybeTensor weight2, MaybeTensor scale2, Ints stride2,
                          bool tf32) {
  constexpr const char* kOp = "bn_act_conv_bn_act";
  BnActConvBnActArgs args{};
  args.in = prologue(kOp, x, in_scale, in_shift, in_act);
  ConvBnActTensors in{x, weight, scale, shift, residual};
  args.conv = in.describe(kOp, stride, padding, dilation, groups, act);
  args.conv.tf32 = tf32;
  args.projection = projection(kOp, args.conv.shape, in.x, x2, weight2, scale2, stride2);
  Tensor out = in.output(args.conv);
  check_status(kOp, Device(out).launch(args));
  return in.returned(out);
}

}  // namespace fused_resnet::glue
