// conv_int8 and quantize against double, at the edges of this instruction set's own tile.
#include "check.h"
#include "kernels/api_int8.h"

template <>
struct Type<uint8_t> {
  static double get(uint8_t x) { return x; }
  static uint8_t make(double x) { return static_cast<uint8_t>(127.5 * (x + 1)); }
};
template <>
struct Type<int8_t> {
  static double get(int8_t x) { return x; }
  static int8_t make(double x) { return static_cast<int8_t>(127.5 * x); }
};

namespace {

using fused_resnet::ConvInt8Args;
using fused_resnet::ConvShape;
using kernels::kRows;
using Packed = kernels::Element<uint8_t>;

std::vector<ConvShape> shapes() {
  const int64_t lanes = kernels::kLanes<int32_t>, width = kernels::kMaxVecs * lanes;
  std::vector<ConvShape> all;
  auto add = [&](ConvShape s) { all.push_back(measured(s)); };
  for (int64_t pixels : {kRows - 1, kRows, kRows + 1, 2 * kRows + 1})
    for (int64_t kernel : {1, 3}) add(conv_shape(1, 1, pixels, 5, 7, kernel, 1, kernel / 2));
  for (int64_t out : {int64_t(1), lanes - 1, lanes + 1, width - 1, width, width + 1, 2 * width + 3})
    add(conv_shape(1, 3, 4, 6, out, 3, 1, 1));
  for (int64_t in : {1, 2, 3, 4, 15, 16, 17}) add(conv_shape(2, 4, 3, in, 9, 3, 2, 1));
  add(conv_shape(1, 2, 3, 4 * FR_SUM_STEPS + 3, 5, 1));
  add(conv_shape(2, 5, 4, 9, 17, 1, 2));           // a projection
  add(conv_shape(2, 5, 4, 6, 18, 3, 1, 1, 1, 3));  // groups
  add(conv_shape(2, 4, 4, 8, 8, 3, 1, 1, 1, 8));   // depthwise
  add(conv_shape(1, 7, 6, 4, 5, 3, 1, 2, 2));      // dilation
  add(conv_shape(2, 3, 3, 4, 5, 1, 3, 4));         // whole windows in the padding
  add(conv_shape(0, 3, 3, 4, 5, 3, 1, 1));         // no images
  // Read where it lies, with padding, by both kinds of tile; pixels that are copied.
  for (int64_t out : {width, 2 * width + 1})
    for (int64_t across : {int64_t(kernels::kWideRows), int64_t(kRows), int64_t(kRows) + 1})
      add(conv_shape(2, 3, across, 4 * FR_SHORT_DEPTH, out, 3, 1, 1));
  add(conv_shape(1, 3, 4, FR_SET_BYTES, 2 * width, 1));
  add(conv_shape(2, 3, FR_PACK_IN_PASS / 288 + 1, 16, 32, 1));
  return all;
}

struct Problem {
  ConvShape s;
  Array<uint8_t> x, bytes;
  Array<int8_t> weight;
  Array<float> floats, scale, shift;
  ConvInt8Args args{};

  Problem(const ConvShape& shape, int kind)
      : s(shape),
        x(s.batch * s.height * s.width * s.in_channels),
        bytes(s.batch * s.out_height * s.out_width * s.out_channels),
        weight(s.out_channels * s.in_channels / s.groups * s.kernel[0] * s.kernel[1]),
        floats(bytes.size()),
        scale(s.out_channels),
        shift(s.out_channels) {
    x.fill();
    bytes.fill();
    weight.fill();
    floats.fill();
    scale.fill();
    shift.fill();
    args.act = kind % 2 ? Act::relu : Act::none;
    args.shape = s;
    args.x = x.data();
    args.x_zero = kind % 2 ? 0 : 130;
    args.scale = scale.data();
    args.shift = shift.data();
    args.residual_is_float = kind == 1;
    args.residual = kind == 0   ? nullptr
                    : kind == 1 ? static_cast<void*>(floats.data())
                                : static_cast<void*>(bytes.data());
    args.residual_scale = 0.5;
    args.out_is_float = kind == 3;
    args.out_zero = kind == 0 ? 100 : 0;
    lay_out_weight(s, kind % 3, args.weight_stride);
    for (int64_t k = 0; k < s.out_channels; ++k) scale.data()[k] *= 1e-2f;
  }

  double added(int64_t at) const {
    return !args.residual ? 0 : args.residual_is_float ? floats.at(at) : bytes.at(at);
  }

  // One result, as a number.
  void check(int64_t at, double got, const std::string& what) const {
    auto weight_at = [&](int64_t k, int64_t c, int64_t kh, int64_t kw) {
      const int64_t* stride = args.weight_stride;
      return weight.at(k * stride[0] + c * stride[1] + kh * stride[2] + kw * stride[3]);
    };
    const int64_t k = at % s.out_channels;
    double zeros = 0;
    for (int64_t c = 0; c < s.in_channels / s.groups; ++c)
      for (int64_t kh = 0; kh < s.kernel[0]; ++kh)
        for (int64_t kw = 0; kw < s.kernel[1]; ++kw) zeros += args.x_zero * weight_at(k, c, kh, kw);
    const Sum sum = convolved(s, at, [&](int64_t i) { return x.at(i) - args.x_zero; }, weight_at);
    const double terms[] = {(sum.value + zeros) * scale.at(k), shift.at(k), added(at) * 0.5};
    double exact = 0, magnitude = 0;
    for (double term : terms) {
      exact += term;
      magnitude += std::fabs(term);
    }
    exact = activate(exact, args.act);
    double bound = 6 * 0x1p-24 * magnitude;
    if (!args.out_is_float) {
      exact = std::fmin(std::fmax(exact + args.out_zero, 0), 255);
      bound += 0.5;
    }
    expect(std::fabs(got - exact) <= bound,
           what + ": got " + std::to_string(got) + ", expected " + std::to_string(exact));
  }
};

template <class Out>
void check_problem(Problem& problem, const std::string& what) {
  ConvInt8Args& args = problem.args;
  Array<Packed> packed(kernels::conv_int8_packed_size(problem.s) / sizeof(Packed));
  fused_resnet::ConvInt8PackArgs pack{problem.s, problem.weight.data(), {}, packed.data()};
  for (int d = 0; d < 4; ++d) pack.weight_stride[d] = args.weight_stride[d];
  expect(kernels::conv_int8_pack(pack, pool(3)) == Status::ok, what);
  Array<Out> first(problem.bytes.size());
  for (int threads : {3, 1})
    for (bool is_packed : {false, true}) {
      Array<Out> out(first.size());
      args.out = out.data();
      args.weight = is_packed ? nullptr : problem.weight.data();
      args.packed = is_packed ? packed.data() : nullptr;
      expect(kernels::conv_int8(args, pool(threads)) == Status::ok, what);
      if (threads == 3 && !is_packed) {
        for (int64_t at = 0; at < out.size(); ++at) problem.check(at, out.at(at), what);
        memcpy(first.data(), out.data(), out.size() * sizeof(Out));
      }
      expect(out.same(first), what + ": bits differ with threads or packing");
    }
}

void check_quantize() {
  for (int64_t n : {int64_t(0), int64_t(1), int64_t(15), int64_t(16), int64_t(17),
                    int64_t(2 * FR_QUANTIZE_GRAIN + 5)}) {
    Array<float> x(n);
    x.fill();
    Array<uint8_t> out(n);
    const fused_resnet::QuantizeArgs args{x.data(), 100, 40, out.data(), n};
    expect(kernels::quantize(args, pool(3)) == Status::ok, "quantize");
    for (int64_t i = 0; i < n; ++i) {
      const double exact = std::fmin(std::fmax(100 * x.at(i) + 40, 0), 255);
      expect(std::fabs(out.at(i) - exact) <= 0.5 + 255 * 0x1p-23, "quantize");
    }
  }
}

}  // namespace

void check_conv_int8() {
  for (const ConvShape& s : shapes())
    for (int kind = 0; kind < 4; ++kind) {
      Problem problem(s, kind);
      const std::string what = "conv_int8 " + std::to_string(s.in_channels) + "->" +
                               std::to_string(s.out_channels) + " k" + std::to_string(s.kernel[0]) +
                               " kind " + std::to_string(kind);
      kind == 3 ? check_problem<float>(problem, what) : check_problem<uint8_t>(problem, what);
    }
  check_quantize();
}
