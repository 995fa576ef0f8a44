// conv_wgrad against nested loops, at the edges of this instruction set's own tile.
#include "check.h"

namespace {

using fused_resnet::ConvShape;

template <class T>
std::vector<ConvShape> shapes() {
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  std::vector<ConvShape> all;
  auto add = [&](const ConvShape& s) { all.push_back(measured(s)); };
  for (int64_t in : {int64_t(1), lanes - 1, lanes, lanes + 1, 3 * lanes, 4 * lanes + 1})
    for (int64_t kernel : {1, 3}) add(conv_shape(1, 3, 5, in, 9, kernel, 1, kernel / 2));
  for (int64_t out : {1, 2, 7, 8, 17}) add(conv_shape(2, 4, 3, 5, out, 3, 2, 1));
  for (int64_t pixels : {FR_FLAT_ROW - 1, FR_FLAT_ROW, FR_FLAT_ROW + 1, FR_CHUNK_STEPS / 2 + 1})
    add(conv_shape(1, 1, pixels, 5, 3, 1));
  add(conv_shape(1, 2, FR_CHUNK_STEPS + 1, 3, 3, 3, 1, 1));  // rows longer than a chunk
  add(conv_shape(3, 20, 21, 2, 3, 3, 1, 1));                 // chunks that span images
  add(conv_shape(2, 31, 40, 2, 3, 1));                       // ranges
  add(conv_shape(1, 2, 2, 4, FR_MOST_OUT_CHANNELS + 3, 1));
  add(conv_shape(1, 11, 9, 3, 8, 7, 2, 3));        // the stem
  add(conv_shape(2, 5, 4, 9, 17, 1, 2));           // a projection
  add(conv_shape(2, 5, 4, 6, 18, 3, 1, 1, 1, 3));  // groups
  add(conv_shape(2, 4, 4, 40, 40, 3, 1, 1, 1, 40));
  add(conv_shape(1, 7, 6, 4, 5, 3, 1, 2, 2));  // dilation
  add(conv_shape(2, 3, 3, 4, 5, 1, 3, 4));     // whole windows in the padding
  add(conv_shape(1, 1, 1, 1, 1, 3, 1, 1));
  add(conv_shape(0, 3, 3, 4, 5, 3, 1, 1));  // no images
  return all;
}

template <class T>
void check_one(const ConvShape& s, bool scaled) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t elements = s.out_channels * s.kernel[0] * s.kernel[1] * group_in;
  Array<T> x(s.batch * s.height * s.width * s.in_channels);
  Array<T> grad(s.batch * s.out_height * s.out_width * s.out_channels);
  Array<Acc<T>> scale(s.in_channels, scaled), shift(s.in_channels, scaled);
  Array<Acc<T>> dw(elements), first(elements);
  x.fill();
  grad.fill();
  scale.fill();
  shift.fill();
  const Act act = scaled ? Act::relu : Act::none;
  for (int threads : {3, 1}) {
    const fused_resnet::ConvWgradArgs args{
        Type<T>::dtype, act, s, grad.data(), x.data(), scale.data(), shift.data(), dw.data()};
    expect(kernels::conv_wgrad(args, pool(threads)) == Status::ok, "conv_wgrad");
    if (threads == 3) memcpy(first.data(), dw.data(), elements * sizeof(Acc<T>));
    expect(dw.same(first), "conv_wgrad: bits differ with threads");
  }
  int64_t at = 0;
  for (int64_t k = 0; k < s.out_channels; ++k)
    for (int64_t kh = 0; kh < s.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < s.kernel[1]; ++kw)
        for (int64_t c = 0; c < group_in; ++c, ++at) {
          const int64_t in = k / group_out * group_in + c;
          double sum = 0, magnitude = 0;
          for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t oh = 0; oh < s.out_height; ++oh)
              for (int64_t ow = 0; ow < s.out_width; ++ow) {
                const int64_t h = oh * s.stride[0] - s.padding[0] + kh * s.dilation[0];
                const int64_t w = ow * s.stride[1] - s.padding[1] + kw * s.dilation[1];
                if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
                double z = x.at(((n * s.height + h) * s.width + w) * s.in_channels + in);
                z = activate(z * scale.at(in, 1) + shift.at(in, 0), act);
                const double g =
                    grad.at(((n * s.out_height + oh) * s.out_width + ow) * s.out_channels + k);
                sum += g * z;
                magnitude += std::fabs(g) * (scaled ? 2 : std::fabs(z));  // |z| is at most 2
              }
          // z is rounded to T where it is computed.
          const double summed = (s.batch * s.out_height * s.out_width + 8) * Type<Acc<T>>::unit;
          const double bound = (summed + (scaled ? 8 * Type<T>::unit : 0)) * magnitude;
          expect(std::fabs(dw.at(at) - sum) <= bound, "conv_wgrad");
        }
}

template <class T>
void check_type() {
  for (const ConvShape& s : shapes<T>())
    for (bool scaled : {true, false}) check_one<T>(s, scaled);
}

}  // namespace

void check_conv_wgrad() {
  check_type<float>();
  check_type<double>();
  check_type<bf16>();
  check_type<f16>();
}
