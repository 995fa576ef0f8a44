#include "bn_gradient.h"
#include "masked_grad.h"

FR_NAMESPACE_BEGIN

Status bn_act_backward(const BnActBackwardArgs& args, const Pool& pool) {
  const MaskedGrad& in = args.in;
  return dispatch(in, [&](auto type, auto masked) {
    using T = decltype(type);
    using A = Acc<T>;
    const BnGradient<A> gradient(in.scale, args.batch, in.channels);
    if (!gradient.has_memory()) return Status::out_of_memory;
    T* dx = static_cast<T*>(args.dx);
    struct Prepared {
      typename decltype(masked)::Prepared mask;
      typename BnGradient<A>::Prepared gradient;
    };
    map_channels<A>(
        pool, in.outer, in.channels, in.inner,
        [&](auto constant)
            FR_LAMBDA { return Prepared{masked.prepare(constant), gradient.prepare(constant)}; },
        [&](const Prepared& p, int64_t at, auto lanes) FR_LAMBDA {
          const Vec<A> g = masked(p.mask, at, lanes);
          store(dx + at, gradient(p.gradient, g, masked.x, at, lanes), lanes);
        });
    return Status::ok;
  });
}

FR_NAMESPACE_END
