// bn_act, bn_scale_shift, bn_act_maxpool and eltwise_act against plain loops.
#include <algorithm>

#include "check.h"

namespace {

using fused_resnet::EltwiseOp;

// Below, at and above one vector of the type, and of its half.
template <class T>
std::vector<int64_t> lengths() {
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  return {1, lanes / 2, lanes - 1, lanes, lanes + 1, 2 * lanes + 3};
}

// How out relates to the inputs: its own memory, x's, the residual's.
enum class Alias { none, x, residual };

template <class T>
void check_bn_act_one(int64_t outer, int64_t channels, int64_t inner, bool has_residual, Act act,
                      Alias alias) {
  const int64_t n = outer * channels * inner;
  Array<T> x(n), residual(n, has_residual);
  Array<Acc<T>> scale(channels), shift(channels);
  x.fill();
  residual.fill();
  scale.fill();
  shift.fill();
  for (int threads : {1, 3}) {
    Array<T> x_used(x), residual_used(residual), fresh(n);
    Array<T>& out = alias == Alias::x ? x_used : alias == Alias::residual ? residual_used : fresh;
    const fused_resnet::BnActArgs args{
        Type<T>::dtype,       act,        x_used.data(), scale.data(), shift.data(),
        residual_used.data(), out.data(), outer,         channels,     inner};
    expect(kernels::bn_act(args, pool(threads)) == Status::ok, "bn_act");
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = i / inner % channels;
      const double product = x.at(i) * scale.at(c), r = residual.at(i, 0);
      expect_near<T>(out.at(i), activate(product + shift.at(c) + r, act),
                     std::fabs(product) + std::fabs(shift.at(c)) + std::fabs(r), 3, "bn_act");
    }
  }
}

template <class T>
void check_bn_act_type() {
  for (int64_t n : lengths<T>())
    for (bool channels_last : {false, true}) {
      const int64_t channels = channels_last ? n : 3, inner = channels_last ? 1 : n;
      for (bool residual : {false, true})
        check_bn_act_one<T>(5, channels, inner, residual, residual ? Act::relu : Act::none,
                            Alias::none);
      check_bn_act_one<T>(2, channels, inner, true, Act::relu, Alias::x);
      check_bn_act_one<T>(2, channels, inner, true, Act::relu, Alias::residual);
    }
  check_bn_act_one<T>(2, 3, FR_GRAIN + 1, true, Act::relu, Alias::none);
  check_bn_act_one<T>(2 * FR_GRAIN / 7, 17, 1, true, Act::relu, Alias::x);
  check_bn_act_one<T>(0, 3, 4, true, Act::relu, Alias::none);
  check_bn_act_one<T>(2, 3, 0, true, Act::relu, Alias::none);
}

template <class T>
void check_scale_shift_type() {
  for (int64_t channels : lengths<T>())
    for (bool affine : {false, true}) {
      Array<T> mean(channels), var(channels), weight(channels, affine), bias(channels, affine);
      Array<Acc<T>> scale(channels), shift(channels);
      mean.fill();
      var.fill(1.5);
      weight.fill();
      bias.fill();
      const fused_resnet::BnScaleShiftArgs args{Type<T>::dtype, mean.data(), var.data(),
                                                weight.data(),  bias.data(), scale.data(),
                                                shift.data(),   channels,    1e-5};
      expect(kernels::bn_scale_shift(args, pool(3)) == Status::ok, "bn_scale_shift");
      for (int64_t c = 0; c < channels; ++c) {
        const double a = weight.at(c, 1) / std::sqrt(var.at(c) + 1e-5);
        const double b = bias.at(c, 0) - mean.at(c) * a;
        expect_near<Acc<T>>(scale.at(c), a, std::fabs(a), 4, "scale");
        expect_near<Acc<T>>(shift.at(c), b, std::fabs(bias.at(c, 0)) + std::fabs(mean.at(c) * a), 6,
                            "shift");
      }
    }
}

struct Geometry {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

template <class T>
void check_maxpool_one(bool channels_last, int64_t channels, int64_t height, int64_t width,
                       const Geometry& window, Act act) {
  fused_resnet::BnActMaxpoolArgs args{};
  fused_resnet::PoolShape& shape = args.shape;
  auto length = [&](int64_t n, int i) {
    return (n + 2 * window.padding[i] - window.dilation[i] * (window.kernel[i] - 1) - 1) /
               window.stride[i] +
           1;
  };
  shape.batch = 2;
  shape.channels = channels;
  shape.height = height;
  shape.width = width;
  shape.out_height = length(height, 0);
  shape.out_width = length(width, 1);
  Array<T> x(2 * channels * height * width), out(2 * channels * shape.out_height * shape.out_width);
  Array<Acc<T>> scale(channels), shift(channels);
  x.fill();
  scale.fill();
  shift.fill();
  args.dtype = Type<T>::dtype;
  args.act = act;
  args.channels_last = channels_last;
  args.x = x.data();
  args.scale = scale.data();
  args.shift = shift.data();
  args.out = out.data();
  for (int i = 0; i < 2; ++i) {
    shape.kernel[i] = window.kernel[i];
    shape.stride[i] = window.stride[i];
    shape.padding[i] = window.padding[i];
    shape.dilation[i] = window.dilation[i];
  }
  expect(kernels::bn_act_maxpool(args, pool(3)) == Status::ok, "bn_act_maxpool");
  auto index = [&](int64_t n, int64_t c, int64_t h, int64_t w, int64_t rows, int64_t columns) {
    return channels_last ? ((n * rows + h) * columns + w) * channels + c
                         : ((n * channels + c) * rows + h) * columns + w;
  };
  for (int64_t n = 0; n < 2; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t oh = 0; oh < shape.out_height; ++oh)
        for (int64_t ow = 0; ow < shape.out_width; ++ow) {
          double best = -INFINITY, magnitude = 0;
          for (int64_t kh = 0; kh < window.kernel[0]; ++kh)
            for (int64_t kw = 0; kw < window.kernel[1]; ++kw) {
              const int64_t h = oh * window.stride[0] - window.padding[0] + kh * window.dilation[0];
              const int64_t w = ow * window.stride[1] - window.padding[1] + kw * window.dilation[1];
              if (h < 0 || h >= height || w < 0 || w >= width) continue;
              const double product = x.at(index(n, c, h, w, height, width)) * scale.at(c);
              best = std::max(best, activate(product + shift.at(c), act));
              magnitude = std::max(magnitude, std::fabs(product) + std::fabs(shift.at(c)));
            }
          expect_near<T>(out.at(index(n, c, oh, ow, shape.out_height, shape.out_width)), best,
                         magnitude, 2, "bn_act_maxpool");
        }
}

template <class T>
void check_maxpool_type() {
  const Geometry stem{{3, 3}, {2, 2}, {1, 1}, {1, 1}};
  for (int64_t n : lengths<T>()) {
    check_maxpool_one<T>(true, n, 7, 6, stem, Act::relu);
    check_maxpool_one<T>(false, 2, 5, n, stem, Act::relu);
  }
  for (bool channels_last : {false, true})
    for (Act act : {Act::none, Act::relu}) {
      check_maxpool_one<T>(channels_last, 5, 9, 8, {{3, 2}, {1, 3}, {1, 0}, {1, 1}}, act);
      check_maxpool_one<T>(channels_last, 5, 9, 8, {{3, 3}, {1, 2}, {1, 1}, {2, 3}}, act);
      check_maxpool_one<T>(channels_last, 1, 1, 1, {{1, 1}, {1, 1}, {0, 0}, {1, 1}}, act);
      check_maxpool_one<T>(channels_last, 3, 4, 4, {{4, 4}, {1, 1}, {2, 2}, {1, 1}}, act);
    }
}

template <class T>
void check_eltwise_one(int64_t n, int count, EltwiseOp op, bool has_coeff, bool in_place) {
  std::vector<Array<T>> inputs;
  std::vector<const void*> pointers;
  for (int k = 0; k < count; ++k) inputs.push_back(Array<T>(n).fill());
  std::vector<Array<T>> used(inputs);
  for (const Array<T>& each : used) pointers.push_back(each.data());
  const double coeff[4] = {1, -0.5, 3, 0.25};
  Array<T> fresh(n);
  Array<T>& out = in_place ? used.back() : fresh;
  const fused_resnet::EltwiseActArgs args{
      Type<T>::dtype, op, Act::relu, count, pointers.data(), has_coeff ? coeff : nullptr,
      out.data(),     n};
  expect(kernels::eltwise_act(args, pool(3)) == Status::ok, "eltwise_act");
  for (int64_t i = 0; i < n; ++i) {
    double result = 0, magnitude = 0;
    for (int k = 0; k < count; ++k) {
      const double term = inputs[k].at(i) * (has_coeff ? coeff[k] : 1);
      const double size = std::fabs(term);
      if (k == 0) {
        result = term;
        magnitude = size;
      } else if (op == EltwiseOp::sum) {
        result += term;
        magnitude += size;
      } else if (op == EltwiseOp::prod) {
        result *= term;
        magnitude *= size;
      } else {
        result = std::max(result, term);
        magnitude = std::max(magnitude, size);
      }
    }
    expect_near<T>(out.at(i), activate(result, Act::relu), magnitude, count + 1, "eltwise_act");
  }
}

template <class T>
void check_eltwise_type() {
  for (EltwiseOp op : {EltwiseOp::sum, EltwiseOp::prod, EltwiseOp::max}) {
    for (int64_t n : lengths<T>())
      for (int count : {1, 2, 4}) check_eltwise_one<T>(n, count, op, false, count == 2);
    check_eltwise_one<T>(2 * FR_GRAIN + 5, 2, op, false, false);
    check_eltwise_one<T>(0, 2, op, false, false);
  }
  for (int64_t n : lengths<T>()) check_eltwise_one<T>(n, 3, EltwiseOp::sum, true, true);
}

}  // namespace

#define FOR_EVERY_TYPE(check) \
  check<float>();             \
  check<double>();            \
  check<bf16>();              \
  check<f16>();

void check_bn_act() { FOR_EVERY_TYPE(check_bn_act_type) }
void check_bn_scale_shift() { FOR_EVERY_TYPE(check_scale_shift_type) }
void check_bn_act_maxpool() { FOR_EVERY_TYPE(check_maxpool_type) }
void check_eltwise_act() { FOR_EVERY_TYPE(check_eltwise_type) }
