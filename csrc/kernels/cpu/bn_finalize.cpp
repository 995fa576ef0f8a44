#include "../math.h"
#include "vec.h"

FR_NAMESPACE_BEGIN

namespace {

template <class R>
FR_VEC void update(void* running, int64_t c, double value, double momentum) {
  R* at = static_cast<R*>(running) + c;
  const double before = load_one(at);
  const double after = (1 - momentum) * before + momentum * value;
  store(at, splat(static_cast<Acc<R>>(after)), 1);
}

// In fp64: a few thousand numbers at most.
template <class A, class R>
void finalize(const BnFinalizeArgs& args) {
  auto get = [](const void* p, int64_t c) -> double { return static_cast<const A*>(p)[c]; };
  auto put = [](void* p, int64_t c, double v) { return static_cast<A*>(p)[c] = static_cast<A>(v); };
  for (int64_t c = 0; c < args.channels; ++c) {
    const double mean = get(args.mean, c), m2 = get(args.m2, c);
    const double invstd = put(args.invstd, c, 1 / math::square_root(m2 / args.count + args.eps));
    // The shift makes up for what rounding the scale does to the mean.
    const double scale = put(args.scale, c, args.weight ? get(args.weight, c) * invstd : invstd);
    put(args.shift, c, (args.bias ? get(args.bias, c) : 0) - mean * scale);
    if (!args.running_mean || args.count == 0) continue;
    update<R>(args.running_mean, c, mean, args.momentum);
    update<R>(args.running_var, c, m2 / (args.count - 1), args.momentum);
  }
}

}  // namespace

Status bn_finalize(const BnFinalizeArgs& args, const Pool&) {
  if (args.dtype != DType::f32 && args.dtype != DType::f64) return Status::unsupported;
  return dispatch(args.running_dtype, [&](auto type) {
    using R = decltype(type);
    if (args.dtype == DType::f32)
      finalize<float, R>(args);
    else
      finalize<double, R>(args);
    return Status::ok;
  });
}

FR_NAMESPACE_END
