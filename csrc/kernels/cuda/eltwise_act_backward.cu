#include "../math.h"
#include "eltwise.cuh"

namespace fused_resnet::cuda {

namespace {

template <class A>
struct Operands {
  const void* grad;
  const void* out;  // null without relu
  const void* inputs[kMaxInputs];
  void* grads[kMaxInputs];
  A coeff[kMaxInputs];
  int count;

  template <int n, class T>
  __device__ __forceinline__ Wide<A, n> input(int k, int64_t at) const {
    return load_wide<n>(static_cast<const T*>(inputs[k]) + at);
  }
};

// From the gradient g of what comes before the activation, n elements of every input's gradient.
template <class T, EltwiseOp op, int n>
__device__ __forceinline__ void backward(const Operands<Acc<T>>& operands, Wide<Acc<T>, n> g,
                                         int64_t at) {
  using A = Acc<T>;
  auto input = [&](int k) { return operands.template input<n, T>(k, at); };
  auto put = [&](int k, const Wide<A, n>& v) {
    store_narrow(static_cast<T*>(operands.grads[k]) + at, v);
  };
  if constexpr (op == EltwiseOp::sum) {
    for (int k = 0; k < operands.count; ++k)
      put(k, each<n>([&](int j) { return g.at[j] * operands.coeff[k]; }));
  } else if constexpr (op == EltwiseOp::prod) {
    // Multiplied out: dividing the product by an input would fail at zero.
    for (int k = 0; k < operands.count; ++k) {
      Wide<A, n> d = g;
      for (int other = 0; other < operands.count; ++other) {
        if (other == k) continue;
        const Wide<A, n> factor = input(other);
        d = each<n>([&](int j) { return d.at[j] * factor.at[j]; });
      }
      put(k, d);
    }
  } else {
    // From the last maximum of two back to the first.
    for (int k = operands.count - 1; k > 0; --k) {
      Wide<A, n> first = input(0);
#pragma unroll 1
      for (int before = 1; before < k; ++before) {
        const Wide<A, n> next = input(before);
        first = each<n>([&](int j) { return math::maximum(first.at[j], next.at[j]); });
      }
      const Wide<A, n> second = input(k);
      put(k, each<n>([&](int j) {
            const auto shares = math::maximum_backward(first.at[j], second.at[j], g.at[j]);
            g.at[j] = shares.first;
            return shares.second;
          }));
    }
    put(0, g);
  }
}

// `unroll` vectors of n elements each, `step` vectors apart, as far as they lie before `vectors`.
template <class T, EltwiseOp op, int n, int unroll>
__device__ __forceinline__ void process(const Operands<Acc<T>>& operands, int64_t first,
                                        int64_t step, int64_t vectors) {
  using A = Acc<T>;
  const T* grad = static_cast<const T*>(operands.grad);
  const T* out = static_cast<const T*>(operands.out);
  Vector<T, n> grads[unroll] = {}, outs[unroll] = {};
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t i = first + u * step;
    if (i >= vectors) break;
    grads[u] = load<n>(grad + i * n);
    if (out) outs[u] = load<n>(out + i * n);
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t i = first + u * step;
    if (i >= vectors) return;
    const Wide<A, n> g = each<n>([&](int j) {
      const A value = widen(grads[u].at[j]);
      return out ? math::relu_backward(widen(outs[u].at[j]), value) : value;
    });
    backward<T, op, n>(operands, g, i * n);
  }
}

template <class T, EltwiseOp op, int n>
__global__ void __launch_bounds__(Streaming::kThreads, Streaming::kMinBlocksPerMultiprocessor)
    eltwise_act_backward_kernel(const __grid_constant__ Operands<Acc<T>> operands, int64_t numel) {
  for_vectors<T, n>(numel,
                    [&](auto width, auto unroll, int64_t first, int64_t step, int64_t vectors) {
                      process<T, op, width.value, unroll.value>(operands, first, step, vectors);
                    });
}

template <class T, EltwiseOp op>
Status launch_backward(const EltwiseActBackwardArgs& args, const Place& place) {
  Operands<Acc<T>> operands = {};
  operands.grad = args.grad;
  operands.out = args.act == Act::relu ? args.out : nullptr;
  operands.count = args.count;
  bool aligned = vector_aligned(args.grad) && vector_aligned(operands.out);
  for (int k = 0; k < args.count; ++k) {
    operands.inputs[k] = args.inputs[k];
    operands.grads[k] = args.grads[k];
    operands.coeff[k] = args.coeff ? static_cast<Acc<T>>(args.coeff[k]) : Acc<T>{1};
    aligned = aligned && vector_aligned(args.inputs[k]) && vector_aligned(args.grads[k]);
  }
  const auto kernel = aligned ? eltwise_act_backward_kernel<T, op, kVectorBytes / sizeof(T)>
                              : eltwise_act_backward_kernel<T, op, 1>;
  return launch(kernel, streaming_blocks<T>(args.numel, place.gpu), Streaming::kThreads, 0,
                place.stream, operands, args.numel);
}

}  // namespace

Status eltwise_act_backward(const EltwiseActBackwardArgs& args, const Place& place) {
  return dispatch_eltwise(args, [&](auto type, auto op) {
    return launch_backward<decltype(type), op.value>(args, place);
  });
}

}  // namespace fused_resnet::cuda
