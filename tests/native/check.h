// What the checks share: exactly-sized heap buffers of every storage type, numbers to fill them
// with, a pool of real threads, and the comparison with a result computed in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../convolution.h"
#include "kernels/cpu/conv_panels.h"

namespace kernels = fused_resnet::cpu::FUSED_RESNET_ISA;
using fused_resnet::Act;
using fused_resnet::DType;
using fused_resnet::Status;
using kernels::bf16;
using kernels::f16;

// dtype, the unit of rounding, and conversion to and from double.
template <class T>
struct Type;

template <>
struct Type<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double unit = 0x1p-24, least = 0x1p-149;
  static double get(float x) { return x; }
  static float make(double x) { return static_cast<float>(x); }
};
template <>
struct Type<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double unit = 0x1p-53, least = 0x1p-1074;
  static double get(double x) { return x; }
  static double make(double x) { return x; }
};
template <>
struct Type<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double unit = 0x1p-8, least = 0x1p-133;
  static double get(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static bf16 make(double x) {  // truncated: any number will do
    const float f = static_cast<float>(x);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return {static_cast<uint16_t>(bits >> 16)};
  }
};
template <>
struct Type<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double unit = 0x1p-11, least = 0x1p-24;
  static double get(f16 x) {
    _Float16 h;
    memcpy(&h, &x, 2);
    return static_cast<double>(h);
  }
  static f16 make(double x) {
    const _Float16 h = static_cast<_Float16>(static_cast<float>(x));
    f16 result;
    memcpy(&result, &h, 2);
    return result;
  }
};

template <class T>
using Acc = kernels::Acc<T>;
template <class T>
using Element = kernels::Element<T>;

inline uint64_t state = 1;
inline double random_number() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1;
}

// n elements that end where their allocation ends, and do not begin where it begins.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, bool present = true) : size_(n) {
    if (!present) return;
    memory_ = static_cast<T*>(malloc((n + 1) * sizeof(T)));
    memset(memory_, 0xff, (n + 1) * sizeof(T));  // NaN
  }
  Array(const Array& other) : Array(other.size_, other.memory_ != nullptr) {
    if (memory_) memcpy(memory_, other.memory_, (size_ + 1) * sizeof(T));
  }
  ~Array() { free(memory_); }
  Array& operator=(const Array&) = delete;

  Array& fill(double offset = 0) {
    for (int64_t i = 0; memory_ && i < size_; ++i)
      data()[i] = Type<T>::make(random_number() + offset);
    return *this;
  }
  T* data() const { return memory_ ? memory_ + 1 : nullptr; }
  double at(int64_t i) const { return Type<T>::get(data()[i]); }
  double at(int64_t i, double otherwise) const { return memory_ ? at(i) : otherwise; }
  int64_t size() const { return size_; }
  bool same(const Array& other) const {
    return memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  int64_t size_;
  T* memory_ = nullptr;
};

// Splits work as torch does: into as many pieces as there are threads, of at least `grain`.
inline int wanted_threads;
inline void run_in_threads(int64_t n, int64_t grain, void* context,
                           void (*body)(void*, int64_t, int64_t)) {
  int64_t pieces = grain > 0 ? (n + grain - 1) / grain : n;
  if (pieces > wanted_threads) pieces = wanted_threads;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < pieces; ++i)
    threads.emplace_back(body, context, n * i / pieces, n * (i + 1) / pieces);
  body(context, 0, n / pieces);
  for (std::thread& thread : threads) thread.join();
}
inline fused_resnet::cpu::Pool pool(int threads) {
  wanted_threads = threads;
  return {threads, run_in_threads};
}

inline int64_t checks = 0;

[[noreturn]] inline void fail(const std::string& what) {
  fprintf(stderr, "check failed: %s\n", what.c_str());
  exit(1);
}

inline void expect(bool condition, const std::string& what) {
  ++checks;
  if (!condition) fail(what);
}

// One element: off by no more than `steps` roundings of `magnitude`, the sum of the terms' absolute
// values, and by rounding to T once.
template <class T>
void expect_near(double got, double exact, double magnitude, int64_t steps,
                 const std::string& what) {
  const double work = sizeof(T) == 8 ? 0x1p-52 : 0x1p-24;
  const double summed = steps * work * magnitude;
  const double bound = summed + Type<T>::unit * (std::fabs(exact) + summed) + Type<T>::least;
  ++checks;
  if (!(std::fabs(got - exact) <= bound))
    fail(what + ": got " + std::to_string(got) + ", expected " + std::to_string(exact) +
         " within " + std::to_string(bound));
}

inline double activate(double x, Act act) { return act == Act::relu && x < 0 ? 0 : x; }

// The strides of a weight [out, in, height, width] in one of three layouts.
inline void lay_out_weight(const fused_resnet::ConvShape& s, int layout, int64_t* stride) {
  // Which of them is innermost, and so on outwards.
  const int orders[3][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}, {0, 1, 2, 3}};
  const int64_t sizes[4] = {s.out_channels, s.in_channels / s.groups, s.kernel[0], s.kernel[1]};
  int64_t step = 1;
  for (int d : orders[layout]) {
    stride[d] = step;
    step *= sizes[d];
  }
}

void check_conv_bn_act();
void check_conv_dgrad();
void check_conv_int8();
void check_conv_wgrad();
void check_conv_winograd();
void check_bn_act();
void check_bn_scale_shift();
void check_bn_act_maxpool();
void check_eltwise_act();
void check_gram();
void check_training();
