// bn_act_conv_bn_act's convolution, and what is made of what its tiles have reduced: see
// tile_sums.cuh.
#include "tile_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

// Chan, Golub and LeVeque's formula for all parts at once. Without any pixel the mean is NaN.
template <class A>
__global__ void __launch_bounds__(kTileThreads)
    finish_moments_kernel(TileSums sums, int64_t pixels, int64_t tile_pixels, A* mean, A* m2) {
  using Means = double[kTileChannels];
  FR_SHARED(Means, means);
  const int slot = threadIdx.x % kTileChannels;
  const int64_t channel = int64_t{blockIdx.x} * kTileChannels + slot;
  const A *first = static_cast<const A*>(sums.first), *second = static_cast<const A*>(sums.second);
  auto count = [&](int64_t tile) {
    const int64_t left = pixels - tile * tile_pixels;
    return static_cast<double>(left < tile_pixels ? left : tile_pixels);
  };
  const double sum =
      sum_tiles(sums, channel, [&](int64_t tile, int64_t at) { return first[at] * count(tile); });
  if (threadIdx.x < kTileChannels) means[slot] = sum / static_cast<double>(pixels);
  __syncthreads();
  const double whole = means[slot];
  const double deviations = sum_tiles(sums, channel, [&](int64_t tile, int64_t at) {
    const double away = first[at] - whole;
    return second[at] + away * away * count(tile);
  });
  if (threadIdx.x >= kTileChannels || channel >= sums.channels) return;
  mean[channel] = static_cast<A>(whole);
  m2[channel] = static_cast<A>(deviations);
}

template <class A>
Status finish_moments(const TileSums& sums, int64_t pixels, int64_t tile_pixels,
                      const BnActConvStatsArgs& args, void* stream) {
  return launch(finish_moments_kernel<A>, tile_blocks(sums), kTileThreads, 0, stream, sums, pixels,
                tile_pixels, static_cast<A*>(args.mean), static_cast<A*>(args.m2));
}

struct Job {
  Chain chain;
  bool fits;
  ChainPlan plan;

  explicit Job(const BnActConvStatsArgs& args) : fits(describe(args.conv, args.in, &chain)) {
    if (fits) plan = plan_of(chain);
  }
  const Conv& conv() const { return chain.products[0].conv; }
};

}  // namespace

int64_t workspace_bytes(const BnActConvStatsArgs& args, const Gpu&) {
  const Job job(args);
  if (!job.fits) return 0;
  return packed_bytes(job.chain) +
         TileSums::bytes(args.conv.dtype, job.plan.tiles, job.conv().out_channels);
}

Status bn_act_conv_stats(const BnActConvStatsArgs& args, const Place& place) {
  Job job(args);
  if (!job.fits) return Status::unsupported;
  const DType dtype = args.conv.dtype;
  unsigned char* const workspace = static_cast<unsigned char*>(place.workspace);
  const TileSums sums(dtype, workspace + packed_bytes(job.chain), job.plan.tiles,
                      job.conv().out_channels);
  if (sums.tiles > 0) {
    sums.give(dtype, 0, &job.chain);
    Status status = pack(&job.chain, workspace, place.stream);
    if (status == Status::ok) status = convolve(job.chain, job.plan, place.stream);
    if (status != Status::ok) return status;
  }
  const int64_t pixels = job.conv().pixels(), tile_pixels = job.plan.tile_pixels();
  return dtype == DType::f64 ? finish_moments<double>(sums, pixels, tile_pixels, args, place.stream)
                             : finish_moments<float>(sums, pixels, tile_pixels, args, place.stream);
}

}  // namespace fused_resnet::cuda
