#include "masked_grad.h"

FR_NAMESPACE_BEGIN

Status bn_act_backward(const BnActBackwardArgs& args, const Pool& pool) {
  const MaskedGrad& in = args.in;
  return dispatch(in, [&](auto type, auto masked) {
    using T = decltype(type);
    using A = Acc<T>;
    const A* a = static_cast<const A*>(args.a);
    const A* b = static_cast<const A*>(args.b);
    const A* c = static_cast<const A*>(args.c);
    T* dx = static_cast<T*>(args.dx);
    struct Prepared {
      typename decltype(masked)::Prepared mask;
      Vec<A> a, b, c;
    };
    map_channels<A>(
        pool, in.outer, in.channels, in.inner,
        [&](auto constant) FR_LAMBDA {
          return Prepared{masked.prepare(constant), constant(a), constant(b), constant(c)};
        },
        [&](const Prepared& p, int64_t at, auto lanes) FR_LAMBDA {
          Vec<A> d = p.a * masked(p.mask, at, lanes) + p.c;
          if (in.x) d += p.b * load(masked.x + at, lanes);
          store(dx + at, d, lanes);
        });
    return Status::ok;
  });
}

FR_NAMESPACE_END
