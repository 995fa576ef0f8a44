// How a convolution is cut into blocks: a pure function of its sizes and of the GPU, which needs
// neither CUDA nor a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../api.h"

namespace fused_resnet::cuda {

// How products are made: by matrix instructions (bf16, f16, and f32 rounded to tf32), or one by
// one.
enum class Math { tensor, scalar };

// The matrix product that a convolution is, of one group.
struct ConvSizes {
  DType dtype;
  Math math;
  bool wide;  // 16-byte loads are possible
  int64_t pixels, columns, depth;
  int64_t groups;
};

// Pixels by output channels of a block.
struct ConvTile {
  int rows, columns;
};

// The tiles that are compiled. Loads of single elements have the smallest, and the only one of f64.
constexpr ConvTile kConvTiles[] = {{64, 64}, {128, 64}, {128, 128}};
constexpr int kConvTileCount = 3;

struct ConvPlan {
  int tile;    // of kConvTiles
  int splits;  // blocks that share out the depth of one tile
};

constexpr int64_t kConvRowBytes = 128;   // of the depth, that a stage of the pipeline has
constexpr int64_t kConvSplitStages = 8;  // at least, of a split
constexpr int64_t kConvMostSplits = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int conv_element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Stages of the pipeline that the whole depth takes.
constexpr int64_t conv_stages(const ConvSizes& s) {
  return ceil_div(s.depth * conv_element_bytes(s.dtype), kConvRowBytes);
}

constexpr int64_t conv_blocks(const ConvSizes& s, const ConvTile& tile) {
  return ceil_div(s.pixels, tile.rows) * ceil_div(s.columns, tile.columns) * s.groups;
}

// Whether a tile is compiled for such a convolution.
constexpr bool conv_has_tile(const ConvSizes& s, int tile) {
  return tile == 0 || (s.wide && s.math == Math::tensor) ||
         (s.wide && s.dtype == DType::f32 && tile == 1);
}

// The largest tile that still gives every multiprocessor a block and does not compute half of its
// columns in vain; then as many splits as fill the multiprocessors twice.
inline ConvPlan plan_conv(const ConvSizes& s, const Gpu& gpu, bool may_split) {
  ConvPlan plan{0, 1};
  for (int tile = 1; tile < kConvTileCount; ++tile) {
    const bool fits = 2 * s.columns > kConvTiles[tile].columns;
    if (conv_has_tile(s, tile) && fits && conv_blocks(s, kConvTiles[tile]) >= gpu.multiprocessors)
      plan.tile = tile;
  }
  if (may_split) {
    const int64_t blocks = std::max<int64_t>(1, conv_blocks(s, kConvTiles[plan.tile]));
    const int64_t most = std::min(kConvMostSplits, conv_stages(s) / kConvSplitStages);
    const int64_t wanted = std::min<int64_t>(most, 2 * gpu.multiprocessors / blocks);
    const int64_t stages = std::max<int64_t>(1, conv_stages(s));
    const int64_t split_stages = ceil_div(stages, std::max<int64_t>(1, wanted));
    plan.splits = static_cast<int>(ceil_div(stages, split_stages));  // none is empty
  }
  return plan;
}

// From how many blocks on a convolution of a chain has the largest tile: about the
// multiprocessors of a GPU, but the same for all. What is reduced by tiles must not depend on it.
constexpr int64_t kChainBlocks = 128;

inline int chain_tile(const ConvSizes& s) {
  constexpr int kLargest = kConvTileCount - 1;
  const ConvTile& large = kConvTiles[kLargest];
  const bool fits = s.math == Math::tensor && s.wide && 2 * s.columns > large.columns;
  return fits && conv_blocks(s, large) >= kChainBlocks ? kLargest : 0;
}

// The matrix product that a weight's gradient is, of one group: summed over pixels.
struct WgradSizes {
  DType dtype;
  Math math;
  bool wide;
  int64_t rows, columns, pixels;
  int64_t groups;
};

// Output channels by kernel positions and input channels. The larger is for wide half types.
constexpr ConvTile kWgradTiles[] = {{64, 64}, {128, 128}};
constexpr int kStagePixels = 32;

struct WgradPlan {
  int tile;              // of kWgradTiles
  int splits;            // blocks that share out the pixels of one tile,
  int64_t split_pixels;  // so many each
};

constexpr int64_t kWgradSplitPixels = 256;  // at least, of a split
constexpr int64_t kWgradSplitStages = 10;   // what it costs beside its own
constexpr int kWgradMostTimes = 8;
constexpr int64_t kWgradPartialBytes = 64 << 20;  // at most, of all splits

// Blocks of so many threads that a multiprocessor has at once: 16 warps, or what of 32 bits and
// more fits into shared memory.
constexpr int pixel_blocks(int element_bytes, int threads) {
  return element_bytes == 2 ? 512 / threads : 2;
}

constexpr bool wgrad_has_tile(const WgradSizes& s, int tile) {
  return tile == 0 || (s.wide && conv_element_bytes(s.dtype) == 2);
}

// Splits of whole stages, none of them empty, at most so many. Blocks that run at once come
// one or several times, whichever leaves the least idle in the end; a block has a cost of its own,
// and its sums are added up.
inline WgradPlan split_pixels(int tile, int64_t tiles, int64_t pixels, int64_t most,
                              int64_t at_once) {
  const int64_t stages = std::max<int64_t>(1, ceil_div(pixels, kStagePixels));
  auto split_stages = [&](int64_t times) {
    const int64_t splits = std::min(most, times * at_once / std::max<int64_t>(1, tiles));
    return ceil_div(stages, std::max<int64_t>(1, splits));
  };
  auto cost = [&](int64_t each) {
    return ceil_div(tiles * ceil_div(stages, each), at_once) * (each + kWgradSplitStages);
  };
  int64_t best = split_stages(1);
  for (int times = 2; times <= kWgradMostTimes; ++times)
    if (const int64_t each = split_stages(times); cost(each) < cost(best)) best = each;
  return {tile, static_cast<int>(ceil_div(stages, best)), best * kStagePixels};
}

// The larger tile where it is more than half full both ways.
inline WgradPlan plan_wgrad(const WgradSizes& s, const Gpu& gpu) {
  const ConvTile& large = kWgradTiles[1];
  const bool fits = 2 * s.rows > large.rows && 2 * s.columns > large.columns;
  const int index = wgrad_has_tile(s, 1) && fits ? 1 : 0;
  const ConvTile& tile = kWgradTiles[index];
  const int64_t tiles = ceil_div(s.rows, tile.rows) * ceil_div(s.columns, tile.columns) * s.groups;
  const int64_t sum_bytes = s.dtype == DType::f64 ? 8 : 4;
  const int64_t room = kWgradPartialBytes / (s.rows * s.columns * s.groups * sum_bytes);
  const int threads = index == 0 && s.math == Math::tensor ? 128 : 256;
  return split_pixels(index, tiles, s.pixels, std::min(s.pixels / kWgradSplitPixels, room),
                      pixel_blocks(conv_element_bytes(s.dtype), threads) * gpu.multiprocessors);
}

// Of which products are added in fp32: matrix instructions cut off what a sum has no bits for.
constexpr int kGramPixels = 256;

// A Gram matrix, in tiles of 64 x 64 of which those above the diagonal count.
inline WgradPlan plan_gram(int64_t channels, int64_t pixels, const Gpu& gpu) {
  const int64_t across = ceil_div(channels, 64), tiles = across * (across + 1) / 2;
  const int64_t room = kWgradPartialBytes / (std::max<int64_t>(1, channels * channels) * 8);
  return split_pixels(0, tiles, pixels, std::min(pixels / kWgradSplitPixels, room),
                      2 * gpu.multiprocessors);
}

}  // namespace fused_resnet::cuda
