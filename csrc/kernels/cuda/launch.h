// How kernels are launched and how many blocks they get. Compiled without nvcc, the launch goes to
// the CPU emulator in tests/simt, whose header the command line includes first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../api.h"

namespace fused_resnet::cuda {

// Launch sizes of kernels that stream through memory once. Each thread owns 32 bytes of every
// operand, two full vectors, so that loads overlap; a block's threads lie next to each other within
// each vector.
struct Streaming {
  static constexpr int kThreads = 256;
  static constexpr int kThreadBytes = 32;
  static constexpr int kMinBlocksPerMultiprocessor = 4;  // resident; holds a thread to 64 registers
  static constexpr int kMaxBlocksPerMultiprocessor = 16;  // launched; beyond it blocks loop

  template <class T>
  static constexpr int64_t kTile =
      kThreads * kThreadBytes / sizeof(T);  // elements a block takes at once
};

// Blocks for a grid-stride loop over `count` elements of type T.
template <class T>
constexpr int64_t streaming_blocks(int64_t count, const Gpu& gpu) {
  const int64_t tiles = (count + Streaming::kTile<T> - 1) / Streaming::kTile<T>;
  return std::min(tiles, int64_t{gpu.multiprocessors} * Streaming::kMaxBlocksPerMultiprocessor);
}

inline Status status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return Status::ok;
    case cudaErrorMemoryAllocation:
      return Status::out_of_memory;
    default:
      return Status::launch_failed;
  }
}

template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
              const Args&... args) {
#if defined(FUSED_RESNET_SIMT)
  simt::launch(grid, block, shared_bytes, stream, [&] { kernel(args...); });
#else
  constexpr size_t kAlwaysThere = 48 << 10;
  if (shared_bytes > kAlwaysThere) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  kernel<<<grid, block, shared_bytes, queue>>>(args...);
#endif
  return status_of(cudaGetLastError());
}

}  // namespace fused_resnet::cuda

// FR_SHARED(type, name) declares an object in the block's shared memory; FR_DYNAMIC_SHARED(name) an
// unsigned char pointer to the bytes asked for at the launch, 16-byte aligned.
#if !defined(FUSED_RESNET_SIMT)
#define FR_SHARED(type, name) __shared__ type name
#define FR_DYNAMIC_SHARED(name)                               \
  extern __shared__ __align__(16) unsigned char name##_all[]; \
  unsigned char* const name = name##_all
#endif
