// What csrc/kernels/cuda/mma.cuh declares, by exchange between the fibers of a warp. Products are
// exact and added one by one in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "simt.h"

namespace simt {

// Times that ldmatrix found two of eight rows in the same banks: 0 says that a layout is good.
inline int64_t bank_conflicts;

struct Mma {
  float* c;
  const uint32_t *a, *b;
};

// c += A * B, both with `depth` elements of 32 / per bits a row, which unpack(register, out) gives.
template <int depth, class F>
void multiply(const char* file, int line, const Mma& mine, const F& unpack) {
  constexpr int per = depth / 8;
  together("mma", mine, file, line, [&](const auto& of) {
    float a[16][depth], b[8][depth];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4 * per;
      for (int half = 0; half < 2; ++half) {
        unpack(of(lane).a[2 * half], &a[g][t + half * depth / 2]);
        unpack(of(lane).a[2 * half + 1], &a[g + 8][t + half * depth / 2]);
        unpack(of(lane).b[half], &b[g][t + half * depth / 2]);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float& c = of(lane).c[i];
        for (int k = 0; k < depth; ++k)
          c += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
      }
    }
  });
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_CALLER) {
  multiply<16>(file, line, Mma{c, a, b}, [](uint32_t word, float* to) {
    T pair[2];
    memcpy(static_cast<void*>(pair), &word, sizeof(pair));
    for (int i = 0; i < 2; ++i) to[i] = static_cast<float>(pair[i]);
  });
}

inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        SIMT_CALLER) {
  multiply<8>(file, line, Mma{c, a, b}, [](uint32_t word, float* to) {
    word &= ~0x1fffu;
    memcpy(to, &word, sizeof(word));
  });
}

inline uint32_t to_tf32(uint32_t x) {
  const bool finite = (x & 0x7f800000) != 0x7f800000;
  const bool nan = !finite && (x & 0x7fffff);
  return nan ? 0x7fffffff : finite ? (x + 0x1000) & ~0x1fffu : x;
}

struct Matrices {
  uint32_t* to;
  const char* row;
};

template <bool transposed>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_CALLER) {
  together("ldmatrix", Matrices{r, static_cast<const char*>(row)}, file, line, [](const auto& of) {
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(of(m * 8 + i).row);
        if (at % 16) fail("ldmatrix: a row is not aligned");
        bank_conflicts += banks >> at / 16 % 8 & 1;
        banks |= 1u << at / 16 % 8;
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int half = 0; half < 2; ++half) {
          const int i = lane / 4, j = lane % 4 * 2 + half;
          char* to = reinterpret_cast<char*>(of(lane).to + m) + half * 2;
          memcpy(to, transposed ? of(m * 8 + j).row + i * 2 : of(m * 8 + i).row + j * 2, 2);
        }
      }
    }
  });
}

inline void cp_async16(void* shared, const void* global, int bytes) {
  start_copy(shared, global, bytes);
}
inline void cp_async_commit() { commit_copies(); }
template <int left>
void cp_async_wait() {
  wait_for_copies(left);
}

}  // namespace simt
