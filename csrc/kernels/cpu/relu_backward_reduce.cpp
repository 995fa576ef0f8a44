#include "masked_grad.h"

FR_NAMESPACE_BEGIN

Status relu_backward_reduce(const ReluBackwardReduceArgs& args, const Pool& pool) {
  const MaskedGrad& in = args.in;
  return dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    using View = Masked<T, Mask::of_out>;
    const View masked(in);
    T* g = static_cast<T*>(args.g);
    return sum_channels<1, A>(
        pool, Blocks(in.outer, in.channels, in.inner),
        [&](auto constant) FR_LAMBDA { return masked.prepare(constant); },
        [&](const typename View::Prepared& p, int64_t at, auto lanes, Vec<A>* terms) FR_LAMBDA {
          terms[0] = masked(p, at, lanes);
          store(g + at, terms[0], lanes);
        },
        [&](int64_t c, const double* sums) {
          static_cast<A*>(args.sum_g)[c] = static_cast<A>(sums[0]);
        });
  });
}

FR_NAMESPACE_END
