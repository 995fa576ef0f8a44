// The ops of chains: convolutions that normalise what they read, and reduce what they write.
#pragma once

#include "api.h"

namespace fused_resnet {

// Of an image x a convolution reads z = act(x * scale[c] + other * slope[c] + shift[c]), rounded to
// dtype, less center[c], rounded too; `other` is laid out as x. What is null is left out.
struct Prologue {
  Act act;
  const void* scale;
  const void* shift;
  const void* other;
  const void* slope;
  const void* center;
};

// A 1x1 convolution without padding of x, of so many channels, to the sizes of another's output,
// whose result times scale[c] is added to that output before its activation.
struct Projection {
  int64_t channels, height, width;  // channels is 0 where there is none
  int64_t stride[2];
  const void* x;
  const void* weight;
  int64_t weight_stride[2];  // of [out_channels, channels]
  const void* scale;         // may be null
};

// conv_bn_act of z.
struct BnActConvBnActArgs {
  ConvBnActArgs conv;
  Prologue in;
  Projection projection;
};

// The same, and bn_stats of the result as it was stored.
struct BnActConvStatsArgs {
  ConvBnActArgs conv;
  Prologue in;
  void* mean;
  void* m2;
};

// What the ReLU behind the BatchNorm of x lets through of a gradient that is laid out as x: as
// MaskedGrad has it, with bn_act_backward_reduce's sums of what was stored. Where there is no such
// ReLU, all passes, invstd is null, and nothing else is read.
struct ReluMask {
  const void* x;
  const void* scale;
  const void* shift;
  const void* mean;
  const void* invstd;
  void* sum_g;
  void* sum_gx;
};

// conv_dgrad of what is read of its gradient, masked; conv.added is not conv.dx, and has every
// added_stride-th row and column of it.
struct BnBackwardConvDgradArgs {
  ConvDgradArgs conv;
  Prologue in;
  int64_t added_stride;
  ReluMask mask;
};

// conv_wgrad of what is read of its gradient, and of z - center, rounded to dtype; center may be
// null. The padding is zero still.
struct BnBackwardConvWgradArgs {
  ConvWgradArgs conv;
  Prologue in;
  const void* center;
};

// Of a 1x1 convolution behind whose output `out` there is a relu: g = out <= 0 ? 0 : conv.grad,
// stored, its sum by channels, and bn_backward_conv_wgrad of it as it is.
struct ReluBackwardConvWgradArgs {
  ConvWgradArgs conv;
  const void* center;
  const void* out;
  void* g;
  void* sum_g;
};

// dx = grad weight + zc matrix + offset + added by pixels, masked: zc is what is read of every
// stride-th row and column of x [batch, height, width, channels], where all others are; weight
// is [rows, channels] and matrix [channels, channels], of dtype, offset of the type that is
// accumulated in; added may be null. Activations are channels_last, grad of `rows` channels.
struct BnActGramBackwardArgs {
  DType dtype;
  bool tf32;
  int64_t batch, height, width, rows, channels, stride;
  const void* grad;
  const void* weight;
  int64_t weight_stride[2];
  const void* x;
  Prologue in;
  const void* matrix;
  int64_t matrix_stride[2];
  const void* offset;
  const void* added;
  ReluMask mask;
  void* dx;
};

// CPUs have no kernels for them.
#define FUSED_RESNET_CHAIN_OPS(X)                        \
  X(bn_act_conv_bn_act, BnActConvBnActArgs)              \
  X(bn_act_conv_stats, BnActConvStatsArgs)               \
  X(bn_backward_conv_dgrad, BnBackwardConvDgradArgs)     \
  X(bn_backward_conv_wgrad, BnBackwardConvWgradArgs)     \
  X(relu_backward_conv_wgrad, ReluBackwardConvWgradArgs) \
  X(bn_act_gram_backward, BnActGramBackwardArgs)

namespace cuda {
FUSED_RESNET_CHAIN_OPS(FUSED_RESNET_ON_PLACE)
}

}  // namespace fused_resnet
