// How the gradient of a convolution's input is made of convolutions of the output's gradient: with
// a stride s, of s along each axis, one for each of the input's phases.
#pragma once

#include "math.h"

namespace fused_resnet {

// What input positions first, first + stride, ... have in common along one axis: the same kernel
// positions reach them, at neighbouring pixels of the gradient, from the last one backwards.
struct Phase {
  int64_t first, size;
  int64_t taps;        // kernel positions that reach them,
  int64_t last, step;  // the last of these and from one to the next
  int64_t dilation, padding;
};

FR_INLINE Phase phase_of(const ConvShape& s, int axis, int64_t first) {
  const int64_t stride = s.stride[axis], dilation = s.dilation[axis], kernel = s.kernel[axis];
  int64_t divisor = stride;
  for (int64_t rest = dilation; rest != 0;) {
    const int64_t next = divisor % rest;
    divisor = rest;
    rest = next;
  }
  Phase p{};
  p.first = first;
  p.size = ((axis == 0 ? s.height : s.width) - first + stride - 1) / stride;
  p.step = stride / divisor;
  p.dilation = dilation / divisor;
  const int64_t at = first + s.padding[axis];
  int64_t tap = 0;
  while (tap < kernel && (at - tap * dilation) % stride != 0) ++tap;
  if (tap == kernel) return p;
  p.taps = (kernel - 1 - tap) / p.step + 1;
  p.last = tap + (p.taps - 1) * p.step;
  p.padding = (p.taps - 1) * p.dilation - (at - tap * dilation) / stride;
  return p;
}

}  // namespace fused_resnet
