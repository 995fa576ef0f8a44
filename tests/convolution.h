// Convolutions for the checks in C++, on either device: their shapes, and one output in double.
#pragma once

#include <cmath>

#include "../csrc/kernels/api.h"

// A convolution; its output size is left to measured().
inline fused_resnet::ConvShape conv_shape(int64_t batch, int64_t height, int64_t width, int64_t in,
                                          int64_t out, int64_t kernel, int64_t stride = 1,
                                          int64_t padding = 0, int64_t dilation = 1,
                                          int64_t groups = 1) {
  fused_resnet::ConvShape s{batch, height, width, in, 0, 0, out, {}, {}, {}, {}, groups};
  for (int i = 0; i < 2; ++i) {
    s.kernel[i] = kernel;
    s.stride[i] = stride;
    s.padding[i] = padding;
    s.dilation[i] = dilation;
  }
  return s;
}

inline fused_resnet::ConvShape measured(fused_resnet::ConvShape s) {
  auto length = [&](int64_t n, int i) {
    return (n + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1) - 1) / s.stride[i] + 1;
  };
  s.out_height = length(s.height, 0);
  s.out_width = length(s.width, 1);
  return s;
}

struct Sum {
  double value = 0, magnitude = 0;  // of the terms, and of their absolute values
};

// The output element `at` of a channels_last image: x(i) is an element of the input, and
// weight(k, c, h, w) that of an output channel k for the c-th input channel of its group.
template <class X, class Weight>
Sum convolved(const fused_resnet::ConvShape& s, int64_t at, const X& x, const Weight& weight) {
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const int64_t k = at % s.out_channels, pixel = at / s.out_channels;
  const int64_t ow = pixel % s.out_width, oh = pixel / s.out_width % s.out_height;
  const int64_t image = pixel / s.out_width / s.out_height;
  Sum sum;
  for (int64_t kh = 0; kh < s.kernel[0]; ++kh)
    for (int64_t kw = 0; kw < s.kernel[1]; ++kw) {
      const int64_t h = oh * s.stride[0] - s.padding[0] + kh * s.dilation[0];
      const int64_t w = ow * s.stride[1] - s.padding[1] + kw * s.dilation[1];
      if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
      for (int64_t c = 0; c < in; ++c) {
        const double product =
            x(((image * s.height + h) * s.width + w) * s.in_channels + k / out * in + c) *
            weight(k, c, kh, kw);
        sum.value += product;
        sum.magnitude += std::fabs(product);
      }
    }
  return sum;
}
