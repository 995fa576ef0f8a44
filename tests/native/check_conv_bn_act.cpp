// conv_bn_act against seven nested loops, at the edges of this instruction set's own tile.
#include "check.h"

namespace {

using fused_resnet::ConvShape;
using kernels::kRows;

struct Case {
  ConvShape shape;
  bool thorough;  // every choice of packing, weight layout and epilogue
};

template <class T>
std::vector<Case> cases() {
  const int64_t lanes = kernels::kLanes<Acc<T>>, width = kernels::kMaxVecs * lanes;
  std::vector<Case> all;
  auto add = [&](ConvShape s, bool thorough = false) { all.push_back({measured(s), thorough}); };
  for (int64_t pixels : {kRows - 1, kRows, kRows + 1, 2 * kRows + 1}) {
    add(conv_shape(1, 1, pixels, 5, 7, 1));
    add(conv_shape(1, 1, pixels, 5, 7, 3, 1, 1));
  }
  for (int64_t out :
       {int64_t(1), lanes - 1, lanes, lanes + 1, width - 1, width, width + 1, 2 * width + 3}) {
    add(conv_shape(1, 3, 5, 6, out, 1));
    add(conv_shape(1, 3, 4, 4, out, 3, 1, 1));
    add(conv_shape(1, 3, 4, 6, 2 * out, 3, 1, 1, 1, 2));
  }
  for (int64_t in : {1, 3, 15, 16, 17}) add(conv_shape(2, 4, 3, in, 9, 3, 2, 1));
  add(conv_shape(1, 2, 3, FR_SUM_STEPS + 1, 5, 1));
  add(conv_shape(1, 2, 3, FR_SUM_STEPS / 9 + 1, 5, 3, 1, 1));
  add(conv_shape(1, 11, 9, 3, 8, 7, 2, 3), true);        // the stem
  add(conv_shape(2, 5, 4, 9, 17, 1, 2), true);           // a projection
  add(conv_shape(2, 5, 4, 6, 18, 3, 1, 1, 1, 3), true);  // groups
  add(conv_shape(2, 4, 4, 8, 8, 3, 1, 1, 1, 8), true);   // depthwise
  add(conv_shape(1, 7, 6, 4, 5, 3, 1, 2, 2));            // dilation
  add(conv_shape(2, 3, 3, 4, 5, 1, 3, 4));               // whole windows in the padding
  add(conv_shape(1, 1, 1, 1, 1, 1), true);               // the least there is
  add(conv_shape(0, 3, 3, 4, 5, 3, 1, 1));               // no images
  // Read where it lies, with padding, by both kinds of tile.
  for (int64_t out : {width, 2 * width, 2 * width + 1})
    for (int64_t across : {int64_t(kernels::kWideRows), int64_t(kRows), int64_t(kRows) + 1})
      add(conv_shape(2, 3, across, 2 * FR_SHORT_DEPTH, out, 3, 1, 1), out == 2 * width);
  add(conv_shape(1, 5, 7, 2 * FR_SHORT_DEPTH + 1, 2 * width, 5, 1, 4, 2));
  for (int64_t stride : {1, 2})  // pixels are copied
    add(conv_shape(1, 3, 4, FR_SET_BYTES / sizeof(T), 2 * width, 1, stride), stride == 2);
  ConvShape oblong = conv_shape(2, 6, 7, 5, 9, 1);
  oblong.kernel[0] = 4;
  oblong.kernel[1] = 2;
  oblong.stride[1] = 2;
  oblong.padding[0] = 2;
  oblong.dilation[1] = 3;
  add(oblong, true);
  // Enough pixels for more than one chunk, and for packing before the pass.
  const int64_t pixels = FR_PACK_IN_PASS / (48 * sizeof(Acc<T>)) + 1;
  add(conv_shape(2, 3, pixels / 6 + 1, 16, 32, 1));
  add(conv_shape(1, 2, pixels / 2 + 1, 16, 32, 3, 1, 1));
  return all;
}

template <class T>
struct Problem {
  ConvShape s;
  Array<T> x, weight, residual;
  Array<Acc<T>> scale, shift;
  int64_t weight_stride[4];
  Act act;

  Problem(const ConvShape& shape, int weight_layout, bool epilogue)
      : s(shape),
        x(s.batch * s.height * s.width * s.in_channels),
        weight(s.out_channels * s.in_channels / s.groups * s.kernel[0] * s.kernel[1]),
        residual(s.batch * s.out_height * s.out_width * s.out_channels, epilogue),
        scale(s.out_channels, epilogue),
        shift(s.out_channels, epilogue),
        act(epilogue ? Act::relu : Act::none) {
    x.fill();
    weight.fill();
    residual.fill();
    scale.fill();
    shift.fill();
    lay_out_weight(s, weight_layout, weight_stride);
  }

  fused_resnet::ConvBnActArgs args(const Array<Element<T>>* packed, Array<T>& out) const {
    fused_resnet::ConvBnActArgs a{};
    a.dtype = Type<T>::dtype;
    a.act = act;
    a.shape = s;
    a.x = x.data();
    a.weight = packed ? nullptr : weight.data();
    for (int d = 0; d < 4; ++d) a.weight_stride[d] = weight_stride[d];
    a.packed = packed ? packed->data() : nullptr;
    a.scale = scale.data();
    a.shift = shift.data();
    a.residual = residual.data();
    a.out = out.data();
    return a;
  }

  void check(const Array<T>& out, const std::string& what) const {
    const int64_t steps = s.kernel[0] * s.kernel[1] * s.in_channels / s.groups + 4;
    for (int64_t at = 0; at < out.size(); ++at) {
      const Sum sum = convolved(
          s, at, [&](int64_t i) { return x.at(i); },
          [&](int64_t k, int64_t c, int64_t kh, int64_t kw) {
            return weight.at(k * weight_stride[0] + c * weight_stride[1] + kh * weight_stride[2] +
                             kw * weight_stride[3]);
          });
      const int64_t k = at % s.out_channels;
      const double a = scale.at(k, 1), b = shift.at(k, 0), r = residual.at(at, 0);
      const double magnitude = sum.magnitude * std::fabs(a) + std::fabs(b) + std::fabs(r);
      expect_near<T>(out.at(at), activate(sum.value * a + b + r, act), magnitude, steps, what);
    }
  }
};

template <class T>
void check_case(const Case& c) {
  const int64_t packed_size = kernels::conv_packed_size(Type<T>::dtype, c.shape);
  for (int layout = 0; layout < (c.thorough ? 3 : 1); ++layout)
    for (bool epilogue : {true, false}) {
      if (!epilogue && !c.thorough) continue;
      const Problem<T> problem(c.shape, layout, epilogue);
      const std::string what = "conv_bn_act " + std::to_string(c.shape.in_channels) + "->" +
                               std::to_string(c.shape.out_channels) + " k" +
                               std::to_string(c.shape.kernel[0]) + " dtype " +
                               std::to_string(static_cast<int>(Type<T>::dtype));
      Array<Element<T>> packed(packed_size);
      fused_resnet::ConvPackArgs pack{
          Type<T>::dtype, c.shape, problem.weight.data(), {}, packed.data()};
      for (int d = 0; d < 4; ++d) pack.weight_stride[d] = problem.weight_stride[d];
      expect(kernels::conv_pack(pack, pool(3)) == Status::ok, what);
      Array<T> first(problem.residual.size());
      for (int threads : {3, 1})
        for (const Array<Element<T>>* weights :
             {static_cast<Array<Element<T>>*>(nullptr), &packed}) {
          Array<T> out(first.size());
          expect(kernels::conv_bn_act(problem.args(weights, out), pool(threads)) == Status::ok,
                 what);
          if (threads == 3 && !weights) {
            problem.check(out, what);
            memcpy(first.data(), out.data(), out.size() * sizeof(T));
          }
          expect(out.same(first), what + ": bits differ with threads or packing");
        }
    }
}

template <class T>
void check_type() {
  for (const Case& c : cases<T>()) check_case<T>(c);
}

}  // namespace

void check_conv_bn_act() {
  check_type<float>();
  check_type<double>();
  check_type<bf16>();
  check_type<f16>();
}
