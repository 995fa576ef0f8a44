// conv_bn_act's kernels make all of it; see conv_dgrad.cuh.
#include "conv_dgrad.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

int64_t workspace_bytes(const ConvDgradArgs& args, const Gpu& gpu) {
  const DgradJob job(args);
  if (!job.fits) return 0;
  int64_t partial = 0;
  if (job.dense()) {
    const Conv c = job.phase(phase_of(args.shape, 0, 0), phase_of(args.shape, 1, 0));
    partial = partial_bytes(c, plan_of(c, gpu, true));
  }
  return job.pack_bytes() + partial;
}

Status conv_dgrad(const ConvDgradArgs& args, const Place& place) {
  DgradJob job(args);
  const ConvShape& s = args.shape;
  if (!job.fits) return Status::unsupported;
  unsigned char* const partial = static_cast<unsigned char*>(place.workspace) + job.pack_bytes();
  if (s.batch == 0) return Status::ok;
  if (job.packs) {
    const Status status = pack(&job.whole, place.workspace, place.stream);
    if (status != Status::ok) return status;
  }
  return job.each_phase([&](const Phase& h, const Phase& w) {
    const Conv c = job.phase(h, w);
    if (c.depth() == 0 && args.added == args.dx) return Status::ok;  // it is there already
    return convolve(c, plan_of(c, place.gpu, job.dense()), partial, place.stream);
  });
}

}  // namespace fused_resnet::cuda
