// The kernels of conv_wgrad.cuh with both operands normalised on the way.
#include "conv_wgrad_chain.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

int64_t workspace_bytes(const BnBackwardConvWgradArgs& args, const Gpu& gpu) {
  return WgradJob(args.conv, args.in.other, gpu).partial_bytes();
}

Status bn_backward_conv_wgrad(const BnBackwardConvWgradArgs& args, const Place& place) {
  const WgradJob job(args.conv, args.in.other, place.gpu);
  if (!job.fits) return Status::unsupported;
  return with_block<true>(job, [&](auto block) {
    using B = decltype(block);
    using Given = typename ChainWgradOperands<B>::Given;
    const Prologue columns{args.conv.act, args.conv.scale, args.conv.shift,
                           nullptr,       nullptr,         args.center};
    return launch_wgrad<B, ChainWgradOperands>(
        job, Given{static_cast<const typename B::T*>(args.conv.grad), args.in, columns},
        args.conv.dw, place);
  });
}

}  // namespace fused_resnet::cuda
