// Each input position looks at the windows that read it, and takes the gradients of those whose
// maximum it is: every element of dx is written once, and its terms are added in one order.
#include "pool.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

// BatchNorm's gradient is scale * g + slope * (x - mean) + offset; with fixed statistics all but
// scale are null. Made by a launch of its own: kept from position to position in registers they
// would halve the number of threads that have loads in flight.
template <class A>
struct Terms {
  const A *scale, *mean;
  A *slope, *offset;
};

template <class A>
__global__ void __launch_bounds__(Streaming::kThreads)
    gradient_terms_kernel(Terms<A> terms, const A* invstd, const A* sum_g, const A* sum_gx,
                          double count, int64_t channels) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const auto made = math::gradient_terms<A>(terms.scale[c], invstd[c], sum_g[c], sum_gx[c], count);
  terms.slope[c] = made.slope;
  terms.offset[c] = made.offset;
}

// The slopes lie at the beginning of the workspace, the offsets behind them.
int64_t bytes_of_slopes(DType dtype, int64_t channels) {
  const int64_t bytes = channels * (dtype == DType::f64 ? sizeof(double) : sizeof(float));
  return ceil_div(bytes, kVectorBytes) * kVectorBytes;
}

// f(out, k) for each window that reads input position i of rows (d = 0) or columns (d = 1), at its
// kernel position k, which grows.
template <class F>
__device__ __forceinline__ void for_windows_over(const PoolShape& s, int d, int64_t i, const F& f) {
  const int64_t size = d == 0 ? s.out_height : s.out_width, step = s.dilation[d];
  const int64_t at = i + s.padding[d], nearest = at / s.stride[d];
#pragma unroll 1
  for (int64_t out = nearest < size ? nearest : size - 1; out >= 0; --out) {
    const int64_t reach = at - out * s.stride[d];
    if (reach > (s.kernel[d] - 1) * step) break;
    const int64_t k = step == 1 ? reach : reach / step;  // dividing takes long
    if (k * step == reach) f(out, static_cast<int>(k));
  }
}

template <class T, int n>
__global__ void __launch_bounds__(Streaming::kThreads, Streaming::kMinBlocksPerMultiprocessor)
    maxpool_backward_kernel(const __grid_constant__ PoolShape s,
                            const __grid_constant__ PooledGrad<T> pooled,
                            const __grid_constant__ Terms<Acc<T>> terms, const T* x, T* dx) {
  using A = Acc<T>;
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * n;
  if (at >= s.batch * s.height * s.width * s.channels) return;
  const int64_t c = at % s.channels, pixel = at / s.channels, line = pixel / s.width;
  const int64_t image = line / s.height;
  A g[n] = {};
  for_windows_over(s, 0, line % s.height, [&](int64_t oh, int kh) {
    const int64_t row = (image * s.out_height + oh) * s.out_width;
    for_windows_over(s, 1, pixel % s.width, [&](int64_t ow, int kw) {
      const auto loaded = pooled.template load<n>((row + ow) * s.channels + c);
      const int position = kh * static_cast<int>(s.kernel[1]) + kw;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A arrived = pooled.gradient(loaded, j);
        g[j] += loaded.argmax.at[j] == position ? arrived : A{};
      }
    });
  });
  const Wide<A, n> scale = load_channels<n>(terms.scale + c);
  auto made = each<n>([&](int j) { return scale.at[j] * g[j]; });
  if (terms.mean) {
    const Wide<A, n> slope = load_channels<n>(terms.slope + c);
    const Wide<A, n> offset = load_channels<n>(terms.offset + c);
    const Wide<A, n> mean = load_channels<n>(terms.mean + c), value = load_wide<n>(x + at);
#pragma unroll
    for (int j = 0; j < n; ++j)
      made.at[j] += slope.at[j] * (value.at[j] - mean.at[j]) + offset.at[j];
  }
  store_narrow(dx + at, made);
}

template <class T>
Status launch_backward(const BnActMaxpoolBackwardArgs& args, const Place& place) {
  using A = Acc<T>;
  const PoolShape& s = args.shape;
  const BatchSums& batch = args.batch;
  const int64_t elements = s.batch * s.height * s.width * s.channels;
  if (elements == 0) return Status::ok;
  Terms<A> terms{static_cast<const A*>(args.scale), static_cast<const A*>(batch.mean), nullptr,
                 nullptr};
  if (batch.mean) {
    terms.slope = static_cast<A*>(place.workspace);
    terms.offset = terms.slope + bytes_of_slopes(args.dtype, s.channels) / sizeof(A);
    const Status status =
        launch(gradient_terms_kernel<A>, ceil_div(s.channels, Streaming::kThreads),
               Streaming::kThreads, 0, place.stream, terms, static_cast<const A*>(batch.invstd),
               static_cast<const A*>(batch.sum_g), static_cast<const A*>(batch.sum_gx), batch.count,
               s.channels);
    if (status != Status::ok) return status;
  }
  const View view{elements / s.channels, s.channels, 1};
  const int n =
      choose_layout(args.dtype, view,
                    {args.grad, args.out, args.argmax, args.x, args.scale, batch.mean, args.dx})
          .n;
  const auto kernel =
      n > 1 ? maxpool_backward_kernel<T, kVectorBytes / sizeof(T)> : maxpool_backward_kernel<T, 1>;
  return launch(kernel, ceil_div(elements / n, Streaming::kThreads), Streaming::kThreads, 0,
                place.stream, s, PooledGrad<T>(args), terms, static_cast<const T*>(args.x),
                static_cast<T*>(args.dx));
}

}  // namespace

int64_t workspace_bytes(const BnActMaxpoolBackwardArgs& args, const Gpu&) {
  return args.batch.mean ? 2 * bytes_of_slopes(args.dtype, args.shape.channels) : 0;
}

Status bn_act_maxpool_backward(const BnActMaxpoolBackwardArgs& args, const Place& place) {
  return dispatch(args.dtype,
                  [&](auto type) { return launch_backward<decltype(type)>(args, place); });
}

}  // namespace fused_resnet::cuda
