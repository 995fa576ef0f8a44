// The convolution that conv_bn_act and conv_dgrad are made of.
#pragma once

#include "conv_plan.h"
#include "launch.h"

namespace fused_resnet::cuda {

// out = act(conv(x, weight) * scale + shift + residual) with everything that x, weight and out can
// be strided by: conv_dgrad reads the weight backwards and writes one phase of its result. Strides
// are in elements. Padding may be negative, and differ on the other side.
struct Conv {
  DType dtype;
  Math math;
  Act act;
  const void* x;
  const void* weight;
  const void* scale;
  const void* shift;
  const void* residual;  // strided as out
  void* out;
  int64_t batch;
  int height, width, channels;
  int out_height, out_width, out_channels;
  int kernel[2], stride[2], padding[2], dilation[2];
  int groups;
  int64_t group_stride;      // from one group of the weight to the next,
  int64_t weight_stride[4];  // and within it [output channel, input channel, kernel row, column]
  int64_t out_stride[3];     // of images, rows and pixels

  __host__ __device__ int group_channels() const { return channels / groups; }
  __host__ __device__ int group_out_channels() const { return out_channels / groups; }
  __host__ __device__ int depth() const { return kernel[0] * kernel[1] * group_channels(); }
  __host__ __device__ int64_t pixels() const { return batch * out_height * out_width; }
};

// The convolution of `s` whose pointers are null and whose weight is dense, [out_channels][kernel]
// [in_channels / groups]; false where a size is beyond 31 bits.
bool describe(DType dtype, bool tf32, const ConvShape& s, Conv* conv);
// The convolution of conv_bn_act.
bool describe(const ConvBnActArgs& args, Conv* conv);

// Whether each 16 bytes of the depth are in one place of x and of the weight.
bool reads_wide(const Conv& conv);
// Whether they would be if the weight were packed.
bool packs_wide(const Conv& conv);

// What a packed weight takes, a multiple of 16 bytes.
int64_t packed_bytes(const Conv& conv);
// Packs the weight into `packed`, [group][output channel][kernel row][column][input channel], where
// conv then finds it.
Status pack(Conv* conv, void* packed, void* stream);

ConvSizes sizes_of(const Conv& conv);
ConvPlan plan_of(const Conv& conv, const Gpu& gpu, bool may_split);
int64_t partial_bytes(const Conv& conv, const ConvPlan& plan);
// `partial` has partial_bytes(conv, plan). With splits, out is dense.
Status convolve(const Conv& conv, const ConvPlan& plan, void* partial, void* stream);

// The same for what wgmma_takes, of the body in conv_wgmma.cu.
Status convolve_wgmma(const Conv& conv, const Gpu& gpu, void* stream);

}  // namespace fused_resnet::cuda
