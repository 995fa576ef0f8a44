// The gradient of a convolution's weight as a matrix product: output channels by kernel positions
// and input channels, summed over output pixels. Blocks that share out the pixels of a tile leave
// their sums in the workspace, which are then added up in order.
#include "pixel_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

// Rows are channels of grad, columns the depth of the convolution.
template <class B>
struct WgradOperands {
  using T = typename B::T;
  using Rows = StagedOperand<B, B::kRows>;
  using Columns = StagedOperand<B, B::kColumns>;
  using Normal = Normalise<T, B::kColumns>;
  const Conv& c;
  const T *grad, *x;  // of the group
  Channel row;
  Depth column;
  Normal normalise;
  Rows rows;
  Columns columns;
  typename B::Sums sums;

  __device__ __forceinline__ WgradOperands(const Conv& c, const T* all_grad, int group,
                                           int first_row, int first_column,
                                           typename Normal::Shared& shared)
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
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot) const {
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
};

template <class B>
__global__ void __launch_bounds__(B::kThreads, B::kAtOnce)
    conv_wgrad_kernel(const __grid_constant__ Conv c, const typename B::T* grad,
                      int64_t split_pixels, typename B::Sums::Sum* sums_of_splits) {
  FR_DYNAMIC_SHARED(memory);
  const int columns = c.depth(), rows = c.group_out_channels();
  const unsigned column_tiles = (columns + B::kColumns - 1) / B::kColumns;
  const unsigned row_tiles = (rows + B::kRows - 1) / B::kRows, tile = blockIdx.x / column_tiles;
  const int first_column = blockIdx.x % column_tiles * B::kColumns;
  const int group = tile / row_tiles, first_row = tile % row_tiles * B::kRows;
  const int64_t first = blockIdx.y * split_pixels, left = c.pixels() - first;
  using Operands = WgradOperands<B>;
  Operands operands(c, grad, group, first_row, first_column,
                    *reinterpret_cast<typename Operands::Normal::Shared*>(memory + B::kBytes));
  sum_over_pixels<B>(c, first, left < split_pixels ? c.pixels() : first + split_pixels, memory,
                     operands);
  auto* const to = sums_of_splits + (int64_t{blockIdx.y} * c.out_channels + group * rows) * columns;
  operands.sums.each([&](int row, int column, const auto& v) {
    row += first_row;
    column += first_column;
#pragma unroll
    for (int k = 0; k < B::Sums::kWidth; ++k)
      if (row < rows && column + k < columns) to[int64_t{row} * columns + column + k] = v.at[k];
  });
}

template <class A>
__global__ void __launch_bounds__(SplitSums<A>::kThreads)
    conv_wgrad_finish_kernel(const A* sums_of_splits, int splits, A* dw, int64_t size) {
  FR_SHARED(SplitSums<A>, sums);
  sums.add(
      size, splits, [&](int split, int64_t i) { return sums_of_splits[split * size + i]; },
      [&](int64_t i, A sum) { dw[i] = sum; });
}

struct Job {
  Conv conv;
  bool fits, wide;
  WgradPlan plan;

  Job(const ConvWgradArgs& args, const Gpu& gpu) {
    fits = describe(args.dtype, args.tf32, args.shape, &conv);
    if (!fits) return;
    conv.act = args.act;
    conv.x = args.x;
    conv.scale = args.scale;
    conv.shift = args.shift;
    const int n = kVectorBytes / conv_element_bytes(args.dtype);
    wide = args.dtype != DType::f64 && vector_aligned(args.x) && vector_aligned(args.grad) &&
           conv.group_channels() % n == 0 && conv.group_out_channels() % n == 0;
    plan = plan_wgrad({args.dtype, conv.math, wide, conv.group_out_channels(), conv.depth(),
                       conv.pixels(), conv.groups},
                      gpu);
  }
  int64_t size() const { return int64_t{conv.out_channels} * conv.depth(); }
};

template <class B>
Status launch_wgrad(const Job& job, const ConvWgradArgs& args, const Place& place) {
  using T = typename B::T;
  using A = Acc<T>;
  const Conv& c = job.conv;
  const int splits = job.plan.splits;
  A* const dw = static_cast<A*>(args.dw);
  A* const sums = splits > 1 ? static_cast<A*>(place.workspace) : dw;
  const int64_t tiles =
      ceil_div(c.group_out_channels(), B::kRows) * ceil_div(c.depth(), B::kColumns) * c.groups;
  if (tiles > INT32_MAX) return Status::unsupported;
  constexpr size_t kShared = B::kBytes + sizeof(typename WgradOperands<B>::Normal::Shared);
  const Status status =
      launch(conv_wgrad_kernel<B>, dim3(static_cast<unsigned>(tiles), splits), B::kThreads, kShared,
             place.stream, c, static_cast<const T*>(args.grad), job.plan.split_pixels, sums);
  if (status != Status::ok || splits == 1) return status;
  return launch(conv_wgrad_finish_kernel<A>, SplitSums<A>::blocks(job.size()),
                SplitSums<A>::kThreads, 0, place.stream, static_cast<const A*>(sums), splits, dw,
                job.size());
}

template <class T, bool wide>
using Small = PixelBlock<T, TensorSums<T, 64, 64, 2, 2>, 64, 64, wide>;
template <class T>
using Large = PixelBlock<T, TensorSums<T, 128, 128, 2, 4>, 128, 128, true>;
template <class T, bool wide>
using Exact = PixelBlock<T, ScalarSums<T, 64, 64, true>, 64, 64, wide>;

template <class T>
Status launch_tensor(const Job& job, const ConvWgradArgs& args, const Place& place) {
  if (!job.wide) return launch_wgrad<Small<T, false>>(job, args, place);
  if constexpr (sizeof(T) == 2) {
    if (job.plan.tile == 1) return launch_wgrad<Large<T>>(job, args, place);
  }
  return launch_wgrad<Small<T, true>>(job, args, place);
}

}  // namespace

int64_t workspace_bytes(const ConvWgradArgs& args, const Gpu& gpu) {
  const Job job(args, gpu);
  const int64_t sum_bytes = args.dtype == DType::f64 ? 8 : 4;
  return job.fits && job.plan.splits > 1 ? job.plan.splits * job.size() * sum_bytes : 0;
}

Status conv_wgrad(const ConvWgradArgs& args, const Place& place) {
  const Job job(args, place.gpu);
  if (!job.fits) return Status::unsupported;
  if (args.dtype == DType::f64) return launch_wgrad<Exact<double, false>>(job, args, place);
  if (job.conv.math == Math::scalar)
    return job.wide ? launch_wgrad<Exact<float, true>>(job, args, place)
                    : launch_wgrad<Exact<float, false>>(job, args, place);
  if (args.dtype == DType::f32) return launch_tensor<float>(job, args, place);
  if (args.dtype == DType::bf16) return launch_tensor<__nv_bfloat16>(job, args, place);
  return launch_tensor<__half>(job, args, place);
}

}  // namespace fused_resnet::cuda
