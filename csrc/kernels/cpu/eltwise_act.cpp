#include "../math.h"
#include "vec.h"

FR_NAMESPACE_BEGIN

namespace {

constexpr int64_t kGrain = 16384;  // elements; below this a second thread costs more than it brings

template <EltwiseOp op, class V>
FR_VEC V combine(V a, V b) {
  if constexpr (op == EltwiseOp::sum) return a + b;
  if constexpr (op == EltwiseOp::prod) return a * b;
  return math::maximum(a, b);
}

template <class T, EltwiseOp op>
void eltwise(const EltwiseActArgs& args, const Pool& pool) {
  using A = Acc<T>;
  auto input = [&](int i) { return static_cast<const T*>(args.inputs[i]); };
  auto coeff = [&](int i) { return splat(static_cast<A>(args.coeff ? args.coeff[i] : 1.0)); };
  T* out = static_cast<T*>(args.out);
  parallel(pool, args.numel, kGrain, [&](int64_t begin, int64_t end) {
    auto at = [&](int64_t i, auto load_from) {
      Vec<A> sum = load_from(input(0) + i) * coeff(0);
      for (int k = 1; k < args.count; ++k)
        sum = combine<op>(sum, load_from(input(k) + i) * coeff(k));
      return math::activate(sum, args.act);
    };
    int64_t i = begin;
    for (; i + kLanes<A> <= end; i += kLanes<A>)
      store(out + i, at(i, [](const T* p) FR_LAMBDA { return load(p); }));
    if (i < end)
      store(out + i, at(i, [&](const T* p) FR_LAMBDA { return load(p, end - i); }), end - i);
  });
}

}  // namespace

Status eltwise_act(const EltwiseActArgs& args, const Pool& pool) {
  if (args.count < 1) return Status::unsupported;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    switch (args.op) {
      case EltwiseOp::sum:
        eltwise<T, EltwiseOp::sum>(args, pool);
        return Status::ok;
      case EltwiseOp::prod:
        eltwise<T, EltwiseOp::prod>(args, pool);
        return Status::ok;
      case EltwiseOp::max:
        eltwise<T, EltwiseOp::max>(args, pool);
        return Status::ok;
    }
    return Status::unsupported;
  });
}

FR_NAMESPACE_END
