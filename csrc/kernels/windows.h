// Which positions of the input a pooling's windows read, on every device.
#pragma once

#include "math.h"

namespace fused_resnet {

// Kernel position k reads input position begin + k * dilation, which lies inside the input for k
// from `first` up to `last`.
struct Window {
  int64_t begin;
  int64_t first, last;
};

// Of output row (d = 0) or column (d = 1) `out`.
FR_INLINE Window window(const PoolShape& s, int d, int64_t out) {
  const int64_t size = d == 0 ? s.height : s.width, step = s.dilation[d];
  const int64_t begin = out * s.stride[d] - s.padding[d];
  const bool fits = begin + (s.kernel[d] - 1) * step < size;  // dividing takes long
  return {begin, begin < 0 ? (-begin + step - 1) / step : 0,
          fits ? s.kernel[d] : (size - begin + step - 1) / step};
}

}  // namespace fused_resnet
