// From fp32 to 8 bits.
#pragma once

#include "vec.h"

FR_NAMESPACE_BEGIN

// min(max(round(y) + zero, 0), 255), rounded to even. What is below `least`, and NaN, becomes that.
struct ToBytes {
  VecF least, most;
  VecI offset;

  // Added to a number of less than 22 bits, this leaves no bits for a fraction.
  static constexpr float kRound = 0x1.8p23f;

  FR_LAMBDA ToBytes(int zero, bool relu)
      : least(splat(relu ? 0.0f : static_cast<float>(-zero))),
        most(splat(static_cast<float>(255 - zero))),
        offset(zero - (VecI)splat(kRound)) {}

  FR_LAMBDA VecI operator()(VecF y) const {
    return (VecI)(smaller(larger(y, least), most) + kRound) + offset;
  }
};

FR_NAMESPACE_END
