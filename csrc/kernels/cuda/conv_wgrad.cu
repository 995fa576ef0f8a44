// The kernels of conv_wgrad.cuh with an input that is normalised on the way.
#include "conv_wgrad.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class B>
struct WgradOperands {
  using T = typename B::T;
  using Rows = StagedOperand<B, B::kRows>;
  using Columns = StagedOperand<B, B::kColumns>;
  using Normal = Normalise<T, B::kColumns>;
  using Given = const T*;  // the gradient
  using Shared = typename Normal::Shared;
  const Conv& c;
  const T *grad, *x;  // of the group
  Channel row;
  Depth column;
  Normal normalise;
  Rows rows;
  Columns columns;
  typename B::Sums sums;

  __device__ __forceinline__ WgradOperands(const Conv& c, const Given& all_grad, int group,
                                           int first_row, int first_column, Shared& shared)
      : c(c),
        grad(all_grad + group * c.group_out_channels()),
        x(static_cast<const T*>(c.x) + group * c.group_channels()),
        row{first_row + Rows::first_value()},
        column(c, first_column + Columns::first_value()),
        normalise(c, first_column, group, shared) {}

  __device__ __forceinline__ void fetch(unsigned char* stage, int slot, const Source* sources,
                                        int64_t first) {
    auto grad_at = [&](int pixel, const Channel& k) -> const T* {
      const bool inside = k.at < c.group_out_channels() && first + pixel < c.pixels();
      return inside ? grad + (first + pixel) * c.out_channels + k.at : nullptr;
    };
    rows.fetch(c, row, stage, slot, grad_at);
    columns.fetch(c, column, stage + B::kRowsBytes, slot, [&](int pixel, const Depth& k) {
      const Source s = sources[pixel];
      return input_at(c, x, s.in, s.h, s.w, k);
    });
  }
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot, int64_t) const {
    if (!normalise.changes()) return;
    const auto normal = normalise.from(Columns::first_value());
    columns.each(stage + B::kRowsBytes, slot, [&](auto& v, const auto& inside, int) {
#pragma unroll
      for (int k = 0; k < Columns::n; ++k)
        v.at[k] = inside(k) ? narrow<T>(normal(v.at[k], k)) : T{};
    });
  }
  __device__ __forceinline__ void multiply(const unsigned char* stage, int) {
    sums.template multiply_by_depth<B::kDepth>(stage, stage + B::kRowsBytes);
  }
  __device__ __forceinline__ void finish(int) const {}
};

}  // namespace

int64_t workspace_bytes(const ConvWgradArgs& args, const Gpu& gpu) {
  return WgradJob(args, nullptr, gpu).partial_bytes();
}

Status conv_wgrad(const ConvWgradArgs& args, const Place& place) {
  const WgradJob job(args, nullptr, place.gpu);
  if (!job.fits) return Status::unsupported;
  return with_block<false>(job, [&](auto block) {
    using B = decltype(block);
    return launch_wgrad<B, WgradOperands>(job, static_cast<const typename B::T*>(args.grad),
                                          args.dw, place);
  });
}

}  // namespace fused_resnet::cuda
