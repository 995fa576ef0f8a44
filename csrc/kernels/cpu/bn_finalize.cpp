#include "../math.h"
#include "vec.h"

FR_NAMESPACE_BEGIN

namespace {

template <class R>
FR_VEC void update(void* running, int64_t c, double value, double momentum) {
  R* at = static_cast<R*>(running) + c;
  const double after = math::running_average(load_one(at), value, momentum);
  store(at, splat(static_cast<Acc<R>>(after)), 1);
}

// In fp64: a few thousand numbers at most.
template <class A, class R>
void finalize(const BnFinalizeArgs& args) {
  auto get = [](const void* p, int64_t c) -> double { return static_cast<const A*>(p)[c]; };
  auto put = [](void* p, int64_t c, A v) { static_cast<A*>(p)[c] = v; };
  for (int64_t c = 0; c < args.channels; ++c) {
    const double mean = get(args.mean, c), m2 = get(args.m2, c);
    const auto made =
        math::normalization<A>(mean, m2, args.count, args.weight ? get(args.weight, c) : 1,
                               args.bias ? get(args.bias, c) : 0, args.eps);
    put(args.scale, c, made.scale);
    put(args.shift, c, made.shift);
    put(args.invstd, c, made.invstd);
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
