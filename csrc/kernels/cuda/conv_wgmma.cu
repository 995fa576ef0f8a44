// The matrix product that a plain 1x1 convolution is, by the matrix instructions of Hopper: pixels
// by output channels, summed over input channels. This file alone is compiled for sm_90a. In a
// block one thread has the stages of both operands copied into a ring in shared memory; two
// warpgroups multiply them, 64 pixels each, and release them by a barrier. Afterwards the sums go
// through the same memory, so that whole rows of channels are scaled and written. No GPU has run it
// yet: it is taken where it is asked for, and nowhere else.
#include "../math.h"
#include "scale_shift.cuh"
#include "wgmma.cuh"

namespace fused_resnet::cuda {

namespace {

constexpr int kWarp = 32, kWarpgroup = 4 * kWarp;
constexpr int kMultiplying = kWgmmaGroups * kWarpgroup;  // threads; a warp that copies comes after
constexpr int kMostShared = 227 << 10;                   // of a block, and, with what
constexpr int kAllShared = 228 << 10, kReserved = 1 << 10;  // each has reserved, of all

template <class T_, int tile>
struct Block {
  using T = T_;
  static constexpr WgmmaTile kTile = kWgmmaTiles[tile];
  static constexpr int kColumns = kTile.columns, kStages = kTile.stages;
  static constexpr int kStageBytes = kTile.stage_bytes(), kRingBytes = kTile.ring_bytes();
  static constexpr int kThreads = kMultiplying + kWarp, kBlocks = 2;  // of a multiprocessor
  static constexpr int kPitch = kColumns + 8;  // of rows to store to: a half warp uses all banks
  static constexpr int kSums = kColumns / 2;   // that a thread has
  static_assert(kBlocks * (kTile.shared_bytes() + kReserved) <= kAllShared);
  static_assert(kTile.shared_bytes() <= kMostShared);
  static_assert(kWgmmaRows * kPitch * sizeof(float) <= kRingBytes);
};

// A ring of stages, each with its rows of pixels and of output channels.
template <class B>
struct Ring {
  unsigned char* memory;
  uint64_t *full, *empty;  // barriers

  __device__ __forceinline__ explicit Ring(unsigned char* any)
      : memory(any + (0u - shared_address(any)) % kWgmmaAlignment),
        full(reinterpret_cast<uint64_t*>(memory + B::kRingBytes)),
        empty(full + B::kStages) {}

  __device__ __forceinline__ unsigned char* pixels(int stage) const {
    return memory + stage % B::kStages * B::kStageBytes;
  }
  __device__ __forceinline__ unsigned char* channels(int stage) const {
    return pixels(stage) + kWgmmaRows * kRowBytes;
  }
};

template <class B>
__device__ __forceinline__ void copy_stages(const Ring<B>& ring, int stages, const TensorMap* x,
                                            const TensorMap* weight, int row, int column) {
  constexpr int kElements = kRowBytes / sizeof(typename B::T);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const int slot = stage % B::kStages, round = stage / B::kStages;
    if (round > 0) mbarrier_wait(ring.empty + slot, round - 1);
    mbarrier_expect(ring.full + slot, B::kStageBytes);
    load_box(ring.pixels(stage), x, stage * kElements, row, ring.full + slot);
    load_box(ring.channels(stage), weight, stage * kElements, column, ring.full + slot);
  }
}

template <class B>
__device__ __forceinline__ void multiply_stages(const Ring<B>& ring, int stages, int first_row,
                                                float (&sums)[B::kSums]) {
  constexpr int kBytes = kWgmmaDepth * sizeof(typename B::T);
  // Each warp reads for itself, so each releases.
  auto release = [&](int stage) {
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.empty + stage % B::kStages);
  };
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    mbarrier_wait(ring.full + stage % B::kStages, stage / B::kStages);
    const uint64_t pixels =
        matrix_descriptor(shared_address(ring.pixels(stage) + first_row * kRowBytes));
    const uint64_t channels = matrix_descriptor(shared_address(ring.channels(stage)));
    wgmma_fence();
#pragma unroll
    for (int at = 0; at < kRowBytes; at += kBytes)
      wgmma<typename B::T>(sums, further(pixels, at), further(channels, at));
    wgmma_commit();
    wgmma_wait<1>();
    if (stage > 0) release(stage - 1);
  }
  wgmma_finish(sums);
}

// A warpgroup's sums, to rows of kPitch; see wgmma.cuh.
template <class B>
__device__ __forceinline__ void store_sums(float* rows, int first_row,
                                           const float (&sums)[B::kSums]) {
  const int lane = threadIdx.x % kWarp;
  first_row += threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < B::kSums; i += 2)
    store<2>(rows + (first_row + i / 2 % 2 * 8) * B::kPitch + i / 4 * 8 + lane % 4 * 2,
             Vector<float, 2>{{sums[i], sums[i + 1]}});
}

// 16 bytes of the output at a time.
template <class B>
__device__ __forceinline__ void write_rows(const Conv& c, const float* rows, int first_row,
                                           int channel) {
  using T = typename B::T;
  constexpr int n = kVectorBytes / sizeof(T), kUnits = B::kColumns / n;
  const int column = threadIdx.x % kUnits * n;
  channel += column;
  if (channel >= c.out_channels) return;
  const ScaleShift<T, n> scale_shift(c, channel);
  const int64_t left = c.pixels() - first_row;
#pragma unroll 2
  for (int row = threadIdx.x / kUnits; row < kWgmmaRows && row < left;
       row += kMultiplying / kUnits) {
    const int64_t at = (int64_t{first_row} + row) * c.out_channels + channel;
    const Wide<float, n> sums = load_channels<n>(rows + row * B::kPitch + column);
    Wide<float, n> values = each<n>([&](int k) { return scale_shift(sums.at[k], k); });
    if (c.residual) {
      const Wide<float, n> added = load_wide<n>(static_cast<const T*>(c.residual) + at);
      values = each<n>([&](int k) { return values.at[k] + added.at[k]; });
    }
    Vector<T, n> result;
#pragma unroll
    for (int k = 0; k < n; ++k) result.at[k] = narrow<T>(math::activate(values.at[k], c.act));
    store_global<n>(static_cast<T*>(c.out) + at, result);
  }
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, B::kBlocks)
    wgmma_kernel(const __grid_constant__ Conv c, const __grid_constant__ TensorMap x,
                 const __grid_constant__ TensorMap weight) {
  FR_DYNAMIC_SHARED(memory);
  const Ring<B> ring(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < B::kStages; ++slot) {
      mbarrier_init(ring.full + slot, 1);
      mbarrier_init(ring.empty + slot, kMultiplying / kWarp);
    }
    mbarriers_are_made();
  }
  __syncthreads();

  // Blocks that share pixels are launched together.
  const unsigned tiles = (c.out_channels + B::kColumns - 1) / B::kColumns;
  const int row = blockIdx.x / tiles * kWgmmaRows, column = blockIdx.x % tiles * B::kColumns;
  constexpr int kElements = kRowBytes / sizeof(typename B::T);
  const int stages = (c.channels + kElements - 1) / kElements;
  const int group_row = threadIdx.x / kWarpgroup * kWgmmaGroupRows;
  const bool multiplies = threadIdx.x < kMultiplying;
  float sums[B::kSums] = {};
  if (multiplies) {
    multiply_stages<B>(ring, stages, group_row, sums);
  } else {
    if (threadIdx.x == kMultiplying) copy_stages<B>(ring, stages, &x, &weight, row, column);
    __syncwarp();
  }
  __syncthreads();  // nobody reads the ring any more
  float* const rows = reinterpret_cast<float*>(ring.memory);
  if (multiplies) store_sums<B>(rows, group_row, sums);
  __syncthreads();
  if (multiplies) write_rows<B>(c, rows, row, column);
}

template <class B>
Status launch_wgmma(const Conv& c, void* stream) {
  const Matrix pixels{c.dtype, c.x, c.pixels(), c.channels, c.channels, kWgmmaRows};
  const Matrix channels{c.dtype,    c.weight,           c.out_channels,
                        c.channels, c.weight_stride[0], B::kColumns};
  TensorMap x, weight;
  for (const auto& [matrix, map] : {std::pair{&pixels, &x}, std::pair{&channels, &weight}})
    if (const Status status = encode(*matrix, map); status != Status::ok) return status;
  const int64_t blocks = wgmma_blocks(B::kTile, c.pixels(), c.out_channels);
  if (blocks > INT32_MAX) return Status::unsupported;
  return launch(wgmma_kernel<B>, static_cast<unsigned>(blocks), B::kThreads,
                B::kTile.shared_bytes(), stream, c, x, weight);
}

template <class T>
Status launch_tile(const Conv& c, int tile, void* stream) {
  return tile == 0 ? launch_wgmma<Block<T, 0>>(c, stream) : launch_wgmma<Block<T, 1>>(c, stream);
}

}  // namespace

Status convolve_wgmma(const Conv& c, const Gpu& gpu, void* stream) {
  if (!reads_wide(c) || c.weight_stride[0] < c.channels || !vector_aligned(c.out) ||
      !vector_aligned(c.residual))
    return Status::unsupported;
  const int tile = plan_wgmma(c.pixels(), c.out_channels, gpu);
  return c.dtype == DType::bf16 ? launch_tile<__nv_bfloat16>(c, tile, stream)
                                : launch_tile<__half>(c, tile, stream);
}

}  // namespace fused_resnet::cuda
