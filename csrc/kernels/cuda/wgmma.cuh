// What sm_90a has beyond mma.cuh: matrix instructions of a warpgroup, four warps, whose operands
// lie in shared memory; copies of boxes of a matrix to there; and the barriers in shared memory
// that count both threads and bytes. PTX ISA 8.0, chapters wgmma, cp.async.bulk.tensor and
// mbarrier.
//
// A box has 128 bytes of each of its rows. With the swizzle of 128 bytes, a chunk of 16 bytes lies
// where chunk_at says, in a box at a multiple of 1024 bytes: bits 4 to 6 of an address are xored
// with bits 7 to 9. The instructions undo it, on the address itself, so a descriptor may point at
// any 32 bytes of the first row.
//
//   D, 64 x n:  d[i] of thread t of the warpgroup is in row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 *
//   8
//               and column i / 4 * 8 + t % 4 * 2 + i % 2
#pragma once

#include "conv_tile.cuh"
#include "conv_wgmma.h"
#include "launch.h"

#if !defined(FUSED_RESNET_SIMT)
#include <cuda.h>
#endif

namespace fused_resnet::cuda {

constexpr int kWgmmaDepth = 16;  // elements of the depth, 32 bytes, that one instruction multiplies

// How wgmma finds rows of 128 bytes, swizzled, one below the other, of which the first begins at
// `address`: in units of 16 bytes, the address, 1 (not read), 1024 between groups of eight rows,
// and the code of the swizzle.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16, kSwizzle128 = 1;
  return address / 16 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// The same `bytes` further along the rows.
__host__ __device__ constexpr uint64_t further(uint64_t descriptor, int bytes) {
  return descriptor + bytes / 16;
}

#if defined(FUSED_RESNET_SIMT)  // the emulator's header came first, as launch.h says

using simt::mbarrier_arrive;
using simt::mbarrier_expect;
using simt::mbarrier_init;
using simt::mbarrier_wait;
using simt::mbarriers_are_made;
using simt::shared_address;
using simt::wgmma;
using simt::wgmma_commit;
using simt::wgmma_fence;
using simt::wgmma_finish;
using simt::wgmma_wait;

using TensorMap = Matrix;

inline Status encode(const Matrix& matrix, TensorMap* map) {
  *map = matrix;
  return Status::ok;
}

__device__ __forceinline__ void load_box(void* shared, const TensorMap* map, int depth, int row,
                                         uint64_t* barrier) {
  simt::load_box(shared, {map->data, map->rows, map->depth, map->row_stride, map->box_rows}, depth,
                 row, barrier);
}

#else

using TensorMap = CUtensorMap;

// The driver's own function makes the map. It is asked for at run time: a library that were linked
// with the driver's would not load without a GPU.
inline Status encode(const Matrix& m, TensorMap* map) {
  static const auto encode_tiled = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess)
      cudaGetLastError();  // or the next launch would report it
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (!encode_tiled) return Status::launch_failed;
  const CUtensorMapDataType type =
      m.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.depth), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.row_stride) * 2};  // bytes, of rows
  const cuuint32_t box[] = {kRowBytes / 2, static_cast<cuuint32_t>(m.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode_tiled(map, type, 2, const_cast<void*>(m.data), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::ok : Status::launch_failed;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A barrier that `count` arrivals, and the bytes they expect, complete; then it begins again.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After those that one thread makes, before the block's barrier by which others learn of them:
// copies, which reach memory another way than threads do, see them too.
__device__ __forceinline__ void mbarriers_are_made() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and makes the barrier wait for so many bytes of copies.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the barrier to be completed the `round`-th time, from 0; it may not be ahead by more
// than one.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int round) {
  uint32_t completed;
  do {
    asm volatile(
        "{\n"
        ".reg .pred completed;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 completed, [%1], %2;\n"
        "selp.u32 %0, 1, 0, completed;\n"
        "}"
        : "=r"(completed)
        : "r"(shared_address(barrier)), "r"(round & 1)
        : "memory");
  } while (!completed);
}

// Copies a box, from an element and a row of the matrix on, to a multiple of 1024 bytes. The
// barrier counts its bytes, those beyond the matrix included.
__device__ __forceinline__ void load_box(void* shared, const TensorMap* map, int depth, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(depth), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Before the first instruction that adds to sums that threads have written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Makes a group of the instructions since the last.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all but the last `left` groups have read their operands and added to their sums.
template <int left>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// Waits for all of them. The compiler does not know that sums change until then, and might read
// them before.
template <int n>
__device__ __forceinline__ void wgmma_finish(float (&d)[n]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FR_REGISTERS_16(d, i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define FR_NAMES_32                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17," \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FR_NAMES_64                                                                             \
  FR_NAMES_32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49," \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The last four operands: to add to what is there, neither factor negated, neither transposed.
#define FR_WGMMA(columns, type, names, operands, ...)                                 \
  asm volatile(                                                                       \
      "{\n"                                                                           \
      ".reg .pred add;\n"                                                             \
      "setp.eq.u32 add, 0, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names \
      "}, " operands                                                                  \
      ", add, 1, 1, 0, 0;\n"                                                          \
      "}"                                                                             \
      : __VA_ARGS__                                                                   \
      : "l"(a), "l"(b))

// d += A * B^T, 64 rows of A and 64 or 128 of B, which descriptors point at; T is __nv_bfloat16 or
// __half. Operands and sums are in use until a wait.
template <class T>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    FR_WGMMA("64", "f16", FR_NAMES_32, "%32, %33", FR_REGISTERS_16(d, 0), FR_REGISTERS_16(d, 16));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    FR_WGMMA("64", "bf16", FR_NAMES_32, "%32, %33", FR_REGISTERS_16(d, 0), FR_REGISTERS_16(d, 16));
  }
}
template <class T>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    FR_WGMMA("128", "f16", FR_NAMES_64, "%64, %65", FR_REGISTERS_16(d, 0), FR_REGISTERS_16(d, 16),
             FR_REGISTERS_16(d, 32), FR_REGISTERS_16(d, 48));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    FR_WGMMA("128", "bf16", FR_NAMES_64, "%64, %65", FR_REGISTERS_16(d, 0), FR_REGISTERS_16(d, 16),
             FR_REGISTERS_16(d, 32), FR_REGISTERS_16(d, 48));
  }
}

#undef FR_WGMMA
#undef FR_NAMES_64
#undef FR_NAMES_32
#undef FR_REGISTERS_16

#endif

}  // namespace fused_resnet::cuda
