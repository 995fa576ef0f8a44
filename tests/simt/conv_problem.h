// What the checks of CUDA convolutions are made of: types, arrays of random numbers, sizes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/kernels/cuda/conv_plan.h"
#include "../convolution.h"
#include "check.h"

// The units of rounding to the storage type, and to what its products are made of.
template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr fused_resnet::DType dtype = fused_resnet::DType::f32;
  static constexpr double unit = 0x1p-24, least = 0x1p-149;
};
template <>
struct Type<double> {
  static constexpr fused_resnet::DType dtype = fused_resnet::DType::f64;
  static constexpr double unit = 0x1p-53, least = 0x1p-1074;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr fused_resnet::DType dtype = fused_resnet::DType::bf16;
  static constexpr double unit = 0x1p-8, least = 0x1p-133;
};
template <>
struct Type<__half> {
  static constexpr fused_resnet::DType dtype = fused_resnet::DType::f16;
  static constexpr double unit = 0x1p-11, least = 0x1p-24;
};

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(a value of the type, whether its products are of tf32).
template <class F>
void with_type(const std::string& dtype, const F& f) {
  if (dtype == "f32") return f(float{}, false);
  if (dtype == "tf32") return f(float{}, true);
  if (dtype == "f64") return f(double{}, false);
  if (dtype == "bf16") return f(__nv_bfloat16{}, false);
  if (dtype == "f16") return f(__half{}, false);
  check_failed("unknown dtype " + dtype);
}

// Takes a part away from what a kernel is asked for, so that the check has to fail.
template <class Args>
using Bug = std::function<void(Args&)>;

// The one that the arguments of a check name behind its dtype, if they do.
template <class Args>
Bug<Args> planted(const std::map<std::string, Bug<Args>>& bugs, int argc, char** argv) {
  check(argc == 1 || (argc == 2 && bugs.count(argv[1])), "expected a dtype, and a bug to plant");
  return argc == 1 ? [](Args&) {} : bugs.at(argv[1]);
}

inline std::mt19937 generator(1);

// n numbers in [-1, 1), `offset` elements behind an aligned address, that end where their memory
// ends.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, int64_t offset = 0) : size(n), offset_(offset) {
    void* p = nullptr;
    check(posix_memalign(&p, 64, (offset + n) * sizeof(T)) == 0, "out of memory");
    memory_.reset(static_cast<T*>(p));
    for (int64_t i = 0; i < n; ++i)
      data()[i] = T(static_cast<float>(generator() >> 8) / (1 << 23) - 1);
  }
  T* data() const { return memory_.get() + offset_; }
  double at(int64_t i) const { return static_cast<double>(static_cast<Acc<T>>(data()[i])); }
  const int64_t size;

 private:
  int64_t offset_;
  std::unique_ptr<T, decltype(&free)> memory_{nullptr, free};
};

struct Case {
  int64_t batch, height, width, in, out;
  int kernel = 1, stride = 1, padding = 0, dilation = 1;
  int64_t groups = 1;
  int64_t misaligned = 0;

  std::string text() const {
    return std::to_string(in) + "->" + std::to_string(out) + " k" + std::to_string(kernel) + " s" +
           std::to_string(stride) + " g" + std::to_string(groups) + " pixels " +
           std::to_string(height) + "x" + std::to_string(width);
  }
  fused_resnet::ConvShape shape() const {
    return measured(
        conv_shape(batch, height, width, in, out, kernel, stride, padding, dilation, groups));
  }
};

// Convolutions whose pixels or output channels end near the edge of a tile, of vectors of n.
inline std::vector<Case> at_tile_edges(int64_t n) {
  std::vector<Case> cases;
  for (const fused_resnet::cuda::ConvTile& tile : fused_resnet::cuda::kConvTiles) {
    for (int64_t near : {-1, 0, 1}) {
      cases.push_back({1, 1, tile.rows + near, n, n + 1});
      cases.push_back({1, 1, 5, n, tile.columns + near});
    }
    cases.push_back({1, 3, tile.rows / 2, 3 * n, tile.columns + n, 3, 1, 1});
  }
  return cases;
}
