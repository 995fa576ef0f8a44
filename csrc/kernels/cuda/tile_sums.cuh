// What the tiles of a chain's convolution have reduced is put together in fp64 and in a fixed
// order.
#pragma once

#include "conv_chain.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fused_resnet::cuda {

// What `tiles` tiles of `channels` channels have left in the workspace.
struct TileSums {
  void* first;
  void* second;
  int64_t tiles, channels;

  static int64_t bytes(DType dtype, int64_t tiles, int64_t channels) {
    return 2 * tiles * channels * (dtype == DType::f64 ? 8 : 4);
  }
  TileSums(DType dtype, void* workspace, int64_t tiles, int64_t channels)
      : first(workspace),
        second(static_cast<char*>(workspace) + bytes(dtype, tiles, channels) / 2),
        tiles(tiles),
        channels(channels) {}

  // Where a chain leaves what it reduces of its tiles, the first of which is the `tile`-th of all.
  void give(DType dtype, int64_t tile, Chain* chain) const {
    const int64_t begin = bytes(dtype, tile, channels) / 2;
    chain->first = static_cast<char*>(first) + begin;
    chain->second = static_cast<char*>(second) + begin;
  }
};

// Threads that share out the tiles of a channel, and channels of a block: 32 bytes of floats.
constexpr int kTileLanes = 64, kTileChannels = 8, kTileThreads = kTileLanes * kTileChannels;

// The sum over all tiles of value(place), in lane 0; place is that of the channel's number.
template <class Value>
__device__ __forceinline__ double sum_tiles(const TileSums& sums, int64_t channel,
                                            const Value& value) {
  const int slot = threadIdx.x % kTileChannels, lane = threadIdx.x / kTileChannels;
  double sum[1][1] = {};
  if (channel < sums.channels) {
#pragma unroll 4
    for (int64_t tile = lane; tile < sums.tiles; tile += kTileLanes)
      sum[0][0] += value(tile, tile * sums.channels + channel);
  }
  combine_lanes<kTileThreads>(
      sum, lane, kTileLanes, slot, kTileChannels,
      [](double (&mine)[1], const double (&theirs)[1]) { mine[0] += theirs[0]; });
  return sum[0][0];
}

// BatchNorm's gradient: sum_g and sum_gx.
Status finish_gradients(DType dtype, const TileSums& sums, const ReluMask& mask, void* stream);

inline unsigned tile_blocks(const TileSums& sums) {
  return static_cast<unsigned>(ceil_div(sums.channels, kTileChannels));
}

}  // namespace fused_resnet::cuda
