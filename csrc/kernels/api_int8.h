// The contract of the ops of 8-bit inference, which CPUs alone have; see api.h.
#pragma once

#include "api.h"

namespace fused_resnet {

// out = min(max(round(x * inverse) + zero, 0), 255), rounded to even; of NaN, 0.
struct QuantizeArgs {
  const float* x;
  float inverse;
  int zero;
  uint8_t* out;
  int64_t numel;
};

// y = conv(x, weight) * scale[c] + shift[c] + residual * residual_scale, in fp32, each operation
// rounded, of sums that are exact. `x_zero` is what the padding holds. Activations are
// channels_last. out: act(y) in fp32, or min(max(round(act(y)) + out_zero, 0), 255), rounded to
// even; of NaN, what 0 becomes with relu, and 0 without. Exactly one of `weight` (strides in
// elements) and `packed` (from conv_int8_pack) is set.
struct ConvInt8Args {
  Act act;
  ConvShape shape;
  const void* x;  // uint8
  int x_zero;
  const void* weight;  // int8
  int64_t weight_stride[4];
  const void* packed;
  const float* scale;
  const float* shift;
  const void* residual;  // uint8, or fp32, or null; laid out as out
  bool residual_is_float;
  float residual_scale;
  void* out;  // uint8, or fp32
  bool out_is_float;
  int out_zero;
};

// Rearranges a weight into the panels conv_int8 reads; the format belongs to the processor at hand.
struct ConvInt8PackArgs {
  ConvShape shape;  // batch and image sizes are not read
  const int8_t* weight;
  int64_t weight_stride[4];
  void* packed;
};

// Those of one file, of which there is an instruction set more.
#define FUSED_RESNET_BYTE_OPS(X) \
  X(conv_int8, ConvInt8Args)     \
  X(conv_int8_pack, ConvInt8PackArgs)

#define FUSED_RESNET_INT8_OPS(X) \
  X(quantize, QuantizeArgs)      \
  FUSED_RESNET_BYTE_OPS(X)

namespace cpu {

FUSED_RESNET_INT8_OPS(FUSED_RESNET_ON_POOL)

// How many bytes a packed weight has.
int64_t conv_int8_packed_size(const ConvShape& shape);

}  // namespace cpu

}  // namespace fused_resnet
