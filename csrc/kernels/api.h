// The one contract of the kernel layer: what every op takes, on every device.
//
// Nothing below knows torch. A launcher gets raw pointers, sizes and a place to run (a thread pool
// or a CUDA stream with a workspace), and returns a Status. The caller has checked shapes, dtypes
// and layouts, and owns all memory. A dense activation of C channels is seen as [outer, channels,
// inner]: channels_last has inner = 1 and outer = N*H*W, contiguous has inner = H*W and outer = N.
// Offsets are 64-bit everywhere.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum class DType : int { f32, f64, bf16, f16 };
enum class Act : int { none, relu };
enum class EltwiseOp : int { sum, prod, max };
enum class Status : int { ok, unsupported, out_of_memory, launch_failed };

// Per-channel scale and shift are fp32 (fp64 for f64 activations), the type that is accumulated in.

// out = act(op_i(coeff_i * input_i)); coeff (fp64, sum only) may be null. `out` may be one of the
// inputs.
struct EltwiseActArgs {
  DType dtype;
  EltwiseOp op;
  Act act;
  int count;  // number of inputs, at least 1
  const void* const*
      inputs;  // `count` host-side pointers, each to numel elements in the same order
  const double* coeff;
  void* out;
  int64_t numel;
};

// out = act(x * scale[c] + shift[c] + residual); residual may be null, `out` may be x or residual.
struct BnActArgs {
  DType dtype;
  Act act;
  const void* x;
  const void* scale;
  const void* shift;
  const void* residual;
  void* out;
  int64_t outer, channels, inner;
};

// The shape of a pooling. In training, activations are channels_last.
struct PoolShape {
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// out = max over each window of act(x * scale[c] + shift[c]). On CUDA the vectors may be null.
struct BnActMaxpoolArgs {
  DType dtype;
  Act act;
  bool channels_last;
  PoolShape shape;
  const void* x;
  const void* scale;
  const void* shift;
  void* out;
};

// out[n][c] = the mean of x over the pixels of image n's channel c, NaN without any.
struct GlobalAvgPoolArgs {
  DType dtype;
  bool channels_last;
  const void* x;
  void* out;
  int64_t batch, channels, pixels;
};

// scale[c] = weight[c] / sqrt(var[c] + eps), shift[c] = bias[c] - mean[c] * scale[c].
// weight and bias may be null (1 and 0). mean, var, weight and bias are of `dtype`.
struct BnScaleShiftArgs {
  DType dtype;
  const void* mean;
  const void* var;
  const void* weight;
  const void* bias;
  void* scale;
  void* shift;
  int64_t channels;
  double eps;
};

// mean[c] and m2[c], the sum of squared deviations from it, over all pixels; mean is NaN without
// any.
struct BnStatsArgs {
  DType dtype;
  const void* x;
  void* mean;
  void* m2;
  int64_t outer, channels, inner;
};

// var = m2 / count, invstd = 1 / sqrt(var + eps), scale = weight * invstd,
// shift = bias - mean * scale. Where they are given (both or neither), running_mean becomes
// (1 - momentum) * running_mean + momentum * mean, and running_var likewise with
// m2 / (count - 1); without any pixel they stay as they are. weight and bias may be null (1 and 0).
struct BnFinalizeArgs {
  DType dtype;  // f32 or f64, of everything but the running statistics
  DType running_dtype;
  const void* mean;
  const void* m2;
  const void* weight;
  const void* bias;
  void* running_mean;
  void* running_var;
  void* scale;
  void* shift;
  void* invstd;
  int64_t channels;
  double count, momentum, eps;
};

// What the relu of a forward pass let through: g = y <= 0 ? 0 : grad, where y is `out`, else
// x * scale[c] + shift[c] rounded to dtype; g = grad without relu. scale and shift may be null
// where they are not needed.
struct MaskedGrad {
  DType dtype;
  Act act;
  const void* grad;
  const void* x;
  const void* out;
  const void* scale;
  const void* shift;
  int64_t outer, channels, inner;
};

// sum_g[c] = sum of g, sum_gx[c] = invstd[c] * sum of g * (x - mean[c]).
struct BnActBackwardReduceArgs {
  MaskedGrad in;
  const void* mean;
  const void* invstd;
  void* sum_g;
  void* sum_gx;
};

// What BatchNorm's gradient takes of a batch: its statistics, and the sums that
// bn_act_backward_reduce makes, over all `count` pixels of a channel (count > 0; a float as counts
// of several processes are added up). All null, and count 0, where statistics are fixed.
struct BatchSums {
  const void* mean;
  const void* invstd;
  const void* sum_g;
  const void* sum_gx;
  double count;
};

// Of batch statistics
//   dx = scale[c] * (g - sum_g[c] / count - (x - mean[c]) * (invstd[c] * sum_gx[c] / count)),
// computed as a[c] * g + b[c] * (x - mean[c]) + c[c] whose a, b and c are made in fp64. The mean is
// subtracted from x itself: where it is far from zero, b * x + (c - b * mean) would cancel.
// Of fixed statistics dx = scale[c] * g: x may be null, and makes nothing but the mask.
// `in` has scale, also without relu; dx may be grad.
struct BnActBackwardArgs {
  MaskedGrad in;
  BatchSums batch;
  void* dx;
};

// g as above of out alone, stored, and its sum by channels.
struct ReluBackwardReduceArgs {
  MaskedGrad in;
  void* g;
  void* sum_g;
};

// Of zc = z - center[c], z = act(x * scale[c] + shift[c]) rounded to dtype (act(x) where scale is
// null), at every stride-th row and column of the image: gram[i][j] = sum of zc_i * zc_j and
// sum[c] = sum of zc, both fp64. x is channels_last.
struct BnActGramArgs {
  DType dtype;
  Act act;
  const void* x;
  const void* scale;
  const void* shift;
  const void* center;
  void* gram;
  void* sum;
  int64_t batch, height, width, channels, stride;
};

// Of what bn_act_gram makes of `count` positions, in dtype, f32 or f64:
// covariance = gram - sum sum^T / count, and moments = [gram | sum], of channels + 1 columns.
struct GramMomentsArgs {
  DType dtype;
  const double* gram;
  const double* sum;
  void* covariance;
  void* moments;
  int64_t channels;
  double count;
};

// The statistics of y = weight z over `count` positions, each row of weight one channel of y, from
// those of z: about = mean of weight (z - center), mean = about + weight center, and m2, the sum of
// squared deviations, rowdot(weight, product), product being weight covariance. weight is of dtype,
// sum f64, all else of the type dtype is accumulated in. m2 is at least zero.
struct GramStatsArgs {
  DType dtype;
  const void* weight;
  const void* product;
  const double* sum;
  const void* center;
  void* mean;
  void* about;
  void* m2;
  int64_t rows, channels;
  double count;
};

// The gradient behind batch statistics of such a y, short of matrix products, s being g z^T with z
// centered and g the gradient of BatchNorm's output; mean is that of weight (z - center):
//   sum_gx[k] = invstd[k] * (rowdot(weight, s)[k] - mean[k] * sum_g[k]), where none is given;
//   dy = a g + b y + c: a = scale, b = -a invstd sum_gx / count, c = -a sum_g / count - b mean;
//   scaled_s = a s, scaled_weight = a weight, slopes = [b weight | c], of channels + 1 columns.
// weight and scaled_weight are of dtype, all else of the type it is accumulated in.
struct GramGradientsArgs {
  DType dtype;
  const void* weight;
  const void* s;
  const void* scale;
  const void* mean;
  const void* invstd;
  const void* sum_g;
  const void* sum_gx;  // null: from s
  void* dgamma;        // the sum_gx that is used
  void* scaled_s;
  void* slopes;
  void* scaled_weight;
  int64_t rows, channels;
  double count;
};

// bn_act_maxpool that keeps where the maximum was: argmax = kh * kernel[1] + kw of the first of the
// largest, or of the last NaN, as torch has it. A window has at most 255 positions.
struct BnActMaxpoolTrainArgs {
  DType dtype;
  Act act;
  PoolShape shape;
  const void* x;
  const void* scale;
  const void* shift;
  void* out;
  uint8_t* argmax;
};

// The gradient of bn_act_maxpool with respect to its BatchNorm. At each pooled position, g is grad
// where relu let it through (not out <= 0) and x is taken at argmax:
// sum_g[c] = sum of g, sum_gx[c] = invstd[c] * sum of g * (x - mean[c]).
struct BnActMaxpoolBackwardReduceArgs {
  DType dtype;
  Act act;
  PoolShape shape;
  const void* grad;
  const void* out;
  const uint8_t* argmax;
  const void* x;
  const void* mean;
  const void* invstd;
  void* sum_g;
  void* sum_gx;
};

// As bn_act_backward, g being the sum of those of the windows whose maximum this is.
struct BnActMaxpoolBackwardArgs {
  DType dtype;
  Act act;
  PoolShape shape;
  const void* grad;
  const void* out;
  const uint8_t* argmax;
  const void* x;
  const void* scale;
  BatchSums batch;
  void* dx;
};

// The gradient of every input of eltwise_act, g being grad where relu let it through (not
// out <= 0; out may be null without relu). sum: coeff_i * g; prod: g times the product of the other
// inputs; max: g to the largest, split as torch.maximum splits it, two at a time from the left.
struct EltwiseActBackwardArgs {
  DType dtype;
  EltwiseOp op;
  Act act;
  int count;
  const void* grad;
  const void* out;
  const void* const* inputs;
  const double* coeff;
  void* const* grads;
  int64_t numel;
};

// The shape of a convolution. `tf32` below is whether f32 may be multiplied as tf32, which has
// f16's precision; CPUs have none and do not read it. Activations are channels_last: x [batch,
// height, width, in_channels], out [batch, out_height, out_width, out_channels].
struct ConvShape {
  int64_t batch, height, width, in_channels, out_height, out_width, out_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
};

// out = act(conv(x, weight) * scale[c] + shift[c] + residual); scale, shift and residual may be
// null. Exactly one of `weight` (of `dtype`, strides in elements) and `packed` (from conv_pack) is
// set. `wgmma` asks for the body of that name, of CUDA on compute capability 9.0: unsupported
// elsewhere, and where it does not take the convolution.
struct ConvBnActArgs {
  DType dtype;
  Act act;
  ConvShape shape;
  const void* x;
  const void* weight;
  int64_t weight_stride[4];  // of [out_channels, in_channels / groups, kernel[0], kernel[1]]
  const void* packed;
  const void* scale;
  const void* shift;
  const void* residual;  // laid out as out
  void* out;
  bool tf32;
  bool wgmma;
};

// Rearranges a convolution's weight into the panels conv_bn_act reads. conv_packed_size and
// conv_packed_dtype say what `packed` holds. The format belongs to the processor at hand.
struct ConvPackArgs {
  DType dtype;
  ConvShape shape;  // batch and image sizes are not read
  const void* weight;
  int64_t weight_stride[4];
  void* packed;
};

// The gradient of a convolution's input, dx = sum over kernel positions of weight^T grad, plus
// `added`, which is laid out as dx and may be null or dx itself. All activations are channels_last.
struct ConvDgradArgs {
  DType dtype;
  ConvShape shape;  // of the convolution
  const void* grad;
  const void* weight;
  int64_t weight_stride[4];
  const void* added;
  void* dx;
  bool tf32;
};

// The gradient of a convolution's weight: sum over output pixels of grad times the input they read,
// z = act(x * scale[c] + shift[c]) rounded to dtype (act(x) where scale is null), which is padded
// with zeros. dw is [out_channels][kernel[0]][kernel[1]][in_channels / groups], of the type that is
// accumulated in.
struct ConvWgradArgs {
  DType dtype;
  Act act;
  ConvShape shape;
  const void* grad;
  const void* x;
  const void* scale;
  const void* shift;
  void* dw;
  bool tf32;
};

// Every op: the name of its launchers, and what they take.
#define FUSED_RESNET_OPS(X)                                         \
  X(eltwise_act, EltwiseActArgs)                                    \
  X(bn_act, BnActArgs)                                              \
  X(bn_act_maxpool, BnActMaxpoolArgs)                               \
  X(global_avg_pool, GlobalAvgPoolArgs)                             \
  X(bn_scale_shift, BnScaleShiftArgs)                               \
  X(bn_stats, BnStatsArgs)                                          \
  X(bn_finalize, BnFinalizeArgs)                                    \
  X(bn_act_backward_reduce, BnActBackwardReduceArgs)                \
  X(bn_act_backward, BnActBackwardArgs)                             \
  X(bn_act_gram, BnActGramArgs)                                     \
  X(gram_moments, GramMomentsArgs)                                  \
  X(gram_stats, GramStatsArgs)                                      \
  X(gram_gradients, GramGradientsArgs)                              \
  X(relu_backward_reduce, ReluBackwardReduceArgs)                   \
  X(bn_act_maxpool_train, BnActMaxpoolTrainArgs)                    \
  X(bn_act_maxpool_backward_reduce, BnActMaxpoolBackwardReduceArgs) \
  X(bn_act_maxpool_backward, BnActMaxpoolBackwardArgs)              \
  X(eltwise_act_backward, EltwiseActBackwardArgs)                   \
  X(conv_bn_act, ConvBnActArgs)                                     \
  X(conv_pack, ConvPackArgs)                                        \
  X(conv_dgrad, ConvDgradArgs)                                      \
  X(conv_wgrad, ConvWgradArgs)

namespace cpu {

// Runs body(context, begin, end) over a partition of [0, n) into pieces of at least `grain`, in the
// caller's thread pool, and returns when all of it is done.
struct Pool {
  int threads;
  void (*run)(int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));
};

#define FUSED_RESNET_ON_POOL(op, Args) Status op(const Args&, const Pool&);
FUSED_RESNET_OPS(FUSED_RESNET_ON_POOL)

// How many elements a packed weight has, and of what type.
int64_t conv_packed_size(DType dtype, const ConvShape& shape);
DType conv_packed_dtype(DType dtype);

// The instruction set the kernels run with: the best of "avx512bf16", "avx512vnni", "avx512",
// "avx2" and "generic" that the processor and the build have, or the one FUSED_RESNET_ISA names.
const char* isa();

}  // namespace cpu

namespace cuda {

// All that a choice of launch (blocks, splits, workspace) may depend on, beside the arguments.
struct Gpu {
  int multiprocessors;
  int capability;  // 10 * major + minor
};

// Where a launcher runs: `stream`, a cudaStream_t of the current device, which is `gpu`. Kernels
// allocate nothing: `workspace` has the bytes that workspace_bytes(args, gpu) of cuda/workspace.h
// asks for, at a multiple of 16, and holds anything. It must outlive what is queued on the stream.
struct Place {
  void* stream;
  Gpu gpu;
  void* workspace;
};

#define FUSED_RESNET_ON_PLACE(op, Args) Status op(const Args&, const Place&);
FUSED_RESNET_OPS(FUSED_RESNET_ON_PLACE)

// As cpu's: the weight as channels_last has it, in its own type.
int64_t conv_packed_size(DType dtype, const ConvShape& shape);
DType conv_packed_dtype(DType dtype);

}  // namespace cuda

}  // namespace fused_resnet
