// Checks the arithmetic of shared memory for wgmma against the definition of its swizzle; when its
// body may be used, and how; and that the emulator's barriers, boxes and products catch what a
// pipeline can get wrong: a product of two matrices, whole or with one bug planted. Which schedules
// must catch which, the test says.
#include <cmath>
#include <map>
#include <vector>

#include "../../csrc/kernels/cuda/wgmma.cuh"
#include "../convolution.h"
#include "check.h"

using namespace fused_resnet;
using namespace fused_resnet::cuda;

namespace {

// Rows of 128 bytes lie one below the other, and bits 4 to 6 of an address are xored with bits 7 to
// 9: so boxes are written, and so products read.
void check_addresses() {
  for (int row = 0; row < 256; ++row)
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      const uint32_t plain = row * kRowBytes + chunk * 16;
      check(chunk_at(row, chunk) == int(plain ^ (plain >> 3 & 0x70)), "swizzle");
    }
  for (uint32_t address = 0; address < 227 << 10; address += kWgmmaAlignment)
    for (int bytes = 0; bytes < kRowBytes; bytes += 2 * kWgmmaDepth) {
      const uint64_t d = further(matrix_descriptor(address), bytes);
      check((d & 0x3fff) * 16 == address + bytes, "the address of a descriptor");
      check((d >> 32 & 0x3fff) * 16 == 8 * kRowBytes, "the step to the next eight rows");
      check(d >> 62 == 1 && (d >> 46 & 0xffff) == 0, "the swizzle of a descriptor");
    }
}

ConvShape plain(int64_t pixels, int64_t in, int64_t out) {
  return measured(conv_shape(1, 1, pixels, in, out, 1, 1, 0, 1, 1));
}

void check_plan() {
  const Gpu hopper{132, 90};
  const ConvShape good = plain(3136, 64, 256);
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (int capability : {80, 86, 89, 90, 100, 103, 120})
      check(wgmma_takes(dtype, good, {132, capability}) ==
                (capability == 90 && (dtype == DType::bf16 || dtype == DType::f16)),
            "type and capability");
  auto taken = [&](auto change) {
    ConvShape s = good;
    change(s);
    return wgmma_takes(DType::bf16, s, hopper);
  };
  for (int i = 0; i < 2; ++i) {
    check(!taken([&](ConvShape& s) { s.kernel[i] = 3; }), "a larger kernel");
    check(!taken([&](ConvShape& s) { s.stride[i] = 2; }), "a stride");
    check(!taken([&](ConvShape& s) { s.padding[i] = 1; }), "padding");
    check(taken([&](ConvShape& s) { s.dilation[i] = 2; }), "dilation of nothing");
  }
  check(!taken([](ConvShape& s) { s.groups = 2; }), "groups");
  check(!taken([](ConvShape& s) { s.in_channels = 60; }), "input channels");
  check(!taken([](ConvShape& s) { s.out_channels = 60; }), "output channels");
  check(taken([](ConvShape& s) { s.batch = INT32_MAX / 3136 - 1; }), "many pixels");
  check(!taken([](ConvShape& s) { s.batch = INT32_MAX / 3136 + 1; }), "too many pixels");

  int wide = 0;
  for (int64_t pixels : {1, 49, 196, 784, 3136, 12544, 401408})
    for (int64_t columns : {8, 64, 72, 128, 192, 256, 320, 512, 2048}) {
      const int chosen = plan_wgmma(pixels, columns, hopper);
      const WgmmaTile& tile = kWgmmaTiles[chosen];
      const int64_t blocks = wgmma_blocks(tile, pixels, columns);
      check(ceil_div(blocks, ceil_div(pixels, kWgmmaRows)) * tile.columns >= columns,
            "all columns");
      check(chosen == 0 || blocks >= hopper.multiprocessors, "idle multiprocessors");
      check(ceil_div(columns, tile.columns) * tile.columns - columns < 64, "columns in vain");
      wide += chosen;
    }
  check(wide > 0 && wide < 63, "one tile for all");
}

enum class Bug {
  none,
  no_wait_for_boxes,    // reads what has not come
  no_wait_for_release,  // overwrites what is still read
  release_before_wait,  // of the products that read it
  no_wait_at_end,       // reads sums while they are added to
  too_few_bytes,        // expected, so the barrier completes before the second box is there
  half_warp,            // multiplies
  too_many_stages,      // are copied
  another_row,          // is where a descriptor points: not the first of eight
  between_stages,       // a box begins at no multiple of 1024 bytes
};

constexpr int kColumns = 64, kStages = 2, kStageBytes = (kWgmmaGroupRows + kColumns) * kRowBytes;
constexpr int kMultiplying = 128, kThreads = kMultiplying + 32;

// out[64][64] = A B^T, with a row of A and B of `depth` elements, by one warpgroup.
__global__ void product(TensorMap a, TensorMap b, float* out, int depth, Bug bug) {
  FR_DYNAMIC_SHARED(any);
  unsigned char* const memory = any + (0u - shared_address(any)) % kWgmmaAlignment;
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + kStages * kStageBytes);
  uint64_t* const empty = full + kStages;
  const int thread = threadIdx.x, lane = thread % 32, stages = depth / 64;
  if (thread == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      mbarrier_init(full + slot, 1);
      mbarrier_init(empty + slot, kMultiplying / 32);
    }
    mbarriers_are_made();
  }
  __syncthreads();
  float sums[kColumns / 2] = {};
  if (thread == kMultiplying) {
    for (int stage = 0; stage < stages + (bug == Bug::too_many_stages); ++stage) {
      const int slot = stage % kStages, round = stage / kStages;
      unsigned char* to = memory + slot * kStageBytes;
      if (bug == Bug::between_stages) to += 16;
      if (round > 0 && bug != Bug::no_wait_for_release) mbarrier_wait(empty + slot, round - 1);
      mbarrier_expect(full + slot, kStageBytes / (bug == Bug::too_few_bytes ? 2 : 1));
      load_box(to, &a, stage * 64, 0, full + slot);
      load_box(to + kWgmmaGroupRows * kRowBytes, &b, stage * 64, 0, full + slot);
    }
  } else if (thread < kMultiplying) {
    auto release = [&](int stage) {
      if (lane == 0) mbarrier_arrive(empty + stage % kStages);
    };
    for (int stage = 0; stage < stages; ++stage) {
      const int slot = stage % kStages;
      if (bug != Bug::no_wait_for_boxes) mbarrier_wait(full + slot, stage / kStages);
      const uint32_t rows = shared_address(memory + slot * kStageBytes);
      const uint64_t x = matrix_descriptor(rows + (bug == Bug::another_row ? kRowBytes : 0));
      const uint64_t w = matrix_descriptor(rows + kWgmmaGroupRows * kRowBytes);
      wgmma_fence();
      for (int at = 0; at < kRowBytes; at += 2 * kWgmmaDepth)
        if (bug != Bug::half_warp || lane < 16)
          wgmma<__nv_bfloat16>(sums, further(x, at), further(w, at));
      wgmma_commit();
      if (bug == Bug::release_before_wait) {
        release(stage);
        wgmma_wait<1>();
      } else {
        wgmma_wait<1>();
        if (stage > 0) release(stage - 1);
      }
    }
    if (bug != Bug::no_wait_at_end) wgmma_finish(sums);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
      out[row * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
  }
}

// The values are small integers, so that sums are exact. Rows and depth end before the last box.
void check_product(int rows, int depth, Bug bug) {
  const int boxes = static_cast<int>(ceil_div(depth, 64)) * 64;
  std::vector<uint4> memory_a(kWgmmaGroupRows * boxes / 8), memory_b(kColumns * boxes / 8);
  auto* a = reinterpret_cast<__nv_bfloat16*>(memory_a.data());
  auto* b = reinterpret_cast<__nv_bfloat16*>(memory_b.data());
  std::vector<float> out(kWgmmaGroupRows * kColumns, NAN);
  auto value = [&](int row, int k) { return float((row * 7 + k * 5) % 13 - 6); };
  auto weight = [&](int column, int k) { return float((column * 3 + k * 11) % 9 - 4); };
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < boxes; ++k) {
      a[i * boxes + k] = __nv_bfloat16(k < depth && i < rows ? value(i, k) : NAN);
      b[i * boxes + k] = __nv_bfloat16(k < depth ? weight(i, k) : NAN);
    }
  TensorMap map_a, map_b;
  encode({DType::bf16, a, rows, depth, boxes, kWgmmaGroupRows}, &map_a);
  encode({DType::bf16, b, kColumns, depth, boxes, kColumns}, &map_b);
  launch(product, 1, kThreads,
         kWgmmaAlignment + kStages * kStageBytes + 2 * kStages * sizeof(uint64_t), nullptr, map_a,
         map_b, out.data(), boxes, bug);
  for (int row = 0; row < kWgmmaGroupRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      float expected = 0;
      for (int k = 0; row < rows && k < depth; ++k) expected += value(row, k) * weight(column, k);
      check(out[row * kColumns + column] == expected, "product");
    }
}

}  // namespace

void check_wgmma(int argc, char** argv) {
  const std::map<std::string, Bug> bugs = {
      {"none", Bug::none},
      {"no_wait_for_boxes", Bug::no_wait_for_boxes},
      {"no_wait_for_release", Bug::no_wait_for_release},
      {"release_before_wait", Bug::release_before_wait},
      {"no_wait_at_end", Bug::no_wait_at_end},
      {"too_few_bytes", Bug::too_few_bytes},
      {"half_warp", Bug::half_warp},
      {"too_many_stages", Bug::too_many_stages},
      {"another_row", Bug::another_row},
      {"between_stages", Bug::between_stages},
  };
  check(argc == 1 && bugs.count(argv[0]), "expected the name of a bug to plant, or none");
  const Bug bug = bugs.at(argv[0]);
  check_product(64, 5 * 64, bug);
  if (bug != Bug::none) return;
  check_product(37, 4 * 64 + 24, bug);
  check_product(1, 8, bug);
  check_addresses();
  check_plan();
}
