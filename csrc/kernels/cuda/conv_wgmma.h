// When wgmma may make a convolution, and how it is cut into blocks then: pure functions of sizes
// and of the GPU, as in conv_plan.h.
#pragma once

#include "conv_plan.h"

namespace fused_resnet::cuda {

constexpr int kWgmmaCapability = 90;  // exactly: later GPUs do not have the instructions
constexpr int kWgmmaGroupRows = 64;   // pixels of a warpgroup, and of one instruction
constexpr int kWgmmaGroups = 2;       // warpgroups of a block that multiply
constexpr int kWgmmaRows = kWgmmaGroups * kWgmmaGroupRows;
constexpr int kWgmmaChannels = 8;         // of which input and output have multiples: 16 bytes
constexpr int kWgmmaAlignment = 1 << 10;  // of a stage: what the pattern of a swizzle repeats by

// Output channels of a block, and stages of the ring. With either, two blocks fit on a
// multiprocessor: one multiplies while the other begins or writes.
struct WgmmaTile {
  int columns, stages;

  constexpr int stage_bytes() const {
    return (kWgmmaRows + columns) * static_cast<int>(kConvRowBytes);
  }
  constexpr int ring_bytes() const { return stages * stage_bytes(); }
  // The ring, from the first aligned byte on, and a barrier either way for each stage.
  constexpr int shared_bytes() const {
    return kWgmmaAlignment + ring_bytes() + 2 * stages * static_cast<int>(sizeof(uint64_t));
  }
};
constexpr WgmmaTile kWgmmaTiles[] = {{64, 4}, {128, 3}};

// Whether a convolution of dense tensors is a matrix product that wgmma makes on that GPU. Pixels
// are counted in 32 bits, beyond the last of which a block may begin to read.
constexpr bool wgmma_takes(DType dtype, const ConvShape& s, const Gpu& gpu) {
  bool plain = s.groups == 1;
  for (int i = 0; i < 2; ++i)
    plain = plain && s.kernel[i] == 1 && s.stride[i] == 1 && s.padding[i] == 0;
  return gpu.capability == kWgmmaCapability && plain && conv_element_bytes(dtype) == 2 &&
         s.in_channels % kWgmmaChannels == 0 && s.out_channels % kWgmmaChannels == 0 &&
         s.batch * s.height * s.width <= INT32_MAX - kWgmmaRows;
}

constexpr int64_t wgmma_blocks(const WgmmaTile& tile, int64_t pixels, int64_t columns) {
  return ceil_div(pixels, kWgmmaRows) * ceil_div(columns, tile.columns);
}

// Which of kWgmmaTiles: the wider, unless it computes half of its last columns in vain or leaves
// multiprocessors idle.
constexpr int plan_wgmma(int64_t pixels, int64_t columns, const Gpu& gpu) {
  const WgmmaTile &narrow = kWgmmaTiles[0], &wide = kWgmmaTiles[1];
  const bool fills = ceil_div(columns, narrow.columns) % 2 == 0;
  return fills && wgmma_blocks(wide, pixels, columns) >= gpu.multiprocessors ? 1 : 0;
}

// A matrix in memory: rows of `depth` elements of two bytes, `row_stride` elements apart.
// `box_rows` of them are copied at a time, kConvRowBytes of each, with zeros beyond its ends.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t rows, depth, row_stride;
  int box_rows;
};

}  // namespace fused_resnet::cuda
