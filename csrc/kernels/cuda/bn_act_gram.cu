// The Gram matrix as a product summed over pixels, of which only the tiles that touch the upper
// triangle are computed. Sums are of single products, in fp32 for kGramPixels pixels and in fp64
// beyond: by matrix instructions the operands, which are differences, would have to be rounded.
#include "pixel_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

constexpr int kGramTile = 64;

// What a block of a split leaves: [channel][channel] of products and [channel] of sums.
struct GramParts {
  double *products, *sums;
};

template <class B>
struct GramOperands {
  using T = typename B::T;
  using A = Acc<T>;
  using Channels = StagedOperand<B, kGramTile>;
  static constexpr int n = Channels::n;

  // One of the two operands: some channels, normalised and centered.
  struct Side {
    Depth first;
    Normalise<T> normalise;
    const A* center;  // read where it lies: registers are short
    Channels values;

    __device__ __forceinline__ Side(const Conv& c, const A* all_centers, int channel)
        : first(c, channel + Channels::first_value()),
          normalise(c, first, 0),
          center(all_centers + first.channel) {}
    __device__ __forceinline__ void fetch(const Conv& c, const Pixel* pixels) {
      values.fetch(c, first, [&](int pixel, const Depth& k) {
        const Pixel& p = pixels[pixel];
        return input_at(c, static_cast<const T*>(c.x), p.in, p.h, p.w, k);
      });
    }
  };

  const Conv& c;
  Side rows, columns;
  A sums[n] = {};  // of the columns, over the thread's pixels

  __device__ __forceinline__ GramOperands(const Conv& c, const A* center, int row, int column)
      : c(c), rows(c, center, row), columns(c, center, column) {}

  __device__ __forceinline__ void fetch(const Pixel* pixels, int64_t) {
    rows.fetch(c, pixels);
    columns.fetch(c, pixels);
  }
  __device__ __forceinline__ void put(unsigned char* to_rows, unsigned char* to_columns) {
    rows.values.put(to_rows, [&](T x, int k) { return rows.normalise(x, k) - rows.center[k]; });
    columns.values.put(to_columns, [&](T x, int k) {
      const A z = columns.normalise(x, k) - columns.center[k];
      sums[k] += z;
      return z;
    });
  }
};

template <class B>
__global__ void __launch_bounds__(B::kThreads)
    bn_act_gram_kernel(const __grid_constant__ Conv c, const Acc<typename B::T>* center,
                       int64_t split_pixels, GramParts parts) {
  using Operands = GramOperands<B>;
  using Channels = typename Operands::Channels;
  FR_DYNAMIC_SHARED(memory);
  const unsigned tiles = (c.channels + kGramTile - 1) / kGramTile;
  const int first_row = blockIdx.x / tiles * kGramTile;
  const int first_column = blockIdx.x % tiles * kGramTile;
  if (first_column < first_row) return;
  const int64_t begin = blockIdx.y * split_pixels;
  const int64_t end = c.pixels() - begin < split_pixels ? c.pixels() : begin + split_pixels;
  double* const products = parts.products + int64_t{blockIdx.y} * c.channels * c.channels;
  Operands operands(c, center, first_row, first_column);
  double sums[Operands::n] = {};
  for (int64_t first = begin; first == begin || first < end; first += kGramPixels) {
    typename B::Sums chain;
    sum_over_pixels<B>(c, first, end - first < kGramPixels ? end : first + kGramPixels, memory,
                       operands, chain);
    chain.each([&](int row, int column, const auto& v) {
      row += first_row;
      column += first_column;
#pragma unroll
      for (int k = 0; k < B::Sums::kWidth; ++k) {
        if (row >= c.channels || column + k >= c.channels) continue;
        double& to = products[int64_t{row} * c.channels + column + k];
        to = first == begin ? v.at[k] : to + v.at[k];
      }
    });
#pragma unroll
    for (int k = 0; k < Operands::n; ++k) {
      sums[k] += operands.sums[k];
      operands.sums[k] = 0;
    }
  }
  if (first_row != first_column) return;
  // The sums of threads that have the same channels, in order.
  double* const shared = reinterpret_cast<double*>(memory);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Operands::n; ++k)
    shared[Channels::first_pixel() * kGramTile + Channels::first_value() + k] = sums[k];
  __syncthreads();
  const int channel = first_column + threadIdx.x;
  if (threadIdx.x >= kGramTile || channel >= c.channels) return;
  double sum = 0;
  for (int i = 0; i < Channels::kApart; ++i) sum += shared[i * kGramTile + threadIdx.x];
  parts.sums[int64_t{blockIdx.y} * c.channels + channel] = sum;
}

// Adds the splits up, in order, and mirrors the triangle.
__global__ void __launch_bounds__(Streaming::kThreads)
    bn_act_gram_finish_kernel(GramParts parts, int splits, int64_t channels, double* gram,
                              double* total) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = channels * channels;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size + channels; i += step) {
    const int64_t row = i / channels, column = i % channels;
    const bool below = column / kGramTile < row / kGramTile;
    const int64_t at = below ? column * channels + row : i;
    double sum = 0;
    for (int split = 0; split < splits; ++split)
      sum += i < size ? parts.products[split * size + at] : parts.sums[split * channels + column];
    (i < size ? gram[i] : total[column]) = sum;
  }
}

struct Job {
  Conv conv;
  bool fits, wide;
  WgradPlan plan;

  Job(const BnActGramArgs& args, const Gpu& gpu) {
    const int64_t out_height = ceil_div(args.height, args.stride);
    const int64_t out_width = ceil_div(args.width, args.stride);
    const ConvShape s{args.batch,
                      args.height,
                      args.width,
                      args.channels,
                      out_height,
                      out_width,
                      1,
                      {1, 1},
                      {args.stride, args.stride},
                      {0, 0},
                      {1, 1},
                      1};
    fits = describe(args.dtype, false, s, &conv);
    if (!fits) return;
    conv.act = args.act;
    conv.x = args.x;
    conv.scale = args.scale;
    conv.shift = args.shift;
    wide = args.dtype != DType::f64 && vector_aligned(args.x) &&
           args.channels % (kVectorBytes / conv_element_bytes(args.dtype)) == 0;
    plan = plan_gram(args.channels, conv.pixels(), gpu);
  }
  int64_t elements() const { return plan.splits * int64_t{conv.channels} * (conv.channels + 1); }
};

template <class T, bool wide>
Status launch_gram(const Job& job, const BnActGramArgs& args, const Place& place) {
  using B =
      PixelBlock<T, ScalarSums<Acc<T>, kGramTile, kGramTile, true>, kGramTile, kGramTile, wide>;
  static_assert(B::kBytes >= StagedOperand<B, kGramTile>::kApart * kGramTile * sizeof(double));
  const int64_t channels = args.channels, tiles = ceil_div(channels, kGramTile);
  double* const products = static_cast<double*>(place.workspace);
  const GramParts parts{products, products + job.plan.splits * channels * channels};
  Status status =
      launch(bn_act_gram_kernel<B>, dim3(static_cast<unsigned>(tiles * tiles), job.plan.splits),
             B::kThreads, B::kBytes, place.stream, job.conv,
             static_cast<const Acc<T>*>(args.center), job.plan.split_pixels, parts);
  if (status != Status::ok) return status;
  const int64_t blocks = ceil_div(channels * (channels + 1), Streaming::kThreads);
  return launch(bn_act_gram_finish_kernel,
                static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 12)), Streaming::kThreads, 0,
                place.stream, parts, job.plan.splits, channels, static_cast<double*>(args.gram),
                static_cast<double*>(args.sum));
}

}  // namespace

int64_t workspace_bytes(const BnActGramArgs& args, const Gpu& gpu) {
  const Job job(args, gpu);
  return job.fits ? job.elements() * static_cast<int64_t>(sizeof(double)) : 0;
}

Status bn_act_gram(const BnActGramArgs& args, const Place& place) {
  const Job job(args, place.gpu);
  if (!job.fits) return Status::unsupported;
  if (args.channels == 0) return Status::ok;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      if (job.wide) return launch_gram<T, true>(job, args, place);
    }
    return launch_gram<T, false>(job, args, place);
  });
}

}  // namespace fused_resnet::cuda
