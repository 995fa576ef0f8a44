// Checks the emulator's matrix instructions and asynchronous copies: a pipelined product of two
// matrices, whole or with one bug planted. Which schedules must catch which, the test says.
#include <cmath>
#include <map>
#include <vector>

#include "../../csrc/kernels/cuda/launch.h"
#include "../../csrc/kernels/cuda/mma.cuh"
#include "check.h"

using namespace fused_resnet::cuda;

namespace {

enum class Bug {
  none,
  no_barrier_after_wait,    // one warp reads what another's copies have not brought
  no_barrier_before_reuse,  // copies overwrite what another warp still reads
  wait_count,               // one group too few is waited for
  no_commit,                // copies belong to no group, so nothing waits for them
  no_wait_at_end,           // the thread ends with copies in flight
  half_warp_ldmatrix,       // half of a warp loads a matrix, the other half does not come
  half_warp_mma,
  copy_out_of_bounds,  // behind the shared memory of the launch
  misaligned_copy,
  misaligned_row,
};

constexpr int kRows = 32, kColumns = 16, kRowBytes = 32, kThreads = 64;
constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;

// out[32][16] = A B, with A [32][k] and B [16][k] (by_rows: [k][16]), of which a stage has 32 bytes
// a row. The last rows of A and B beyond `rows` and `columns` are zeros that the copies make.
template <class T, bool by_rows>
__global__ void product(const T* a, const T* b, float* out, int k, int rows, int columns, Bug bug) {
  constexpr int kDepth = kRowBytes / sizeof(T), kChunk = 16 / sizeof(T);
  FR_DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  auto slot = [&](int stage) { return memory + stage % 2 * kStageBytes; };
  auto start = [&](int stage) {
    // Each warp copies rows that the other one multiplies, and the first all of B.
    const int row = kRows - 1 - thread / 2, half = thread % 2;
    unsigned char* to = slot(stage) + row * kRowBytes + half * 16;
    if (bug == Bug::misaligned_copy) to += 8;
    cp_async16(to, a + (row < rows ? row * k + stage * kDepth + half * kChunk : 0),
               row < rows ? 16 : 0);
    if (warp == 0) {
      const int n = thread / 2;
      const bool inside = by_rows || n < columns;
      const T* from = by_rows ? b + (stage * kDepth + n) * kColumns : b + n * k + stage * kDepth;
      const bool over = bug == Bug::copy_out_of_bounds && stage % 2 && n == kColumns - 1 && half;
      cp_async16(slot(stage) + (kRows + n) * kRowBytes + (half + over) * 16,
                 inside ? from + half * kChunk : b, inside ? 16 : 0);
    }
  };
  float sums[2][4] = {};
  const int stages = k / kDepth;
  start(0);
  cp_async_commit();
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) start(stage + 1);
    if (bug != Bug::no_commit) cp_async_commit();
    if (bug == Bug::wait_count)
      cp_async_wait<2>();
    else
      cp_async_wait<1>();
    if (bug != Bug::no_barrier_after_wait) __syncthreads();
    const unsigned char* rows_a = slot(stage) + warp * 16 * kRowBytes;
    const unsigned char* rows_b = slot(stage) + kRows * kRowBytes;
    uint32_t x[4] = {}, w[4];
    if (bug != Bug::half_warp_ldmatrix || lane < 16)
      ldmatrix_x4<false>(x, rows_a + lane % 16 * kRowBytes + lane / 16 * 16 +
                                (bug == Bug::misaligned_row ? 4 : 0));
    if constexpr (by_rows)
      ldmatrix_x4<true>(w, rows_b + lane % 16 * kRowBytes + lane / 16 * 16);
    else
      ldmatrix_x4<false>(w, rows_b + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16);
    for (int n = 0; n < 2; ++n) {
      const uint32_t pair[2] = {w[2 * n], w[2 * n + 1]};
      if (bug == Bug::half_warp_mma && lane >= 16) continue;
      if constexpr (sizeof(T) == 2)
        mma_m16n8k16<T>(sums[n], x, pair);
      else
        mma_m16n8k8(sums[n], x, pair);
    }
    if (bug != Bug::no_barrier_before_reuse) __syncthreads();
  }
  cp_async_wait<0>();
  if (bug == Bug::no_wait_at_end) cp_async16(slot(0) + thread * 16, a, 16);
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
      out[row * kColumns + column] = sums[n][i];
    }
  }
}

// The values are small integers, so that sums are exact, plus what tf32 must not read.
template <class T, bool by_rows>
void check_product(int rows, int columns, Bug bug) {
  constexpr int k = 5 * kRowBytes / sizeof(T);
  std::vector<T> a(rows * k), b(kColumns * k);
  std::vector<float> out(kRows * kColumns, NAN);
  const float unread = sizeof(T) == 4 ? 1 + std::ldexp(1.0f, -12) : 1;
  auto value = [&](int row, int depth) { return float((row * 7 + depth * 5) % 13 - 6); };
  auto weight = [&](int column, int depth) { return float((column * 3 + depth * 11) % 9 - 4); };
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < k; ++i) a[row * k + i] = T(value(row, i) * unread);
  for (int column = 0; column < kColumns; ++column)
    for (int i = 0; i < k; ++i)
      b[by_rows ? i * kColumns + column : column * k + i] = T(weight(column, i));
  launch(product<T, by_rows>, 1, kThreads, 2 * kStageBytes, nullptr, a.data(), b.data(), out.data(),
         k, rows, columns, bug);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float expected = 0;
      if (row < rows && (by_rows || column < columns))
        for (int i = 0; i < k; ++i) expected += value(row, i) * weight(column, i);
      check(out[row * kColumns + column] == expected, "product");
    }
  }
}

__global__ void rounded(const uint32_t* in, uint32_t* out) { *out = to_tf32(*in); }

void check_rounding() {
  const uint32_t cases[][2] = {
      {0x3f800000, 0x3f800000}, {0x3f800fff, 0x3f800000}, {0x3f801000, 0x3f802000},
      {0xbf803000, 0xbf804000}, {0x3ffff000, 0x40000000}, {0x7f800000, 0x7f800000},
      {0xff800000, 0xff800000}, {0x7f7fffff, 0x7f800000}, {0x00001000, 0x00002000},
      {0x7f801000, 0x7fffffff}, {0xffffffff, 0x7fffffff}, {0x80000000, 0x80000000},
  };
  for (auto& [in, expected] : cases) {
    uint32_t out = 0;
    launch(rounded, 1, 1, 0, nullptr, &in, &out);
    check(out == expected, "to_tf32");
  }
}

}  // namespace

void check_mma(int argc, char** argv) {
  const std::map<std::string, Bug> bugs = {
      {"none", Bug::none},
      {"no_barrier_after_wait", Bug::no_barrier_after_wait},
      {"no_barrier_before_copy", Bug::no_barrier_before_reuse},
      {"wait_count", Bug::wait_count},
      {"no_commit", Bug::no_commit},
      {"no_wait_at_end", Bug::no_wait_at_end},
      {"half_warp_ldmatrix", Bug::half_warp_ldmatrix},
      {"half_warp_mma", Bug::half_warp_mma},
      {"copy_out_of_bounds", Bug::copy_out_of_bounds},
      {"misaligned_copy", Bug::misaligned_copy},
      {"misaligned_row", Bug::misaligned_row},
  };
  check(argc == 1 && bugs.count(argv[0]), "expected the name of a bug to plant, or none");
  const Bug bug = bugs.at(argv[0]);
  check_product<__nv_bfloat16, false>(32, 16, bug);
  if (bug != Bug::none) return;
  check_product<__nv_bfloat16, true>(32, 16, bug);
  check_product<__half, false>(27, 13, bug);
  check_product<__half, true>(1, 16, bug);
  check_product<float, false>(27, 13, bug);
  check_rounding();
}
