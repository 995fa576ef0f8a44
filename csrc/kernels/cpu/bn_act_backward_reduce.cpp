#include "masked_grad.h"

FR_NAMESPACE_BEGIN

Status bn_act_backward_reduce(const BnActBackwardReduceArgs& args, const Pool& pool) {
  const MaskedGrad& in = args.in;
  return dispatch(in, [&](auto type, auto masked) {
    using T = decltype(type);
    using A = Acc<T>;
    const A* mean = static_cast<const A*>(args.mean);
    const A* invstd = static_cast<const A*>(args.invstd);
    struct Prepared {
      typename decltype(masked)::Prepared mask;
      Vec<A> mean;
    };
    return sum_channels<2, A>(
        pool, Blocks(in.outer, in.channels, in.inner),
        [&](auto constant) FR_LAMBDA { return Prepared{masked.prepare(constant), constant(mean)}; },
        [&](const Prepared& p, int64_t at, auto lanes, Vec<A>* terms) FR_LAMBDA {
          terms[0] = masked(p.mask, at, lanes);
          terms[1] = terms[0] * (load(masked.x + at, lanes) - p.mean);
        },
        [&](int64_t c, const double* sums) {
          static_cast<A*>(args.sum_g)[c] = static_cast<A>(sums[0]);
          static_cast<A*>(args.sum_gx)[c] = static_cast<A>(sums[1] * invstd[c]);
        });
  });
}

FR_NAMESPACE_END
