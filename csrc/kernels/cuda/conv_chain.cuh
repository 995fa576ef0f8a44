// The convolution that the ops of chains are made of, as conv.cuh has that of others.
#pragma once

#include "../api_chain.h"
#include "conv.cuh"

namespace fused_resnet::cuda {

// The sums of one product over the depth of `conv`, of which `in` says what is read of x.
struct Product {
  Conv conv;
  Prologue in;
};

// Added to those pixels of an output whose rows and columns are multiples of `stride`: an image of
// height by width of them, or null. The output's row i is row first + i * step.
struct Spread {
  const void* image;
  int stride, height, width;
  int first[2], step[2];

  // Where in the image the pixel is that lies `i` behind `from`, or -1.
  __device__ __forceinline__ int64_t find(const Conv& c, int64_t from, int i) const {
    const int64_t pixel = from + i;
    const int row = static_cast<int>(pixel / c.out_width % c.out_height) * step[0] + first[0];
    const int column = static_cast<int>(pixel % c.out_width) * step[1] + first[1];
    if (row % stride != 0 || column % stride != 0) return -1;
    const int64_t of_image = pixel / c.out_width / c.out_height;
    return ((of_image * height + row / stride) * width + column / stride) * c.out_channels;
  }
};

// The first product's convolution, to whose sums the second's are added, which has the same output.
// Where there is a mask, the result is zero wherever mask_x * mask_scale + mask_shift <= 0, as
// relu_backward has it; mask_x is strided as out.
struct Chain {
  Product products[2];
  int count;
  // Where `apart`, the sums of each product are scaled, by output channel, before they are added;
  // null is 1.
  bool apart;
  const void* factors[2];
  Spread added;
  const void* mask_x;
  const void* mask_scale;
  const void* mask_shift;
  const void* mask_mean;
  // What is reduced of each tile of pixels, [tile][channel]; null if nothing is. The mean of what
  // was stored and its squared deviations from it; with a mask, its sum and that of its products
  // with mask_x - mask_mean.
  void* first;
  void* second;

  // Of an output that begins so many bytes into an image like m.x.
  void set_mask(const ReluMask& m, int64_t begin) {
    if (!m.invstd) return;
    mask_x = static_cast<const char*>(m.x) + begin;
    mask_scale = m.scale;
    mask_shift = m.shift;
    mask_mean = m.mean;
  }
};

// How it is cut into tiles; the same before its weights are packed and afterwards.
struct ChainPlan {
  int tile;       // of kConvTiles
  int64_t tiles;  // of pixels

  int64_t tile_pixels() const { return kConvTiles[tile].rows; }
};
ChainPlan plan_of(const Chain& chain);

// What the weights take in the workspace that cannot be read where they are, and puts them there.
int64_t packed_bytes(const Chain& chain);
Status pack(Chain* chain, void* workspace, void* stream);

Status convolve(const Chain& chain, const ChainPlan& plan, void* stream);

// That of conv_bn_act with a prologue; false where a size is beyond 31 bits.
bool describe(const ConvBnActArgs& args, const Prologue& in, Chain* chain);

}  // namespace fused_resnet::cuda
