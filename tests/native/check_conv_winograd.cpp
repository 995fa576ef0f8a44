// conv_bn_act_winograd against seven nested loops, at the edges of this instruction set's own tile.
#include "check.h"
#include "kernels/api_winograd.h"
#include "kernels/cpu/winograd.h"

namespace {

using fused_resnet::ConvShape;
using kernels::kRows;
using kernels::VecF;

std::vector<ConvShape> shapes() {
  const int64_t width = kernels::kMaxVecs * kernels::kLanes<float>;
  std::vector<ConvShape> all;
  auto add = [&](int64_t batch, int64_t height, int64_t across, int64_t in, int64_t out,
                 int64_t padding = 1) {
    all.push_back(measured(conv_shape(batch, height, across, in, out, 3, 1, padding)));
  };
  for (int64_t n = 1; n <= 9; ++n) {
    add(1 + n % 2, n, 10 - n, 5, 7);
    if (n > 2) add(1, n, 5, 5, 7, 0);
  }
  for (int64_t out : {int64_t(1), width - 1, width, width + 1, 2 * width + 3}) add(1, 5, 6, 3, out);
  for (int64_t in : {15, 16, 17, FR_SUM_STEPS + 1}) add(2, 4, 3, in, 9);
  for (int64_t tiles : {kRows - 1, kRows, kRows + 1, 3 * kRows + 1})
    for (int64_t tile : {2, 4}) add(1, tile, tiles * tile, 4, 5);
  add(1, 3, 4, 4, 5, 6);                                            // whole tiles in the padding
  add(0, 3, 3, 4, 5);                                               // no images
  add(2, 14, 2 * (FR_WINOGRAD_BLOCK / (16 * 192 * 7) + 1), 32, 8);  // more than one block
  return all;
}

// The transforms' matrices, absolutely, as the kernel has them.
template <int kOut>
struct Matrices {
  static constexpr int kIn = kOut + 2;
  double a[kIn][kOut], g[kIn][3], b[kIn][kIn];

  Matrices() {
    for (int at = 0; at < kIn; ++at) {
      double tap[3] = {}, u[kIn];
      VecF one[kIn] = {}, v[kIn], y[kOut];
      one[at] += 1;
      kernels::Winograd<kOut>::input(one, v);
      kernels::Winograd<kOut>::output(one, y);
      for (int k = 0; k < kIn; ++k) b[k][at] = std::fabs(v[k][0]);
      for (int i = 0; i < kOut; ++i) a[at][i] = std::fabs(y[i][0]);
      if (at >= 3) continue;
      tap[at] = 1;
      kernels::Winograd<kOut>::weight(tap, u);
      for (int k = 0; k < kIn; ++k) g[k][at] = std::fabs(u[k]);
    }
  }
};

template <int kOut>
struct Problem {
  static constexpr int kIn = kOut + 2;
  const ConvShape& s;
  Array<float> x, weight, residual, scale, shift;
  int64_t weight_stride[4];
  Act act;

  Problem(const ConvShape& shape, int layout, bool epilogue)
      : s(shape),
        x(s.batch * s.height * s.width * s.in_channels),
        weight(s.out_channels * s.in_channels * 9),
        residual(s.batch * s.out_height * s.out_width * s.out_channels, epilogue),
        scale(s.out_channels, epilogue),
        shift(s.out_channels, epilogue),
        act(epilogue ? Act::relu : Act::none) {
    for (Array<float>* each : {&x, &weight, &residual, &scale, &shift}) each->fill();
    lay_out_weight(s, layout, weight_stride);
  }

  double x_at(int64_t image, int64_t h, int64_t w, int64_t c) const {
    const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
    return inside ? x.at(((image * s.height + h) * s.width + w) * s.in_channels + c) : 0;
  }
  double weight_at(int64_t out, int64_t c, int64_t i, int64_t j) const {
    return weight.at(out * weight_stride[0] + c * weight_stride[1] + i * weight_stride[2] +
                     j * weight_stride[3]);
  }

  // What is added up for each output, every term replaced by its absolute value.
  std::vector<double> magnitudes() const {
    static const Matrices<kOut> m;
    std::vector<double> u(s.out_channels * s.in_channels * kIn * kIn), all(residual.size());
    for (int64_t each = 0; each < s.out_channels * s.in_channels; ++each)
      for (int k = 0; k < kIn; ++k)
        for (int l = 0; l < kIn; ++l)
          for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j)
              u[(each * kIn + k) * kIn + l] +=
                  m.g[k][i] * m.g[l][j] *
                  std::fabs(weight_at(each / s.in_channels, each % s.in_channels, i, j));
    for (int64_t image = 0; image < s.batch; ++image)
      for (int64_t top = 0; top < s.out_height; top += kOut)
        for (int64_t left = 0; left < s.out_width; left += kOut) tile(m, u, image, top, left, all);
    return all;
  }

  void tile(const Matrices<kOut>& m, const std::vector<double>& u, int64_t image, int64_t top,
            int64_t left, std::vector<double>& all) const {
    std::vector<double> v(s.in_channels * kIn * kIn);
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int i = 0; i < kIn; ++i)
        for (int j = 0; j < kIn; ++j) {
          const int64_t h = top + i - s.padding[0], w = left + j - s.padding[1];
          const double d = std::fabs(x_at(image, h, w, c));
          for (int k = 0; d && k < kIn; ++k)
            for (int l = 0; l < kIn; ++l) v[(c * kIn + k) * kIn + l] += m.b[k][i] * m.b[l][j] * d;
        }
    for (int64_t out = 0; out < s.out_channels; ++out)
      for (int k = 0; k < kIn; ++k)
        for (int l = 0; l < kIn; ++l) {
          double product = 0;
          for (int64_t c = 0; c < s.in_channels; ++c)
            product +=
                u[((out * s.in_channels + c) * kIn + k) * kIn + l] * v[(c * kIn + k) * kIn + l];
          for (int64_t i = 0; i < kOut && top + i < s.out_height; ++i)
            for (int64_t j = 0; j < kOut && left + j < s.out_width; ++j)
              all[((image * s.out_height + top + i) * s.out_width + left + j) * s.out_channels +
                  out] += m.a[k][i] * m.a[l][j] * product;
        }
  }

  void check(const Array<float>& out, const std::string& what) const {
    // Through two transforms each way of two additions and multiplications in each dimension, the
    // sum over channels, and the epilogue.
    const int64_t steps = s.in_channels + 2 * 4 * 2 + 1 + 2 * 4 * 2 + 4;
    const std::vector<double> magnitude = magnitudes();
    for (int64_t at = 0; at < out.size(); ++at) {
      const Sum sum = convolved(
          s, at, [&](int64_t i) { return x.at(i); },
          [&](int64_t k, int64_t c, int64_t i, int64_t j) { return weight_at(k, c, i, j); });
      const int64_t k = at % s.out_channels;
      const double a = scale.at(k, 1), b = shift.at(k, 0), r = residual.at(at, 0);
      expect_near<float>(out.at(at), activate(sum.value * a + b + r, act),
                         magnitude[at] * std::fabs(a) + std::fabs(b) + std::fabs(r), steps, what);
    }
  }
};

template <int kOut>
void check_shape(const ConvShape& s, int layout, bool epilogue) {
  const Problem<kOut> problem(s, layout, epilogue);
  const std::string what = "conv_bn_act_winograd " + std::to_string(kOut) + " of " +
                           std::to_string(s.in_channels) + "x" + std::to_string(s.height) + "x" +
                           std::to_string(s.width) + "->" + std::to_string(s.out_channels);
  fused_resnet::ConvBnActWinogradArgs args{{}, kOut};
  fused_resnet::ConvBnActArgs& a = args.conv;
  a.dtype = DType::f32;
  a.act = problem.act;
  a.shape = s;
  a.x = problem.x.data();
  for (int d = 0; d < 4; ++d) a.weight_stride[d] = problem.weight_stride[d];
  a.scale = problem.scale.data();
  a.shift = problem.shift.data();
  a.residual = problem.residual.data();

  ConvShape pointwise = s;
  pointwise.kernel[0] = pointwise.kernel[1] = 1;
  constexpr int64_t kProducts = (kOut + 2) * (kOut + 2);
  Array<float> packed(kProducts * kernels::conv_packed_size(DType::f32, pointwise));
  fused_resnet::ConvWinogradPackArgs pack{{DType::f32, s, problem.weight.data(), {}, packed.data()},
                                          kOut};
  for (int d = 0; d < 4; ++d) pack.pack.weight_stride[d] = problem.weight_stride[d];
  expect(kernels::conv_winograd_pack(pack, pool(3)) == Status::ok, what);

  Array<float> first(problem.residual.size());
  for (int threads : {3, 1})
    for (bool packs : {false, true}) {
      Array<float> out(first.size());
      a.weight = packs ? problem.weight.data() : nullptr;
      a.packed = packs ? nullptr : packed.data();
      a.out = out.data();
      expect(kernels::conv_bn_act_winograd(args, pool(threads)) == Status::ok, what);
      if (threads == 3 && !packs) {
        problem.check(out, what);
        memcpy(first.data(), out.data(), out.size() * sizeof(float));
      }
      expect(out.same(first), what + ": bits differ with threads or packing");
    }
}

}  // namespace

void check_conv_winograd() {
  int layout = 0;
  for (const ConvShape& s : shapes())
    for (bool epilogue : {true, false}) {
      check_shape<2>(s, layout, epilogue);
      check_shape<4>(s, layout, epilogue);
      layout = (layout + 1) % 3;
    }
}
