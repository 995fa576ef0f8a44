// The kernels of training against plain loops in double.
#include <algorithm>

#include "check.h"

namespace {

using fused_resnet::MaskedGrad;

// A dense activation, and where element i of it belongs.
struct Extent {
  int64_t outer, channels, inner;
  int64_t elements() const { return outer * channels * inner; }
  int64_t pixels() const { return outer * inner; }
  int64_t channel(int64_t i) const { return i / inner % channels; }
};

// About one vector's length in channels and in pixels, rows that are added up at once, blocks.
template <class T>
std::vector<Extent> extents() {
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  std::vector<Extent> all;
  for (int64_t n : {int64_t(1), lanes - 1, lanes, lanes + 1, 4 * lanes + 3}) {
    all.push_back({11, n, 1});
    all.push_back({2, 3, n});
  }
  all.push_back({8, 5, 1});
  all.push_back({FR_BLOCK_ROWS + 3, 9, 1});
  all.push_back({2, 2, FR_BLOCK_PIXELS + 5});
  all.push_back({0, 3, 4});
  all.push_back({2, 3, 0});
  all.push_back({0, 3, 1});
  return all;
}

template <class T>
struct Sums {
  std::vector<double> value, magnitude;
  explicit Sums(int64_t n) : value(n), magnitude(n) {}
  void add(int64_t c, double term) {
    value[c] += term;
    magnitude[c] += std::fabs(term);
  }
  void expect(const Array<Acc<T>>& got, int64_t steps, const std::string& what) const {
    for (int64_t c = 0; c < got.size(); ++c)
      expect_near<Acc<T>>(got.at(c), value[c], magnitude[c], steps, what);
  }
};

template <class T>
void check_stats_type() {
  for (const Extent& e : extents<T>()) {
    Array<T> x(e.elements());
    x.fill(0.75);
    Sums<T> sum(e.channels), squares(e.channels);
    for (int64_t i = 0; i < e.elements(); ++i) sum.add(e.channel(i), x.at(i));
    for (int64_t i = 0; i < e.elements(); ++i) {
      const double d = x.at(i) - sum.value[e.channel(i)] / e.pixels();
      squares.add(e.channel(i), d * d);
    }
    for (int threads : {1, 3}) {
      Array<Acc<T>> mean(e.channels), m2(e.channels);
      const fused_resnet::BnStatsArgs args{Type<T>::dtype, x.data(),   mean.data(), m2.data(),
                                           e.outer,        e.channels, e.inner};
      expect(kernels::bn_stats(args, pool(threads)) == Status::ok, "bn_stats");
      for (int64_t c = 0; c < e.channels; ++c) {
        if (e.pixels() == 0) {
          expect(std::isnan(mean.at(c)) && m2.at(c) == 0, "bn_stats of nothing");
          continue;
        }
        const double n = static_cast<double>(e.pixels());
        expect_near<Acc<T>>(mean.at(c), sum.value[c] / n, sum.magnitude[c] / n, 4, "mean");
        expect_near<Acc<T>>(m2.at(c), squares.value[c], squares.value[c], e.pixels() + 4, "m2");
      }
    }
  }
}

template <class T>
void check_finalize_type() {
  const int64_t channels = 19;
  for (bool given : {true, false}) {
    Array<float> mean(channels), m2(channels), weight(channels, given), bias(channels, given),
        scale(channels), shift(channels), invstd(channels);
    Array<T> running_mean(channels, given), running_var(channels, given);
    mean.fill();
    m2.fill(3);
    weight.fill();
    bias.fill();
    running_mean.fill();
    running_var.fill(1.5);
    const Array<T> before(running_mean);
    fused_resnet::BnFinalizeArgs args{};
    args.dtype = DType::f32;
    args.running_dtype = Type<T>::dtype;
    args.mean = mean.data();
    args.m2 = m2.data();
    args.weight = weight.data();
    args.bias = bias.data();
    args.running_mean = running_mean.data();
    args.running_var = running_var.data();
    args.scale = scale.data();
    args.shift = shift.data();
    args.invstd = invstd.data();
    args.channels = channels;
    args.count = 7;
    args.momentum = 0.25;
    args.eps = 1e-5;
    expect(kernels::bn_finalize(args, pool(1)) == Status::ok, "bn_finalize");
    for (int64_t c = 0; c < channels; ++c) {
      const double exact = 1 / std::sqrt(m2.at(c) / 7 + 1e-5);
      expect_near<float>(invstd.at(c), exact, exact, 2, "invstd");
      const double s = weight.at(c, 1) * exact, b = bias.at(c, 0);
      expect_near<float>(scale.at(c), s, std::fabs(s), 3, "scale");
      expect_near<float>(shift.at(c), b - mean.at(c) * s, std::fabs(b) + std::fabs(mean.at(c) * s),
                         4, "shift");
      if (!given) continue;
      const double moved = 0.75 * before.at(c) + 0.25 * mean.at(c);
      expect_near<T>(running_mean.at(c), moved, std::fabs(before.at(c)) + 1, 4, "running_mean");
    }
  }
}

// How the mask is known.
enum class Known { none, of_out, of_x };

template <class T>
struct Gradient {
  const Extent e;
  const Known known;
  Array<T> grad, x, out;
  Array<Acc<T>> scale, shift;

  Gradient(const Extent& extent, Known how)
      : e(extent),
        known(how),
        grad(e.elements()),
        x(e.elements()),
        out(e.elements(), how == Known::of_out),
        scale(e.channels),
        shift(e.channels) {
    grad.fill();
    x.fill();
    out.fill();
    scale.fill();
    shift.fill(0.1);
  }

  MaskedGrad args() const {
    return {Type<T>::dtype, known == Known::none ? Act::none : Act::relu,
            grad.data(),    x.data(),
            out.data(),     scale.data(),
            shift.data(),   e.outer,
            e.channels,     e.inner};
  }

  double masked(int64_t i) const {
    const int64_t c = e.channel(i);
    const double y = known == Known::of_out ? out.at(i)
                     : known == Known::of_x ? x.at(i) * scale.at(c) + shift.at(c)
                                            : 1;
    return y <= 0 ? 0 : grad.at(i);
  }
};

// BatchNorm's gradient of x from what it takes of the batch.
template <class T>
struct Through {
  const Array<Acc<T>>&scale, &mean, &invstd, &sum_g, &sum_gx;
  double count;

  // g is known to `steps` roundings of `size`.
  void expect(double got, int64_t c, double g, double size, double x, int64_t steps,
              const std::string& what) const {
    const double a = scale.at(c), slope = invstd.at(c) * sum_gx.at(c) / count;
    const double offset = sum_g.at(c) / count, m = mean.at(c);
    expect_near<T>(got, a * (g - offset - (x - m) * slope),
                   std::fabs(a) * (size + std::fabs(offset) +
                                   (std::fabs(x) + std::fabs(m)) * std::fabs(slope)),
                   5 + steps, what);
  }
};

template <class T>
void check_backward_type() {
  for (const Extent& e : extents<T>())
    for (Known known : {Known::none, Known::of_out, Known::of_x})
      for (int threads : {1, 3}) {
        const Gradient<T> in(e, known);
        Array<Acc<T>> mean(e.channels), invstd(e.channels), sum_g(e.channels), sum_gx(e.channels);
        mean.fill();
        invstd.fill(2);
        const fused_resnet::BnActBackwardReduceArgs reduce{in.args(), mean.data(), invstd.data(),
                                                           sum_g.data(), sum_gx.data()};
        expect(kernels::bn_act_backward_reduce(reduce, pool(threads)) == Status::ok, "reduce");
        Array<T> dx(e.elements()), g(e.elements());
        const fused_resnet::BatchSums batch{mean.data(), invstd.data(), sum_g.data(), sum_gx.data(),
                                            e.pixels() + 0.5};
        const fused_resnet::BnActBackwardArgs back{in.args(), batch, dx.data()};
        expect(kernels::bn_act_backward(back, pool(threads)) == Status::ok, "backward");
        const Through<T> through{in.scale, mean, invstd, sum_g, sum_gx, batch.count};
        Sums<T> all(e.channels), with_x(e.channels);
        for (int64_t i = 0; i < e.elements(); ++i) {
          const int64_t ch = e.channel(i);
          const double gi = in.masked(i), m = mean.at(ch), s = invstd.at(ch);
          all.add(ch, gi);
          with_x.add(ch, gi * (in.x.at(i) - m) * s);
          with_x.magnitude[ch] += std::fabs(gi * m * s);
          through.expect(dx.at(i), ch, gi, std::fabs(gi), in.x.at(i), 0, "dx");
        }
        all.expect(sum_g, e.pixels() + 2, "sum_g");
        with_x.expect(sum_gx, e.pixels() + 4, "sum_gx");
        fused_resnet::BnActBackwardArgs fixed{in.args(), {}, dx.data()};
        if (known != Known::of_x) fixed.in.x = nullptr;
        expect(kernels::bn_act_backward(fixed, pool(threads)) == Status::ok, "backward, fixed");
        for (int64_t i = 0; i < e.elements(); ++i) {
          const double exact = in.scale.at(e.channel(i)) * in.masked(i);
          expect_near<T>(dx.at(i), exact, std::fabs(exact), 1, "dx of fixed statistics");
        }
        if (known != Known::of_out) continue;
        const fused_resnet::ReluBackwardReduceArgs relu{in.args(), g.data(), sum_g.data()};
        expect(kernels::relu_backward_reduce(relu, pool(threads)) == Status::ok, "relu");
        for (int64_t i = 0; i < e.elements(); ++i) expect(g.at(i) == in.masked(i), "g");
        all.expect(sum_g, e.pixels() + 2, "sum_g of relu");
      }
}

template <class T>
void check_pool_one(int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                    int64_t padding, int64_t dilation) {
  fused_resnet::PoolShape s{2, channels, height, width, 0, 0, {}, {}, {}, {}};
  for (int i = 0; i < 2; ++i) {
    s.kernel[i] = kernel;
    s.stride[i] = stride;
    s.padding[i] = padding;
    s.dilation[i] = dilation;
  }
  s.out_height = (height + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  s.out_width = (width + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  const int64_t n = 2 * height * width * channels;
  const int64_t m = 2 * s.out_height * s.out_width * channels;
  Array<T> x(n), out(m), grad(m), dx(n);
  Array<Acc<T>> scale(channels), shift(channels), b(channels), sum_g(channels), sum_gx(channels);
  std::vector<uint8_t> argmax(m);
  x.fill();
  grad.fill();
  scale.fill();
  shift.fill();
  b.fill();
  const fused_resnet::BnActMaxpoolTrainArgs train{Type<T>::dtype, Act::relu,    s,
                                                  x.data(),       scale.data(), shift.data(),
                                                  out.data(),     argmax.data()};
  expect(kernels::bn_act_maxpool_train(train, pool(3)) == Status::ok, "maxpool_train");
  std::vector<double> spread(n), size(n);
  Sums<T> all(channels), with_x(channels);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t c = i % channels, ow = i / channels % s.out_width;
    const int64_t oh = i / channels / s.out_width % s.out_height;
    const int64_t image = i / channels / s.out_width / s.out_height;
    const int64_t h = oh * stride - padding + argmax[i] / kernel * dilation;
    const int64_t w = ow * stride - padding + argmax[i] % kernel * dilation;
    expect(h >= 0 && h < height && w >= 0 && w < width, "argmax lies in the image");
    const int64_t at = ((image * height + h) * width + w) * channels + c;
    const double product = x.at(at) * scale.at(c);
    expect_near<T>(out.at(i), activate(product + shift.at(c), Act::relu),
                   std::fabs(product) + std::fabs(shift.at(c)), 2, "maxpool_train");
    const double g = out.at(i) <= 0 ? 0 : grad.at(i);
    spread[at] += g;
    size[at] += std::fabs(g);
    all.add(c, g);
    with_x.add(c, g * (x.at(at) - shift.at(c)) * b.at(c));
    with_x.magnitude[c] += std::fabs(g * b.at(c));
  }
  const fused_resnet::BnActMaxpoolBackwardReduceArgs reduce{
      Type<T>::dtype, Act::relu,    s,        grad.data(),  out.data(),   argmax.data(),
      x.data(),       shift.data(), b.data(), sum_g.data(), sum_gx.data()};
  expect(kernels::bn_act_maxpool_backward_reduce(reduce, pool(3)) == Status::ok, "pool reduce");
  all.expect(sum_g, m + 2, "sum_g of pooling");
  with_x.expect(sum_gx, m + 4, "sum_gx of pooling");
  fused_resnet::BnActMaxpoolBackwardArgs back{
      Type<T>::dtype,
      Act::relu,
      s,
      grad.data(),
      out.data(),
      argmax.data(),
      x.data(),
      scale.data(),
      {shift.data(), b.data(), sum_g.data(), sum_gx.data(), double(m)},
      dx.data()};
  expect(kernels::bn_act_maxpool_backward(back, pool(3)) == Status::ok, "pool backward");
  const Through<T> through{scale, shift, b, sum_g, sum_gx, back.batch.count};
  for (int64_t i = 0; i < n; ++i)
    through.expect(dx.at(i), i % channels, spread[i], size[i], x.at(i), kernel * kernel,
                   "pool backward");
  back.batch = {};
  expect(kernels::bn_act_maxpool_backward(back, pool(3)) == Status::ok, "pool backward, fixed");
  for (int64_t i = 0; i < n; ++i) {
    const double a = scale.at(i % channels);
    expect_near<T>(dx.at(i), a * spread[i], std::fabs(a) * size[i], 1 + kernel * kernel,
                   "pool backward of fixed statistics");
  }
  // Positions that are none lead to no other memory.
  std::fill(argmax.begin(), argmax.end(), uint8_t(255));
  kernels::bn_act_maxpool_backward_reduce(reduce, pool(3));
  std::fill(argmax.begin(), argmax.end(), uint8_t(kernel * kernel - 1));
  kernels::bn_act_maxpool_backward_reduce(reduce, pool(3));
}

template <class T>
void check_pool_type() {
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  for (int64_t channels : {int64_t(1), lanes - 1, lanes, lanes + 1, 2 * lanes + 3})
    check_pool_one<T>(channels, 7, 6, 3, 2, 1, 1);
  check_pool_one<T>(5, 9, 8, 2, 2, 0, 1);
  check_pool_one<T>(5, 9, 8, 3, 1, 1, 2);
  check_pool_one<T>(5, 4, 4, 4, 1, 2, 1);
  check_pool_one<T>(3, 1, 1, 1, 1, 0, 1);
  check_pool_one<T>(3, 20, 20, 15, 3, 7, 1);
}

template <class T>
void check_eltwise_type() {
  using fused_resnet::EltwiseOp;
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  for (EltwiseOp op : {EltwiseOp::sum, EltwiseOp::prod, EltwiseOp::max})
    for (int64_t n : {int64_t(0), int64_t(1), lanes - 1, lanes, lanes + 1, int64_t(FR_GRAIN + 5)}) {
      Array<T> a(n), b(n), out(n), grad(n), da(n), db(n);
      a.fill();
      b.fill();
      out.fill();
      grad.fill();
      for (int64_t i = 0; i < n; i += 3) b.data()[i] = a.data()[i];  // equal
      const void* inputs[] = {a.data(), b.data()};
      void* grads[] = {da.data(), db.data()};
      const double coeff[] = {0.5, -2};
      const fused_resnet::EltwiseActBackwardArgs args{
          Type<T>::dtype, op,         Act::relu, 2,
          grad.data(),    out.data(), inputs,    op == EltwiseOp::sum ? coeff : nullptr,
          grads,          n};
      expect(kernels::eltwise_act_backward(args, pool(3)) == Status::ok, "eltwise backward");
      for (int64_t i = 0; i < n; ++i) {
        const double g = out.at(i) <= 0 ? 0 : grad.at(i), x = a.at(i), y = b.at(i);
        double first = g * 0.5, second = g * -2;
        if (op == EltwiseOp::prod) {
          first = g * y;
          second = g * x;
        } else if (op == EltwiseOp::max) {
          first = x == y ? g / 2 : x > y ? g : 0;
          second = x == y ? g / 2 : x > y ? 0 : g;
        }
        expect_near<T>(da.at(i), first, std::fabs(first), 2, "eltwise backward");
        expect_near<T>(db.at(i), second, std::fabs(second), 2, "eltwise backward");
      }
    }
}

template <class T>
void check_type() {
  check_stats_type<T>();
  check_finalize_type<T>();
  check_backward_type<T>();
  check_pool_type<T>();
  check_eltwise_type<T>();
}

}  // namespace

void check_training() {
  check_type<float>();
  check_type<double>();
  check_type<bf16>();
  check_type<f16>();
}
