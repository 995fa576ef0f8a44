// Convolution as an implicit matrix product: output pixels by output channels, summed over kernel
// positions and input channels. A block has one tile of it. Stages of both operands are copied
// asynchronously into a ring in shared memory while earlier ones are multiplied; afterwards the
// sums go through the same memory, so that whole rows of channels are scaled and written.
#include "../math.h"
#include "conv_load.cuh"
#include "conv_wgmma.h"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class T_, class Sums_, int rows, int columns, int stages>
struct Block {
  using T = T_;
  using Sums = Sums_;
  static constexpr int kRows = rows, kColumns = columns, kStages = stages;
  static constexpr int kThreads = Sums::kThreads;
  static constexpr int kStageBytes = (rows + columns) * kRowBytes;
  static constexpr int kBytes = stages * kStageBytes + rows * static_cast<int>(sizeof(Pixel));
  static_assert(kBytes <= 99 << 10);  // what a block may have on sm_86 and sm_120
  static_assert(rows * Sums::kPitch * sizeof(typename Sums::Sum) <= stages * kStageBytes);
};

// The scale and shift of `n` adjacent channels.
template <class T, int n>
struct ScaleShift {
  Acc<T> scale[n], shift[n];
  bool shifted;

  __device__ __forceinline__ ScaleShift(const Conv& c, int channel) : shifted(c.shift) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool there = channel + k < c.out_channels;
      scale[k] = c.scale && there ? static_cast<const Acc<T>*>(c.scale)[channel + k] : Acc<T>(1);
      shift[k] = shifted && there ? static_cast<const Acc<T>*>(c.shift)[channel + k] : Acc<T>(0);
    }
  }
  // Without a shift -0 stays what it is.
  __device__ __forceinline__ Acc<T> operator()(Acc<T> sum, int k) const {
    return shifted ? multiply_add(sum, scale[k], shift[k]) : sum * scale[k];
  }
};

template <class T>
__device__ __forceinline__ void write_one(const Conv& c, Acc<T> sum, int64_t at, int channel) {
  Acc<T> value = ScaleShift<T, 1>(c, channel)(sum, 0);
  if (c.residual) value += widen(static_cast<const T*>(c.residual)[at]);
  static_cast<T*>(c.out)[at] = narrow<T>(math::activate(value, c.act));
}

// A tile's sums, 16 bytes of the output at a time.
template <class B, class Sum>
__device__ __forceinline__ void write_vectors(const Conv& c, const Pixel* pixels, int64_t rows,
                                              int channel, int columns, const Sum* sums) {
  using T = typename B::T;
  constexpr int n = kVectorBytes / sizeof(T), kUnits = B::kColumns / n;
  static_assert(B::kThreads % kUnits == 0);  // a thread stays with its channels
  const int column = threadIdx.x % kUnits * n;
  if (column >= columns) return;
  const ScaleShift<T, n> scale_shift(c, channel + column);
  for (int row = threadIdx.x / kUnits; row < B::kRows && row < rows; row += B::kThreads / kUnits) {
    const int64_t at = pixels[row].out + channel + column;
    Acc<T> values[n];
#pragma unroll
    for (int k = 0; k < n; ++k)
      values[k] = scale_shift(sums[row * B::Sums::kPitch + column + k], k);
    if (c.residual) {
      const Vector<T, n> added = load<n>(static_cast<const T*>(c.residual) + at);
#pragma unroll
      for (int k = 0; k < n; ++k) values[k] += widen(added.at[k]);
    }
    Vector<T, n> result;
#pragma unroll
    for (int k = 0; k < n; ++k) result.at[k] = narrow<T>(math::activate(values[k], c.act));
    store_global<n>(static_cast<T*>(c.out) + at, result);
  }
}

// The same one by one; or, of a split, to `partial`, [pixel][channel], as they are.
template <class B, class Sum>
__device__ __forceinline__ void write_elements(const Conv& c, const Pixel* pixels, int64_t rows,
                                               int channel, int columns, const Sum* sums,
                                               Sum* partial) {
  const int column = threadIdx.x % B::kColumns;
  static_assert(B::kThreads % B::kColumns == 0);
  if (column >= columns) return;
  channel += column;
#pragma unroll 1
  for (int row = threadIdx.x / B::kColumns; row < B::kRows && row < rows;
       row += B::kThreads / B::kColumns) {
    const Sum sum = sums[row * B::Sums::kPitch + column];
    if (partial)
      partial[int64_t{row} * c.out_channels + channel] = sum;
    else
      write_one<typename B::T>(c, sum, pixels[row].out + channel, channel);
  }
}

template <class B, bool wide>
__global__ void __launch_bounds__(B::kThreads)
    conv_kernel(const __grid_constant__ Conv c, int split_stages, bool vectors, void* partial) {
  using T = typename B::T;
  using Sum = typename B::Sums::Sum;
  constexpr int kDepth = kRowBytes / sizeof(T);
  FR_DYNAMIC_SHARED(memory);
  Pixel* const pixels = reinterpret_cast<Pixel*>(memory + B::kStages * B::kStageBytes);

  // Blocks that share pixels are launched together.
  const unsigned group_tiles = (c.group_out_channels() + B::kColumns - 1) / B::kColumns;
  const unsigned tiles = group_tiles * c.groups, tile = blockIdx.x % tiles;
  const int64_t first_row = int64_t{blockIdx.x / tiles} * B::kRows;
  const int group = tile / group_tiles, first_column = tile % group_tiles * B::kColumns;
  for (int i = threadIdx.x; i < B::kRows; i += B::kThreads) pixels[i] = pixel_at(c, first_row, i);
  __syncthreads();
  const PixelRows<T, B::kRows, B::kThreads, wide> rows(c, pixels, group);
  const WeightRows<T, B::kColumns, B::kThreads, wide> columns(c, group, first_column);

  const int begin = blockIdx.y * split_stages, stages = (c.depth() + kDepth - 1) / kDepth;
  const int end = begin + split_stages < stages ? begin + split_stages : stages;
  Depth at(c, int64_t{begin} * kDepth + threadIdx.x % kRowChunks * (kDepth / kRowChunks));
  auto fetch = [&](int stage) {
    if (stage < end) {
      unsigned char* const to = memory + (stage - begin) % B::kStages * B::kStageBytes;
      rows.load(c, at, to);
      columns.load(c, at, to + B::kRows * kRowBytes);
      at.advance(c, kDepth);
    }
    cp_async_commit();
  };
  typename B::Sums sums;
  for (int stage = begin; stage < begin + B::kStages - 1; ++stage) fetch(stage);
  for (int stage = begin; stage < end; ++stage) {
    cp_async_wait<B::kStages - 2>();
    __syncthreads();  // the stage has landed, and all have left the one that is overwritten
    fetch(stage + B::kStages - 1);
    const unsigned char* const from = memory + (stage - begin) % B::kStages * B::kStageBytes;
    sums.multiply(from, from + B::kRows * kRowBytes);
  }
  cp_async_wait<0>();
  __syncthreads();
  sums.each([&](int row, int column, const auto& v) {
    store<B::Sums::kWidth>(reinterpret_cast<Sum*>(memory) + row * B::Sums::kPitch + column, v);
  });
  __syncthreads();
  const Sum* const all = reinterpret_cast<const Sum*>(memory);
  const int64_t rows_left = c.pixels() - first_row;
  const int channel = group * c.group_out_channels() + first_column;
  const int columns_left = c.group_out_channels() - first_column;
  if (partial || !vectors) {
    Sum* part = static_cast<Sum*>(partial);
    if (part) part += (blockIdx.y * c.pixels() + first_row) * c.out_channels;
    write_elements<B>(c, pixels, rows_left, channel, columns_left, all, part);
  } else {
    write_vectors<B>(c, pixels, rows_left, channel, columns_left, all);
  }
}

// Adds the parts up, in order.
template <class T>
__global__ void __launch_bounds__(Streaming::kThreads)
    conv_finish_kernel(const __grid_constant__ Conv c, const Acc<T>* partial, int splits) {
  const int64_t size = c.pixels() * c.out_channels, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    Acc<T> sum{};
    for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
    write_one<T>(c, sum, i, static_cast<int>(i % c.out_channels));
  }
}

template <class B, bool wide>
Status launch_conv(const Conv& c, int splits, void* partial, void* stream) {
  using T = typename B::T;
  const int n = kVectorBytes / sizeof(T);
  bool vectors =
      vector_aligned(c.out) && vector_aligned(c.residual) && c.group_out_channels() % n == 0;
  for (int64_t step : c.out_stride) vectors = vectors && step % n == 0;
  const int64_t tiles =
      ceil_div(c.pixels(), B::kRows) * ceil_div(c.group_out_channels(), B::kColumns) * c.groups;
  const int64_t stages = ceil_div(int64_t{c.depth()} * sizeof(T), kRowBytes);
  if (tiles > INT32_MAX) return Status::unsupported;
  const Status status =
      launch(conv_kernel<B, wide>, dim3(static_cast<unsigned>(tiles), splits), B::kThreads,
             B::kBytes, stream, c, static_cast<int>(ceil_div(stages, splits)), vectors, partial);
  if (status != Status::ok || !partial) return status;
  const int64_t blocks = ceil_div(c.pixels() * c.out_channels, Streaming::kThreads);
  return launch(conv_finish_kernel<T>, static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)),
                Streaming::kThreads, 0, stream, c, static_cast<const Acc<T>*>(partial), splits);
}

template <class T>
using Small = Block<T, TensorSums<T, 64, 64, 2, 2>, 64, 64, 3>;
template <class T>
using Tall = Block<T, TensorSums<T, 128, 64, 2, 2>, 128, 64, 3>;
template <class T>
using Large = Block<T, TensorSums<T, 128, 128, 2, 4>, 128, 128, 3>;
template <class T, int rows>
using Exact = Block<T, ScalarSums<T, rows, 64>, rows, 64, 3>;

template <class T>
Status launch_tensor(const Conv& c, bool wide, const ConvPlan& plan, void* partial, void* stream) {
  if (!wide) return launch_conv<Small<T>, false>(c, plan.splits, partial, stream);
  if (plan.tile == 0) return launch_conv<Small<T>, true>(c, plan.splits, partial, stream);
  if (plan.tile == 1) return launch_conv<Tall<T>, true>(c, plan.splits, partial, stream);
  return launch_conv<Large<T>, true>(c, plan.splits, partial, stream);
}

Status launch_scalar(const Conv& c, bool wide, const ConvPlan& plan, void* partial, void* stream) {
  if (c.dtype == DType::f64)
    return launch_conv<Exact<double, 64>, false>(c, plan.splits, partial, stream);
  if (!wide) return launch_conv<Exact<float, 64>, false>(c, plan.splits, partial, stream);
  if (plan.tile == 0) return launch_conv<Exact<float, 64>, true>(c, plan.splits, partial, stream);
  return launch_conv<Exact<float, 128>, true>(c, plan.splits, partial, stream);
}

}  // namespace

Status convolve(const Conv& c, const ConvPlan& plan, void* partial, void* stream) {
  const bool wide = reads_wide(c);
  if (plan.splits == 1) partial = nullptr;
  if (c.math == Math::scalar) return launch_scalar(c, wide, plan, partial, stream);
  if (c.dtype == DType::bf16) return launch_tensor<__nv_bfloat16>(c, wide, plan, partial, stream);
  if (c.dtype == DType::f16) return launch_tensor<__half>(c, wide, plan, partial, stream);
  return launch_tensor<float>(c, wide, plan, partial, stream);
}

namespace {

struct Job {
  Conv conv;
  bool fits, packs;
  ConvPlan plan;

  Job(const ConvBnActArgs& args, const Gpu& gpu) {
    const ConvShape& s = args.shape;
    fits = describe(args.dtype, args.tf32, s, &conv);
    if (!fits) return;
    conv.act = args.act;
    conv.x = args.x;
    conv.scale = args.scale;
    conv.shift = args.shift;
    conv.residual = args.residual;
    conv.out = args.out;
    conv.weight = args.packed ? args.packed : args.weight;
    if (!args.packed) {
      for (int d = 0; d < 4; ++d) conv.weight_stride[d] = args.weight_stride[d];
      conv.group_stride = args.weight_stride[0] * conv.group_out_channels();
    }
    packs = !reads_wide(conv) && packs_wide(conv);
    plan = plan_of(conv, gpu, !args.wgmma);
  }
  int64_t pack_bytes() const { return packs ? packed_bytes(conv) : 0; }
};

}  // namespace

int64_t workspace_bytes(const ConvBnActArgs& args, const Gpu& gpu) {
  const Job job(args, gpu);
  return job.fits ? job.pack_bytes() + partial_bytes(job.conv, job.plan) : 0;
}

Status conv_bn_act(const ConvBnActArgs& args, const Place& place) {
  Job job(args, place.gpu);
  if (!job.fits) return Status::unsupported;
  if (args.wgmma && !wgmma_takes(args.dtype, args.shape, place.gpu)) return Status::unsupported;
  if (job.conv.pixels() == 0) return Status::ok;
  if (args.wgmma) return convolve_wgmma(job.conv, place.gpu, place.stream);
  unsigned char* const workspace = static_cast<unsigned char*>(place.workspace);
  if (job.packs) {
    const Status status = pack(&job.conv, workspace, place.stream);
    if (status != Status::ok) return status;
  }
  return convolve(job.conv, job.plan, workspace + job.pack_bytes(), place.stream);
}

}  // namespace fused_resnet::cuda
