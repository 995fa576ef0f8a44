#include <limits>

#include "../math.h"
#include "eltwise.cuh"

namespace fused_resnet::cuda {

namespace {

template <class A>
struct Inputs {
  const void* at[kMaxInputs];
  A coeff[kMaxInputs];
  int count;
};

// What combining starts from: with it, the first input comes out unchanged, -0 and NaN included.
template <EltwiseOp op, class A>
constexpr A kIdentity = op == EltwiseOp::sum    ? A(-0.0)
                        : op == EltwiseOp::prod ? A(1)
                                                : -std::numeric_limits<A>::infinity();

// The explicit fma keeps an element's rounding independent of the path that computes it.
template <EltwiseOp op, class A>
__device__ __forceinline__ A combine(A a, A b, A coeff) {
  if constexpr (op == EltwiseOp::sum) return multiply_add(b, coeff, a);
  if constexpr (op == EltwiseOp::prod) return a * b;
  return math::maximum(a, b);
}

// `unroll` vectors of n elements each, `step` vectors apart, as far as they lie before `vectors`.
// No pointer is __restrict__: `out` may be one of the inputs. All loads of a thread precede its
// stores.
template <class T, EltwiseOp op, int n, int unroll>
__device__ __forceinline__ void process(const Inputs<Acc<T>>& inputs, Act act, T* out,
                                        int64_t first, int64_t step, int64_t vectors) {
  Acc<T> result[unroll][n];
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
#pragma unroll
    for (int j = 0; j < n; ++j) result[u][j] = kIdentity<op, Acc<T>>;
  }
#pragma unroll 2
  for (int k = 0; k < inputs.count; ++k) {
    const T* input = static_cast<const T*>(inputs.at[k]);
    const Acc<T> coeff = inputs.coeff[k];
    Vector<T, n> loaded[unroll] = {};
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t i = first + u * step;
      if (i < vectors) loaded[u] = load<n>(input + i * n);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        result[u][j] = combine<op>(result[u][j], widen(loaded[u].at[j]), coeff);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t i = first + u * step;
    if (i >= vectors) return;
    Vector<T, n> rounded;
#pragma unroll
    for (int j = 0; j < n; ++j) rounded.at[j] = narrow<T>(math::activate(result[u][j], act));
    store<n>(out + i * n, rounded);
  }
}

template <class T, EltwiseOp op, int n>
__global__ void __launch_bounds__(Streaming::kThreads, Streaming::kMinBlocksPerMultiprocessor)
    eltwise_act_kernel(const __grid_constant__ Inputs<Acc<T>> inputs, Act act, T* out,
                       int64_t numel) {
  for_vectors<T, n>(
      numel, [&](auto width, auto unroll, int64_t first, int64_t step, int64_t vectors) {
        process<T, op, width.value, unroll.value>(inputs, act, out, first, step, vectors);
      });
}

template <class T, EltwiseOp op>
Status launch_eltwise(const EltwiseActArgs& args, const Place& place) {
  Inputs<Acc<T>> inputs = {};
  inputs.count = args.count;
  bool aligned = vector_aligned(args.out);
  for (int k = 0; k < args.count; ++k) {
    inputs.at[k] = args.inputs[k];
    inputs.coeff[k] = args.coeff ? static_cast<Acc<T>>(args.coeff[k]) : Acc<T>{1};
    aligned = aligned && vector_aligned(args.inputs[k]);
  }
  const auto kernel =
      aligned ? eltwise_act_kernel<T, op, kVectorBytes / sizeof(T)> : eltwise_act_kernel<T, op, 1>;
  return launch(kernel, streaming_blocks<T>(args.numel, place.gpu), Streaming::kThreads, 0,
                place.stream, inputs, args.act, static_cast<T*>(args.out), args.numel);
}

}  // namespace

Status eltwise_act(const EltwiseActArgs& args, const Place& place) {
  return dispatch_eltwise(args, [&](auto type, auto op) {
    return launch_eltwise<decltype(type), op.value>(args, place);
  });
}

}  // namespace fused_resnet::cuda
