// conv_dgrad against nested loops over what every element of grad reads.
#include "check.h"

namespace {

using fused_resnet::ConvShape;
using kernels::kRows;

template <class T>
void check_one(const ConvShape& s, int layout, bool has_added) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  Array<T> grad(s.batch * s.out_height * s.out_width * s.out_channels);
  Array<T> weight(s.out_channels * group_in * s.kernel[0] * s.kernel[1]);
  Array<T> added(s.batch * s.height * s.width * s.in_channels, has_added);
  grad.fill();
  weight.fill();
  added.fill();
  fused_resnet::ConvDgradArgs args{Type<T>::dtype, s, grad.data(), weight.data(), {}, added.data()};
  lay_out_weight(s, layout, args.weight_stride);
  const int64_t n = s.batch * s.height * s.width * s.in_channels;
  std::vector<double> exact(n), magnitude(n);
  for (int64_t i = 0; i < n; ++i) magnitude[i] = std::fabs(exact[i] = added.at(i, 0));
  for (int64_t i = 0; i < grad.size(); ++i) {
    const int64_t k = i % s.out_channels, pixel = i / s.out_channels;
    const int64_t ow = pixel % s.out_width, oh = pixel / s.out_width % s.out_height;
    const int64_t image = pixel / s.out_width / s.out_height;
    for (int64_t kh = 0; kh < s.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < s.kernel[1]; ++kw) {
        const int64_t h = oh * s.stride[0] - s.padding[0] + kh * s.dilation[0];
        const int64_t w = ow * s.stride[1] - s.padding[1] + kw * s.dilation[1];
        if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
        for (int64_t c = 0; c < group_in; ++c) {
          const int64_t at =
              ((image * s.height + h) * s.width + w) * s.in_channels + k / group_out * group_in + c;
          const int64_t* const by = args.weight_stride;
          const double product =
              grad.at(i) * weight.at(k * by[0] + c * by[1] + kh * by[2] + kw * by[3]);
          exact[at] += product;
          magnitude[at] += std::fabs(product);
        }
      }
  }
  const std::string what = "conv_dgrad " + std::to_string(s.in_channels) + "->" +
                           std::to_string(s.out_channels) + " k" + std::to_string(s.kernel[0]) +
                           " s" + std::to_string(s.stride[0]) + " dtype " +
                           std::to_string(static_cast<int>(Type<T>::dtype));
  Array<T> first(n);
  args.dx = first.data();
  expect(kernels::conv_dgrad(args, pool(3)) == Status::ok, what);
  const int64_t steps = s.kernel[0] * s.kernel[1] * group_out + 4;
  for (int64_t i = 0; i < n; ++i) expect_near<T>(first.at(i), exact[i], magnitude[i], steps, what);
  // One thread, and a result that takes the place of `added`.
  Array<T> dx(added);
  if (!has_added) return;
  args.added = args.dx = dx.data();
  expect(kernels::conv_dgrad(args, pool(1)) == Status::ok, what);
  expect(dx.same(first), what + ": bits differ with threads or in place");
}

template <class T>
void check_type() {
  const int64_t lanes = kernels::kLanes<Acc<T>>, width = kernels::kMaxVecs * lanes;
  auto check = [&](int64_t height, int64_t across, int64_t in, int64_t out, int64_t kernel,
                   int64_t stride, int64_t padding, int64_t dilation = 1, int64_t groups = 1) {
    const ConvShape s =
        measured(conv_shape(2, height, across, in, out, kernel, stride, padding, dilation, groups));
    for (int layout : {0, 1, 2})
      for (bool added : {true, false}) check_one<T>(s, layout, added);
  };
  for (int64_t in : {int64_t(1), lanes - 1, lanes, lanes + 1, width, width + 1}) {
    check(1, kRows + 1, in, 7, 1, 1, 0);
    check(4, 5, in, 2 * FR_SHORT_DEPTH + 1, 3, 1, 1);
    check(5, 4, in, 2 * FR_SHORT_DEPTH, 3, 2, 1);
  }
  for (int64_t stride : {1, 2, 3, 5})
    for (int64_t padding : {0, 1, 2, 4})
      for (int64_t dilation : {1, 2, 3})
        for (int64_t out : {3, 2 * FR_SHORT_DEPTH}) {
          check(7, 9, 5, out, 3, stride, padding, dilation);
          if (dilation == 1) check(6, 3, 5, out, 1, stride, padding);
        }
  check(11, 9, 3, 8, 7, 2, 3);                            // the stem
  check(5, 4, 6, 18, 3, 1, 1, 1, 3);                      // groups
  check(5, 4, 8, 8, 3, 2, 1, 1, 8);                       // depthwise
  check(3, 4, width, FR_SET_BYTES / sizeof(T), 1, 2, 0);  // pixels are copied
  check(40, 2 * FR_SHORT_DEPTH, 2 * lanes, FR_SHORT_DEPTH, 3, 1, 1);
}

}  // namespace

void check_conv_dgrad() {
  check_type<float>();
  check_type<double>();
  check_type<bf16>();
  check_type<f16>();
}
