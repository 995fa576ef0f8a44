// The kernels of conv_wgrad.cuh of a gradient that is masked on the way. The blocks that have the
// first columns store what passes, and leave its sums by channel.
#include "conv_wgrad_chain.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class B>
class MaskedWgradOperands : public ChainWgradOperands<B> {
  using Base = ChainWgradOperands<B>;
  using T = typename B::T;
  using A = Acc<T>;
  using Rows = typename Base::Rows;
  static constexpr int n = Rows::n;
  static_assert(B::kRows <= B::kThreads);

 public:
  // rows.other is what the relu has made.
  struct Given : Base::Given {
    T* passed;
    double* sums;  // [split][channel]
  };
  struct Shared : Base::Shared {
    A totals[n][B::kThreads];
  };

  __device__ __forceinline__ MaskedWgradOperands(const Conv& c, const Given& given, int group,
                                                 int first_row, int first_column, Shared& shared)
      : Base(c, given, group, first_row, first_column, shared),
        passed_(given.passed),
        sums_(given.sums),
        stores_(first_column == 0),
        totals_(shared.totals) {
#pragma unroll
    for (int k = 0; k < n; ++k) totals_[k][threadIdx.x] = 0;
  }

  // Where nothing was fetched there are zeros, of which nothing passes.
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot, int64_t first) const {
    this->rows.each(stage, slot, [&](auto& v, const auto& inside, int place) {
      const Vector<T, n> made =
          load<n>(reinterpret_cast<const T*>(stage + B::kOperandBytes + place));
#pragma unroll
      for (int k = 0; k < n; ++k)
        v.at[k] = narrow<T>(math::relu_backward(widen(made.at[k]), widen(v.at[k])));
      if (!stores_) return;
      const int pixel = place / (B::kRows * static_cast<int>(sizeof(T)));
      T* const to = passed_ + (first + pixel) * this->c.out_channels + this->row.at;
      if constexpr (B::kWide) {
        if (inside(0)) store_global<n>(to, v);
      } else {
#pragma unroll
        for (int k = 0; k < n; ++k)
          if (inside(k)) to[k] = v.at[k];
      }
#pragma unroll
      for (int k = 0; k < n; ++k) totals_[k][threadIdx.x] += widen(v.at[k]);
    });
    this->arrive_columns(stage, slot);
  }
  __device__ __forceinline__ void finish(int first_row) const {
    if (!stores_) return;
    __syncthreads();  // the totals of all
    const int row = threadIdx.x, channels = this->c.out_channels;
    if (row < B::kRows && first_row + row < channels)
      sums_[int64_t{blockIdx.y} * channels + first_row + row] = Rows::total(totals_, row);
  }

 private:
  T* const passed_;
  double* const sums_;
  const bool stores_;
  A (&totals_)[n][B::kThreads];
};

struct Job : WgradJob {
  Job(const ReluBackwardConvWgradArgs& args, const Gpu& gpu) : WgradJob(args.conv, args.out, gpu) {
    wide = wide && vector_aligned(args.g);
  }
  int64_t sums() const { return int64_t{plan.splits} * conv.out_channels; }
};

}  // namespace

int64_t workspace_bytes(const ReluBackwardConvWgradArgs& args, const Gpu& gpu) {
  const Job job(args, gpu);
  return job.fits ? job.sums() * static_cast<int64_t>(sizeof(double)) + job.partial_bytes() : 0;
}

Status relu_backward_conv_wgrad(const ReluBackwardConvWgradArgs& args, const Place& place) {
  const Job job(args, place.gpu);
  if (!job.fits) return Status::unsupported;
  double* const sums = static_cast<double*>(place.workspace);
  return with_block<true>(job, [&](auto block) {
    using B = decltype(block);
    using T = typename B::T;
    typename MaskedWgradOperands<B>::Given given{};
    given.grad = static_cast<const T*>(args.conv.grad);
    given.rows.other = args.out;
    given.columns = {args.conv.act, args.conv.scale, args.conv.shift,
                     nullptr,       nullptr,         args.center};
    given.passed = static_cast<T*>(args.g);
    given.sums = sums;
    const Status status = launch_wgrad<B, MaskedWgradOperands>(
        job, given, args.conv.dw, {place.stream, place.gpu, sums + job.sums()});
    if (status != Status::ok) return status;
    return add_splits(static_cast<const double*>(sums), job.plan.splits,
                      static_cast<Acc<T>*>(args.sum_g), int64_t{job.conv.out_channels},
                      place.stream);
  });
}

}  // namespace fused_resnet::cuda
