#include "../math.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

namespace {

template <class T, EltwiseOp op>
void backward(const EltwiseActBackwardArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const T* out = static_cast<const T*>(args.out);
  auto input = [&](int k, int64_t at, auto lanes)
                   FR_LAMBDA { return load(static_cast<const T*>(args.inputs[k]) + at, lanes); };
  parallel(pool, args.numel, kMapGrain, [&](int64_t begin, int64_t end) {
    for_vectors<A>(end - begin, [&](int64_t i, auto lanes) FR_LAMBDA {
      const int64_t at = begin + i;
      auto put = [&](int k, Vec<A> v)
                     FR_LAMBDA { store(static_cast<T*>(args.grads[k]) + at, v, lanes); };
      Vec<A> g = load(static_cast<const T*>(args.grad) + at, lanes);
      if (args.act == Act::relu) g = math::relu_backward(load(out + at, lanes), g);
      if constexpr (op == EltwiseOp::sum) {
        for (int k = 0; k < args.count; ++k)
          put(k, args.coeff ? g * splat(static_cast<A>(args.coeff[k])) : g);
      } else if constexpr (op == EltwiseOp::prod) {
        // Multiplied out: dividing the product by an input would fail at zero.
        for (int k = 0; k < args.count; ++k) {
          Vec<A> d = g;
          for (int j = 0; j < args.count; ++j)
            if (j != k) d *= input(j, at, lanes);
          put(k, d);
        }
      } else {
        // From the last maximum of two back to the first.
        for (int k = args.count - 1; k > 0; --k) {
          Vec<A> first = input(0, at, lanes);
          for (int j = 1; j < k; ++j) first = math::maximum(first, input(j, at, lanes));
          const auto shares = math::maximum_backward(first, input(k, at, lanes), g);
          put(k, shares.second);
          g = shares.first;
        }
        put(0, g);
      }
    });
  });
}

}  // namespace

Status eltwise_act_backward(const EltwiseActBackwardArgs& args, const Pool& pool) {
  if (args.count < 1) return Status::unsupported;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    switch (args.op) {
      case EltwiseOp::sum:
        backward<T, EltwiseOp::sum>(args, pool);
        return Status::ok;
      case EltwiseOp::prod:
        backward<T, EltwiseOp::prod>(args, pool);
        return Status::ok;
      case EltwiseOp::max:
        backward<T, EltwiseOp::max>(args, pool);
        return Status::ok;
    }
    return Status::unsupported;
  });
}

FR_NAMESPACE_END
