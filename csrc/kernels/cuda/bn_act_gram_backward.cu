// Two products in one tile by the convolution of chains: a 1x1 convolution of grad, and one of the
// normalised, centered x.
#include "tile_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

// The 1x1 convolution of every stride-th pixel of an image of so many channels to dx; the matrix it
// is multiplied by is [channels, dx's channels].
bool describe(const BnActGramBackwardArgs& args, int64_t channels, int64_t stride_of_x,
              const void* x, const void* matrix, const int64_t (&stride)[2], Conv* c) {
  const int64_t height = ceil_div(args.height, args.stride);
  const int64_t width = ceil_div(args.width, args.stride);
  const bool whole = stride_of_x > 1;
  const ConvShape s{args.batch,
                    whole ? args.height : height,
                    whole ? args.width : width,
                    channels,
                    height,
                    width,
                    args.channels,
                    {1, 1},
                    {stride_of_x, stride_of_x},
                    {0, 0},
                    {1, 1},
                    1};
  if (!describe(args.dtype, args.tf32, s, c)) return false;
  c->x = x;
  c->weight = matrix;
  c->weight_stride[0] = stride[1];
  c->weight_stride[1] = stride[0];
  c->out = args.dx;
  return true;
}

struct Job {
  Chain chain{};
  bool fits;
  ChainPlan plan;

  explicit Job(const BnActGramBackwardArgs& args) {
    chain.count = 2;
    chain.products[1].in = args.in;
    Conv& c = chain.products[0].conv;
    fits = describe(args, args.rows, 1, args.grad, args.weight, args.weight_stride, &c) &&
           describe(args, args.channels, args.stride, args.x, args.matrix, args.matrix_stride,
                    &chain.products[1].conv);
    if (!fits) return;
    c.shift = args.offset;
    c.residual = args.added;
    chain.set_mask(args.mask, 0);
    plan = plan_of(chain);
  }
};

}  // namespace

int64_t workspace_bytes(const BnActGramBackwardArgs& args, const Gpu&) {
  const Job job(args);
  if (!job.fits) return 0;
  const int64_t tiles = args.mask.invstd ? job.plan.tiles : 0;
  return packed_bytes(job.chain) + TileSums::bytes(args.dtype, tiles, args.channels);
}

Status bn_act_gram_backward(const BnActGramBackwardArgs& args, const Place& place) {
  Job job(args);
  if (!job.fits) return Status::unsupported;
  unsigned char* const workspace = static_cast<unsigned char*>(place.workspace);
  const TileSums sums(args.dtype, workspace + packed_bytes(job.chain),
                      args.mask.invstd ? job.plan.tiles : 0, args.channels);
  if (job.plan.tiles > 0) {
    if (args.mask.invstd) sums.give(args.dtype, 0, &job.chain);
    Status status = pack(&job.chain, workspace, place.stream);
    if (status == Status::ok) status = convolve(job.chain, job.plan, place.stream);
    if (status != Status::ok) return status;
  }
  if (!args.mask.invstd) return Status::ok;
  return finish_gradients(args.dtype, sums, args.mask, place.stream);
}

}  // namespace fused_resnet::cuda
