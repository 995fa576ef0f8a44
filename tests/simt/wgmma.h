// What csrc/kernels/cuda/wgmma.cuh declares, by the definitions of the PTX ISA: the swizzle on bits
// of addresses, descriptors by their fields. Products are exact and added one by one in float.
// Copies and products happen at once, or as late as waiting for them allows.
#pragma once

#include "mma.h"

namespace simt {

// As on hardware dynamic shared memory begins at no multiple of more than its declaration asks for.
constexpr uint32_t kSharedBase = (1 << 10) + 16;

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - dynamic_shared.get()) + kSharedBase;
}
inline char* shared_at(uint32_t address) { return dynamic_shared.get() + (address - kSharedBase); }

// Of 128 bytes: bits 4 to 6 are xored with bits 7 to 9.
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct Box {  // of a matrix of elements of two bytes
  const void* data;
  int64_t rows, depth, row_stride;
  int box_rows;
};
constexpr int kBoxRowBytes = 128;

struct BoxCopy {
  uint32_t to;
  Box box;
  int64_t depth, row;

  int bytes() const { return box.box_rows * kBoxRowBytes; }
  void land() const {
    const auto* data = static_cast<const uint16_t*>(box.data);
    for (int64_t r = 0; r < box.box_rows; ++r)
      for (int64_t k = 0; k < kBoxRowBytes / 2; ++k) {
        const bool inside = row + r < box.rows && depth + k < box.depth;
        const uint16_t value = inside ? data[(row + r) * box.row_stride + depth + k] : 0;
        memcpy(shared_at(swizzled(to + static_cast<uint32_t>(r * kBoxRowBytes + k * 2))), &value,
               sizeof(value));
      }
  }
};

// A barrier in shared memory; what the memory holds does not matter.
struct Barrier {
  int count, missing;  // arrivals
  int bytes = 0;       // expected, and not there
  int completed = 0;
  int waiting = 0;
  std::vector<BoxCopy> copies;  // in flight

  void complete() {
    if (missing || bytes) return;
    missing = count;
    ++completed;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state == Fiber::waiting && !strcmp(fibers[i].place.what, "mbarrier_wait"))
        fibers[i].state = Fiber::ready;
  }
  void land() {
    for (const BoxCopy& copy : std::exchange(copies, {})) {
      copy.land();
      bytes -= copy.bytes();
    }
    complete();
  }
};
inline std::map<const uint64_t*, Barrier> barriers;

struct Product {
  float* d;
  uint64_t a, b;
  void (*perform)(const Product&, int lane);
  int lane, group;
};
struct WarpProducts {
  std::vector<Product> products;  // not waited for
  int groups = 0;                 // committed
};
inline std::map<int, WarpProducts> products_of;  // by warps

inline void asynchronous_ends() {
  for (const auto& [at, barrier] : std::exchange(barriers, {}))
    if (!barrier.copies.empty()) fail("a block ends before its boxes have landed");
  for (const auto& [warp, mine] : std::exchange(products_of, {}))
    if (!mine.products.empty()) fail("a block ends before its products are waited for");
}

inline Barrier& barrier_at(const uint64_t* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("mbarrier: not initialised");
  return found->second;
}

inline void mbarrier_init(uint64_t* at, int count) {
  if (shared_address(at) % 8) fail("mbarrier: not aligned");
  barriers.insert_or_assign(at, Barrier{count, count, 0, 0, 0, {}});
  block_ends = asynchronous_ends;
}
inline void mbarriers_are_made() {}

inline void mbarrier_arrive(uint64_t* at) {
  Barrier& barrier = barrier_at(at);
  if (--barrier.missing < 0) fail("mbarrier: more arrivals than it counts");
  barrier.complete();
}
inline void mbarrier_expect(uint64_t* at, int bytes) {
  barrier_at(at).bytes += bytes;
  mbarrier_arrive(at);
}
inline void mbarrier_wait(uint64_t* at, int round, SIMT_CALLER) {
  Barrier& barrier = barrier_at(at);
  if (landing == Landing::lazy) barrier.land();
  ++barrier.waiting;
  while (barrier.completed % 2 == round % 2) {
    fibers[current].state = Fiber::waiting;
    fibers[current].place = {"mbarrier_wait", file, line, 0};
    yield();
  }
  --barrier.waiting;
  if (barrier.completed != round + 1) fail("mbarrier: ahead of who waits for it");
}

inline void load_box(void* to, const Box& box, int depth, int row, uint64_t* at) {
  const BoxCopy copy{shared_address(to), box, depth, row};
  if (copy.to % 1024) fail("load_box: the destination is not aligned");
  if (reinterpret_cast<uintptr_t>(box.data) % 16 || box.row_stride % 8)
    fail("load_box: the matrix is not aligned");
  Barrier& barrier = barrier_at(at);
  barrier.copies.push_back(copy);
  if (landing == Landing::eager || barrier.waiting) barrier.land();
}

// All lanes of a warp, which are in one instruction.
template <class F>
void together_in_warp(const char* what, const char* file, int line, const F& perform) {
  together(what, 0, file, line, [&](const auto&) { perform(products_of[current / kWarp]); });
}

inline void wgmma_fence(SIMT_CALLER) {
  together_in_warp("wgmma_fence", file, line, [](WarpProducts&) {});
}
inline void wgmma_commit(SIMT_CALLER) {
  together_in_warp("wgmma_commit", file, line, [](WarpProducts& mine) { ++mine.groups; });
}

inline void wait_for_products(int left, const char* file, int line) {
  together_in_warp("wgmma_wait", file, line, [&](WarpProducts& mine) {
    auto done = [&](const Product& p) { return p.group < mine.groups - left; };
    for (const Product& p : mine.products)
      if (landing == Landing::lazy && done(p)) p.perform(p, p.lane);
    mine.products.erase(std::remove_if(mine.products.begin(), mine.products.end(), done),
                        mine.products.end());
  });
}
template <int left>
void wgmma_wait(SIMT_CALLER) {
  wait_for_products(left, file, line);
}
template <int n>
void wgmma_finish(float (&)[n], SIMT_CALLER) {
  wait_for_products(0, file, line);
}

// The element of a matrix that a descriptor points at, rows of 128 bytes in groups of eight.
template <class T>
float element(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("wgmma: not a swizzle of 128 bytes");
  const uint32_t first = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
  const uint32_t groups = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  T value;
  memcpy(static_cast<void*>(&value),
         shared_at(swizzled(first + row / 8 * groups + row % 8 * 128 + k * int(sizeof(T)))),
         sizeof(T));
  return static_cast<float>(value);
}

// A lane's part of it; see wgmma.cuh.
template <class T, int n>
void multiply_lane(const Product& p, int lane) {
  constexpr int depth = 16;
  const int first = lane / kWarp % 4 * 16 + lane % kWarp / 4;
  float a[2][depth];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < depth; ++k) a[half][k] = element<T>(p.a, first + half * 8, k);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < depth; ++k)
      p.d[i] += a[i / 2 % 2][k] * element<T>(p.b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
}

template <class T, int n>
void wgmma(float (&d)[n], uint64_t a, uint64_t b, SIMT_CALLER) {
  const Product mine{d, a, b, multiply_lane<T, n>, current, 0};
  together("wgmma", mine, file, line, [&](const auto& of) {
    WarpProducts& warp = products_of[current / kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      Product& p = of(lane);
      if (p.a != a || p.b != b) fail("wgmma: descriptors differ within a warp");
      p.group = warp.groups;
      if (landing == Landing::eager) p.perform(p, p.lane);
      warp.products.push_back(p);
    }
  });
}

}  // namespace simt
