#include "../math.h"
#include "vec.h"

FR_NAMESPACE_BEGIN

namespace {

constexpr int64_t kGrain = 16384;  // elements; below this a second thread costs more than it brings

// One run of n elements. kPerElement: scale and shift are arrays beside x (channels_last), else one
// value each for the whole run (contiguous).
template <class T, bool kPerElement>
FR_VEC void run(const T* x, const Acc<T>* scale, const Acc<T>* shift, const T* residual, T* out,
                int64_t n, Act act) {
  using A = Acc<T>;
  Vec<A> a = kPerElement ? Vec<A>{} : splat(*scale);
  Vec<A> b = kPerElement ? Vec<A>{} : splat(*shift);
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    if constexpr (kPerElement) {
      a = load(scale + i);
      b = load(shift + i);
    }
    Vec<A> y = math::scale_shift(load(x + i), a, b);
    if (residual) y += load(residual + i);
    store(out + i, math::activate(y, act));
  }
  if (int64_t rest = n - i) {
    if constexpr (kPerElement) {
      a = load(scale + i, rest);
      b = load(shift + i, rest);
    }
    Vec<A> y = math::scale_shift(load(x + i, rest), a, b);
    if (residual) y += load(residual + i, rest);
    store(out + i, math::activate(y, act), rest);
  }
}

}  // namespace

Status bn_act(const BnActArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const T* x = static_cast<const T*>(args.x);
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    const T* residual = static_cast<const T*>(args.residual);
    T* out = static_cast<T*>(args.out);
    const int64_t channels = args.channels, inner = args.inner;
    const bool channels_last = inner == 1;
    // A row is a pixel's channels or, contiguous, a channel's pixels.
    const int64_t length = channels_last ? channels : inner;
    const int64_t rows = channels_last ? args.outer : args.outer * channels;
    if (length == 0) return Status::ok;
    parallel(pool, rows, kGrain / length + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * length;
        const T* res = residual ? residual + at : nullptr;
        if (channels_last) {
          run<T, true>(x + at, scale, shift, res, out + at, length, args.act);
        } else {
          const int64_t c = row % channels;
          run<T, false>(x + at, scale + c, shift + c, res, out + at, length, args.act);
        }
      }
    });
    return Status::ok;
  });
}

Status bn_scale_shift(const BnScaleShiftArgs& args, const Pool&) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    auto value = [](const void* p, int64_t c, A otherwise) {
      return p ? load_one(static_cast<const T*>(p) + c) : otherwise;
    };
    for (int64_t c = 0; c < args.channels; ++c) {
      const A deviation = value(args.var, c, 0) + static_cast<A>(args.eps);
      const A scale = value(args.weight, c, 1) / math::square_root(deviation);
      static_cast<A*>(args.scale)[c] = scale;
      static_cast<A*>(args.shift)[c] = value(args.bias, c, 0) - value(args.mean, c, 0) * scale;
    }
    return Status::ok;
  });
}

FR_NAMESPACE_END
