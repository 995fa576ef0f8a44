// The gradient of a convolution's weight as a matrix product: output channels by kernel positions
// and input channels, summed over output pixels. Blocks that share out the pixels of a tile leave
// their sums in the workspace, which are then added up in order.
#pragma once

#include "pixel_sums.cuh"

namespace fused_resnet::cuda {

// Operands<B> bring and multiply the stages of sum_over_pixels: rows are channels of grad, columns
// the depth of the convolution. They have Operands<B>::Given, what they read beside c.x,
// Operands<B>::Shared, memory of the block, and finish(first row), called in the end.
template <class B, template <class> class Operands>
__global__ void __launch_bounds__(B::kThreads, B::kAtOnce)
    conv_wgrad_kernel(const __grid_constant__ Conv c,
                      const __grid_constant__ typename Operands<B>::Given given,
                      int64_t split_pixels, typename B::Sums::Sum* sums_of_splits) {
  FR_DYNAMIC_SHARED(memory);
  const int columns = c.depth(), rows = c.group_out_channels();
  const unsigned column_tiles = (columns + B::kColumns - 1) / B::kColumns;
  const unsigned row_tiles = (rows + B::kRows - 1) / B::kRows, tile = blockIdx.x / column_tiles;
  const int first_column = blockIdx.x % column_tiles * B::kColumns;
  const int group = tile / row_tiles, first_row = tile % row_tiles * B::kRows;
  const int64_t first = blockIdx.y * split_pixels, left = c.pixels() - first;
  Operands<B> operands(c, given, group, first_row, first_column,
                       *reinterpret_cast<typename Operands<B>::Shared*>(memory + B::kBytes));
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
  operands.finish(first_row);
}

template <class Part, class A>
__global__ void __launch_bounds__(SplitSums<Part>::kThreads)
    conv_wgrad_finish_kernel(const Part* sums_of_splits, int splits, A* sums, int64_t size) {
  FR_SHARED(SplitSums<Part>, shares);
  shares.add(
      size, splits, [&](int split, int64_t i) { return sums_of_splits[split * size + i]; },
      [&](int64_t i, Part sum) { sums[i] = static_cast<A>(sum); });
}

// Adds up, in order, what splits have left of `size` values.
template <class Part, class A>
Status add_splits(const Part* sums_of_splits, int splits, A* sums, int64_t size, void* stream) {
  return launch(conv_wgrad_finish_kernel<Part, A>, SplitSums<Part>::blocks(size),
                SplitSums<Part>::kThreads, 0, stream, sums_of_splits, splits, sums, size);
}

struct WgradJob {
  Conv conv;
  bool fits, wide;
  WgradPlan plan;

  // `other` is an image that is read beside args.grad, or null.
  WgradJob(const ConvWgradArgs& args, const void* other, const Gpu& gpu) {
    fits = describe(args.dtype, args.tf32, args.shape, &conv);
    if (!fits) return;
    conv.act = args.act;
    conv.x = args.x;
    conv.scale = args.scale;
    conv.shift = args.shift;
    const int n = kVectorBytes / conv_element_bytes(args.dtype);
    wide = args.dtype != DType::f64 && vector_aligned(args.x) && vector_aligned(args.grad) &&
           vector_aligned(other) && conv.group_channels() % n == 0 &&
           conv.group_out_channels() % n == 0;
    plan = plan_wgrad({args.dtype, conv.math, wide, conv.group_out_channels(), conv.depth(),
                       conv.pixels(), conv.groups},
                      gpu);
  }
  int64_t size() const { return int64_t{conv.out_channels} * conv.depth(); }
  int64_t partial_bytes() const {
    const int64_t sum_bytes = conv.dtype == DType::f64 ? 8 : 4;
    return fits && plan.splits > 1 ? plan.splits * size() * sum_bytes : 0;
  }
};

template <class B, template <class> class Operands>
Status launch_wgrad(const WgradJob& job, const typename Operands<B>::Given& given, void* out,
                    const Place& place) {
  using A = Acc<typename B::T>;
  const Conv& c = job.conv;
  const int splits = job.plan.splits;
  A* const dw = static_cast<A*>(out);
  A* const sums = splits > 1 ? static_cast<A*>(place.workspace) : dw;
  const int64_t tiles =
      ceil_div(c.group_out_channels(), B::kRows) * ceil_div(c.depth(), B::kColumns) * c.groups;
  if (tiles > INT32_MAX) return Status::unsupported;
  constexpr size_t kShared = B::kBytes + sizeof(typename Operands<B>::Shared);
  const Status status =
      launch(conv_wgrad_kernel<B, Operands>, dim3(static_cast<unsigned>(tiles), splits),
             B::kThreads, kShared, place.stream, c, given, job.plan.split_pixels, sums);
  if (status != Status::ok || splits == 1) return status;
  return add_splits<A>(sums, splits, dw, job.size(), place.stream);
}

// Calls f with the block of a job, which is `widened` or not.
template <bool widened, class F>
Status with_block(const WgradJob& job, const F& f) {
  const Conv& c = job.conv;
  return dispatch(c.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      if (c.math == Math::tensor) {
        using Tensor = TensorSums<T, 64, 64, 2, 2>;
        if (!job.wide) return f(PixelBlock<T, Tensor, 64, 64, false, widened>{});
        if constexpr (sizeof(T) == 2) {
          if (job.plan.tile == 1)
            return f(PixelBlock<T, TensorSums<T, 128, 128, 2, 4>, 128, 128, true, widened>{});
        }
        return f(PixelBlock<T, Tensor, 64, 64, true, widened>{});
      }
    }
    if constexpr (sizeof(T) >= 4) {
      using Exact = ScalarSums<T, 64, 64, true>;
      if constexpr (sizeof(T) == 4) {
        if (job.wide) return f(PixelBlock<T, Exact, 64, 64, true, widened>{});
      }
      return f(PixelBlock<T, Exact, 64, 64, false, widened>{});
    }
    return Status::unsupported;
  });
}

}  // namespace fused_resnet::cuda
