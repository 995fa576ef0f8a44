// BatchNorm's gradient of its input, as api.h has it at BnActBackwardArgs.
#pragma once

#include "../math.h"
#include "buffer.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

// dx = scale * g + slope * (x - mean) + offset, of fixed statistics scale * g.
template <class A>
class BnGradient {
 public:
  struct Prepared {
    Vec<A> scale, mean, slope, offset;
  };

  BnGradient(const void* scale, const BatchSums& batch, int64_t channels)
      : constants_(2 * channels),
        batch_(batch.sum_g),
        scale_(static_cast<const A*>(scale)),
        slope_(constants_.data),
        offset_(constants_.data + channels),
        mean_(batch_ ? static_cast<const A*>(batch.mean) : slope_) {
    if (!has_memory()) return;
    auto get = [](const void* p, int64_t c) -> double { return static_cast<const A*>(p)[c]; };
    for (int64_t c = 0; c < channels; ++c) {
      math::GradientTerms<A> terms{};
      if (batch_)
        terms = math::gradient_terms<A>(get(scale, c), get(batch.invstd, c), get(batch.sum_g, c),
                                        get(batch.sum_gx, c), batch.count);
      constants_.data[c] = terms.slope;
      constants_.data[channels + c] = terms.offset;
    }
  }

  bool has_memory() const { return constants_.data; }

  // Zeros of fixed statistics: a branch for every vector would be slower.
  template <class Constant>
  FR_LAMBDA Prepared prepare(const Constant& constant) const {
    return {constant(scale_), constant(mean_), constant(slope_), constant(offset_)};
  }

  // x may be null where statistics are fixed.
  template <class T, class Lanes>
  FR_LAMBDA Vec<A> operator()(const Prepared& p, Vec<A> g, const T* x, int64_t at,
                              Lanes lanes) const {
    Vec<A> dx = p.scale * g + p.offset;
    if (batch_) dx += p.slope * (load(x + at, lanes) - p.mean);
    return dx;
  }

 private:
  Workspace<A> constants_;
  bool batch_;
  const A *scale_, *slope_, *offset_, *mean_;
};

FR_NAMESPACE_END
