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
    for (int64_t c = 0; c < args.channels; c += kLanes<A>) {
      const int64_t n = args.channels - c < kLanes<A> ? args.channels - c : kLanes<A>;
      auto get = [&](const void* p, A otherwise) {
        if (!p) return splat(otherwise);
        const T* from = static_cast<const T*>(p) + c;
        return n == kLanes<A> ? load(from) : load(from, n);
      };
      auto put = [&](void* p, Vec<A> v) { store(static_cast<A*>(p) + c, v, n); };
      Vec<A> scale = get(args.var, 0) + splat(static_cast<A>(args.eps));
      for (int i = 0; i < kLanes<A>; ++i) scale[i] = math::square_root(scale[i]);
      scale = get(args.weight, 1) / scale;
      put(args.scale, scale);
      put(args.shift, get(args.bias, 0) - get(args.mean, 0) * scale);
    }
    return Status::ok;
  });
}

FR_NAMESPACE_END
