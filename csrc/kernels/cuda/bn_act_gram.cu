// The Gram matrix as a product summed over pixels, of which only the tiles that touch the upper
// triangle are computed. Sums are in fp32 for kGramPixels pixels, in fp64 beyond.
//
// Half types go through matrix instructions. A centered value has more bits than its type unless
// the center is 0: where a tile has another, each value d is split into high = round(d) and
// rest = round(d - high), and all four products are summed: rest * rest is up to 2^-16 of d * d,
// and on the diagonal always positive. high + rest is within 2^-17 of d in bf16, within 2^-23, or
// 2^-25 absolutely, in fp16, where d beyond 65504 is infinite. What is not finite has NaN for a
// rest.
#include "pixel_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

constexpr int kGramTile = 64;

// What a block of a split leaves: [channel][channel] of products and [channel] of sums.
struct GramParts {
  double *products, *sums;
};

// Half of the operands: the channels of a tile's rows, or of its columns.
template <class B>
class GramChannels {
  using T = typename B::T;
  using A = Acc<T>;
  using Normal = Normalise<T, kGramTile>;

 public:
  using Staged = StagedOperand<B, kGramTile>;
  struct Shared {
    typename Normal::Shared normal;
    A center[kGramTile];
  };

  // A barrier has to follow. `off_center` becomes true where a center is not 0.
  __device__ __forceinline__ GramChannels(const Conv& c, const A* center, int first, Shared& shared,
                                          bool& off_center)
      : first_{first + Staged::first_value()},
        normalise_(c, first, 0, shared.normal),
        center_(shared.center + Staged::first_value()) {
    if (threadIdx.x >= kGramTile) return;
    const int channel = first + threadIdx.x;
    const A value = channel < c.channels ? center[channel] : A(0);
    shared.center[threadIdx.x] = value;
    off_center |= value != 0;
  }

  __device__ __forceinline__ void fetch(const Conv& c, unsigned char* operand, int slot,
                                        const Source* sources) {
    staged_.fetch(c, first_, operand, slot, [&](int pixel, const Channel& k) -> const T* {
      const Source s = sources[pixel];
      const bool inside = s.h != kNowhere && k.at < c.channels;
      return inside ? static_cast<const T*>(c.x) + (s.in + k.at) : nullptr;
    });
  }

  // Centers an operand, adds to the thread's sums, and leaves in `rest`, unless it is null, what
  // the type has no bits for.
  __device__ __forceinline__ void arrive(unsigned char* operand, int slot, bool off_center,
                                         unsigned char* rest, Wide<A, Staged::n>& sums) const {
    const auto normal = normalise_.from(Staged::first_value());
    Wide<A, Staged::n> center = {};
    if (off_center) center = load_channels<Staged::n>(center_);
    staged_.each(operand, slot, [&](auto& v, const auto& inside, int place) {
      Vector<T, Staged::n> low;
#pragma unroll
      for (int k = 0; k < Staged::n; ++k) {
        const A z = inside(k) ? normal(v.at[k], k) - center.at[k] : A(0);
        sums.at[k] += z;
        v.at[k] = narrow<T>(z);
        low.at[k] = narrow<T>(z - widen(v.at[k]));
      }
      if (rest) store<Staged::n>(reinterpret_cast<T*>(rest + place), low);
    });
  }

 private:
  Channel first_;
  Normal normalise_;
  const A* center_;
  Staged staged_;
};

template <class B>
class GramOperands {
  using T = typename B::T;
  using A = Acc<T>;
  using Channels = GramChannels<B>;
  using Sums = typename B::Sums;
  static constexpr bool kSplits = sizeof(T) == 2;  // others have all bits
  static constexpr int n = Channels::Staged::n;

 public:
  using Staged = typename Channels::Staged;
  struct Shared {
    typename Channels::Shared rows, columns;
    double totals[n][B::kThreads];  // of a thread's columns, over its pixels
    // What the operands of a stage, and of the one before, have no bits for.
    alignas(kVectorBytes) unsigned char rest[2][kSplits ? B::kStageBytes : kVectorBytes];
  };

  __device__ __forceinline__ GramOperands(const Conv& c, const A* center, int first_row,
                                          int first_column, Shared& shared)
      : c_(c),
        shared_(shared),
        diagonal_(first_row == first_column),
        rows_(c, center, first_row, shared.rows, off_center_),
        columns_(c, center, first_column, shared.columns, off_center_) {
    off_center_ = __syncthreads_or(off_center_);
#pragma unroll
    for (int k = 0; k < n; ++k) shared.totals[k][threadIdx.x] = 0;
  }

  // On the diagonal, columns are rows as well.
  __device__ __forceinline__ void fetch(unsigned char* stage, int slot, const Source* sources,
                                        int64_t) {
    if (!diagonal_) rows_.fetch(c_, stage, slot, sources);
    columns_.fetch(c_, stage + B::kRowsBytes, slot, sources);
  }
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot, int64_t) {
    unsigned char* const rest = splits() ? shared_.rest[slot % 2] : nullptr;
    Wide<A, n> unused = {};
    if (!diagonal_) rows_.arrive(stage, slot, off_center_, rest, unused);
    columns_.arrive(stage + B::kRowsBytes, slot, off_center_, rest ? rest + B::kRowsBytes : nullptr,
                    sums_);
  }
  __device__ __forceinline__ void multiply(const unsigned char* stage, int slot) {
    const unsigned char* const rest = shared_.rest[slot % 2];
    const int rows = diagonal_ ? B::kRowsBytes : 0;
#pragma unroll 1
    for (int part = 0; part < (splits() ? 4 : 1); ++part)
      chain_.template multiply_by_depth<B::kDepth>((part & 1 ? rest : stage) + rows,
                                                   (part & 2 ? rest : stage) + B::kRowsBytes);
    if (++stages_ == kGramPixels / B::kDepth) end_chain();
  }

  __device__ __forceinline__ void end_chain() {
    stages_ = 0;
    int i = 0;
    chain_.each([&](int, int, const auto& v) {
#pragma unroll
      for (int k = 0; k < Sums::kWidth; ++k) products_[i++] += v.at[k];
    });
    chain_ = {};
#pragma unroll
    for (int k = 0; k < n; ++k) shared_.totals[k][threadIdx.x] += sums_.at[k];
    sums_ = {};
  }
  // f(row, column, product) of those that the thread has.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    int i = 0;
    chain_.each([&](int row, int column, const auto&) {
#pragma unroll
      for (int k = 0; k < Sums::kWidth; ++k) f(row, column + k, products_[i++]);
    });
  }
  // The sum over all pixels of a column, where all threads have passed a barrier.
  __device__ __forceinline__ double total(int column) const {
    return Staged::total(shared_.totals, column);
  }

 private:
  __device__ __forceinline__ bool splits() const { return kSplits && off_center_; }

  const Conv& c_;
  Shared& shared_;
  bool diagonal_, off_center_ = false;
  Channels rows_, columns_;
  int stages_ = 0;  // of the chains
  Sums chain_;
  Wide<A, n> sums_ = {};
  double products_[kGramTile * kGramTile / B::kThreads] = {};
};

template <class B>
__global__ void __launch_bounds__(B::kThreads, B::kAtOnce)
    bn_act_gram_kernel(const __grid_constant__ Conv c, const Acc<typename B::T>* center,
                       int64_t split_pixels, GramParts parts) {
  using Operands = GramOperands<B>;
  FR_DYNAMIC_SHARED(memory);
  const unsigned tiles = (c.channels + kGramTile - 1) / kGramTile;
  const int first_row = blockIdx.x / tiles * kGramTile;
  const int first_column = blockIdx.x % tiles * kGramTile;
  if (first_column < first_row) return;
  const int64_t first = blockIdx.y * split_pixels, left = c.pixels() - first;
  Operands operands(c, center, first_row, first_column,
                    *reinterpret_cast<typename Operands::Shared*>(memory + B::kBytes));
  sum_over_pixels<B>(c, first, left < split_pixels ? c.pixels() : first + split_pixels, memory,
                     operands);
  operands.end_chain();
  double* const products = parts.products + int64_t{blockIdx.y} * c.channels * c.channels;
  operands.each([&](int row, int column, double product) {
    row += first_row;
    column += first_column;
    if (row < c.channels && column < c.channels)
      products[int64_t{row} * c.channels + column] = product;
  });
  if (first_row != first_column) return;
  __syncthreads();  // the totals of all
  const int column = threadIdx.x, channel = first_column + column;
  if (column < kGramTile && channel < c.channels)
    parts.sums[int64_t{blockIdx.y} * c.channels + channel] = operands.total(column);
}

// Adds the splits up and mirrors the triangle.
__global__ void __launch_bounds__(SplitSums<double>::kThreads)
    bn_act_gram_finish_kernel(GramParts parts, int splits, int64_t channels, double* gram,
                              double* total) {
  FR_SHARED(SplitSums<double>, sums);
  const int64_t size = channels * channels;
  sums.add(
      size + channels, splits,
      [&](int split, int64_t i) {
        if (i >= size) return parts.sums[split * channels + i - size];
        return i / channels <= i % channels ? parts.products[split * size + i] : 0.0;
      },
      [&](int64_t i, double sum) {
        const int64_t row = i / channels, column = i % channels;
        if (row == channels) {
          total[column] = sum;
        } else if (row <= column) {
          gram[i] = sum;
          gram[column * channels + row] = sum;
        }
      });
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

// Matrix instructions would round what is not of a half type.
template <class T>
using GramSums = std::conditional_t<sizeof(T) == 2, TensorSums<T, kGramTile, kGramTile, 2, 4>,
                                    ScalarSums<T, kGramTile, kGramTile, true>>;

template <class T, bool wide>
Status launch_gram(const Job& job, const BnActGramArgs& args, const Place& place) {
  using B = PixelBlock<T, GramSums<T>, kGramTile, kGramTile, wide>;
  const int64_t channels = args.channels, tiles = ceil_div(channels, kGramTile);
  double* const products = static_cast<double*>(place.workspace);
  const GramParts parts{products, products + job.plan.splits * channels * channels};
  constexpr size_t kShared = B::kBytes + sizeof(typename GramOperands<B>::Shared);
  Status status =
      launch(bn_act_gram_kernel<B>, dim3(static_cast<unsigned>(tiles * tiles), job.plan.splits),
             B::kThreads, kShared, place.stream, job.conv, static_cast<const Acc<T>*>(args.center),
             job.plan.split_pixels, parts);
  if (status != Status::ok) return status;
  return launch(bn_act_gram_finish_kernel, SplitSums<double>::blocks(channels * (channels + 1)),
                SplitSums<double>::kThreads, 0, place.stream, parts, job.plan.splits, channels,
                static_cast<double*>(args.gram), static_cast<double*>(args.sum));
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
