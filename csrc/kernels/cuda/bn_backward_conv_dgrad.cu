// conv_dgrad by the convolution of chains, each phase of which masks what it writes and reduces it.
#include "conv_dgrad.cuh"
#include "tile_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class A>
__global__ void __launch_bounds__(kTileThreads)
    finish_gradients_kernel(TileSums sums, const A* invstd, A* sum_g, A* sum_gx) {
  const int64_t channel = int64_t{blockIdx.x} * kTileChannels + threadIdx.x % kTileChannels;
  auto sum = [&](const void* of) {
    return sum_tiles(sums, channel,
                     [&](int64_t, int64_t at) -> double { return static_cast<const A*>(of)[at]; });
  };
  const double g = sum(sums.first), gx = sum(sums.second);
  if (threadIdx.x >= kTileChannels || channel >= sums.channels) return;
  sum_g[channel] = static_cast<A>(g);
  sum_gx[channel] = static_cast<A>(gx * invstd[channel]);
}

template <class A>
Status launch_gradients(const TileSums& sums, const ReluMask& mask, void* stream) {
  return launch(finish_gradients_kernel<A>, tile_blocks(sums), kTileThreads, 0, stream, sums,
                static_cast<const A*>(mask.invstd), static_cast<A*>(mask.sum_g),
                static_cast<A*>(mask.sum_gx));
}

// The Chain of a phase, but for where its sums go.
Chain chain_of(const DgradJob& job, const BnBackwardConvDgradArgs& args, const Phase& h,
               const Phase& w) {
  Chain chain{};
  chain.products[0] = {job.phase(h, w), args.in};
  chain.count = 1;
  const ConvShape& s = job.s;
  if (args.added_stride > 1 && args.conv.added) {
    const int stride = static_cast<int>(args.added_stride);
    chain.products[0].conv.residual = nullptr;
    chain.added = {args.conv.added,
                   stride,
                   static_cast<int>(ceil_div(s.height, stride)),
                   static_cast<int>(ceil_div(s.width, stride)),
                   {static_cast<int>(h.first), static_cast<int>(w.first)},
                   {static_cast<int>(s.stride[0]), static_cast<int>(s.stride[1])}};
  }
  chain.set_mask(args.mask, job.begin(h, w));
  return chain;
}

int64_t tiles_of(const DgradJob& job, const BnBackwardConvDgradArgs& args) {
  int64_t tiles = 0;
  job.each_phase([&](const Phase& h, const Phase& w) {
    tiles += plan_of(chain_of(job, args, h, w)).tiles;
    return Status::ok;
  });
  return tiles;
}

}  // namespace

Status finish_gradients(DType dtype, const TileSums& sums, const ReluMask& mask, void* stream) {
  return dtype == DType::f64 ? launch_gradients<double>(sums, mask, stream)
                             : launch_gradients<float>(sums, mask, stream);
}

int64_t workspace_bytes(const BnBackwardConvDgradArgs& args, const Gpu&) {
  const DgradJob job(args.conv);
  if (!job.fits) return 0;
  const int64_t tiles = args.mask.invstd ? tiles_of(job, args) : 0;
  return job.pack_bytes() + TileSums::bytes(args.conv.dtype, tiles, args.conv.shape.in_channels);
}

Status bn_backward_conv_dgrad(const BnBackwardConvDgradArgs& args, const Place& place) {
  DgradJob job(args.conv);
  if (!job.fits) return Status::unsupported;
  unsigned char* const workspace = static_cast<unsigned char*>(place.workspace);
  const DType dtype = args.conv.dtype;
  const TileSums sums(dtype, workspace + job.pack_bytes(),
                      args.mask.invstd ? tiles_of(job, args) : 0, args.conv.shape.in_channels);
  Status status = Status::ok;
  if (args.conv.shape.batch > 0 && job.packs) status = pack(&job.whole, workspace, place.stream);
  int64_t tile = 0;
  if (status == Status::ok)
    status = job.each_phase([&](const Phase& h, const Phase& w) {
      Chain chain = chain_of(job, args, h, w);
      const ChainPlan plan = plan_of(chain);
      if (plan.tiles == 0) return Status::ok;
      if (args.mask.invstd) sums.give(dtype, tile, &chain);
      tile += plan.tiles;
      return convolve(chain, plan, place.stream);
    });
  if (status != Status::ok || !args.mask.invstd) return status;
  return finish_gradients(dtype, sums, args.mask, place.stream);
}

}  // namespace fused_resnet::cuda
