// Every thread subtracts the first value it meets of a channel from all it meets: its own data
// bound what the difference of squares can lose, whatever the mean is. Parts of a channel are
// joined as Chan, Golub and LeVeque join them.
#include "../math.h"
#include "channel_sums.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

enum Scalar { mean, m2, count, kScalarCount };

template <class A_>
struct Moments {
  using A = A_;
  static constexpr int kSums = 2, kScalars = kScalarCount;

  A *mean_out, *m2_out;

  template <class Centers>
  __device__ __forceinline__ void describe(const Centers& centers, int j, const A (&sums)[kSums],
                                           int64_t n, double (&out)[kScalars]) const {
    const A rest = sums[0] / static_cast<A>(n);
    out[mean] = static_cast<double>(centers.at[j]) + rest;
    out[m2] = sums[1] - sums[0] * rest;
    out[count] = n;
  }

  static __device__ __forceinline__ void combine(double (&a)[kScalars],
                                                 const double (&b)[kScalars]) {
    if (b[count] == 0) return;
    const double n = a[count] + b[count], d = b[mean] - a[mean];
    const double share = static_cast<A>(b[count]) / static_cast<A>(n);
    a[m2] += b[m2] + d * d * (a[count] * share);
    // Equal means stay what they are, however this is rounded. Not a + d * share: two infinities
    // make one.
    if (d != 0) a[mean] = (1 - share) * a[mean] + share * b[mean];
    a[count] = n;
  }

  __device__ __forceinline__ void emit(int64_t channel, const double (&s)[kScalars]) const {
    mean_out[channel] = static_cast<A>(s[count] > 0 ? s[mean] : s[mean] / s[count]);
    m2_out[channel] = static_cast<A>(math::relu(s[m2]));
  }
};

template <class T>
struct BnStats {
  using A = Acc<T>;
  using Result = Moments<A>;
  static constexpr int kOperands = 1;

  const T* x;
  Result result;

  template <class L>
  using Prepared = PerChannel<A, L>;

  template <class L>
  __device__ __forceinline__ Prepared<L> prepare(int64_t, int64_t first) const {
    Prepared<L> centers;
#pragma unroll
    for (int j = 0; j < L::kChannels; ++j) {
      const A value = widen(x[first + j]);
      // From an infinite one, everything would deviate by infinity.
      centers.at[j] = value - value == A{} ? value : A{};
    }
    return centers;
  }

  template <int n>
  __device__ __forceinline__ Vector<T, n> load(int64_t at) const {
    return cuda::load<n>(x + at);
  }

  template <class L>
  __device__ __forceinline__ void add(const Prepared<L>& centers, const Vector<T, L::n>& loaded,
                                      int64_t, A (&sums)[L::n][2]) const {
#pragma unroll
    for (int j = 0; j < L::n; ++j) {
      const A d = widen(loaded.at[j]) - centers[j];
      sums[j][0] += d;
      sums[j][1] += d * d;
    }
  }
};

View view_of(const BnStatsArgs& args) { return {args.outer, args.channels, args.inner}; }

}  // namespace

int64_t workspace_bytes(const BnStatsArgs& args, const Gpu& gpu) {
  return sum_workspace(args.dtype, view_of(args), {args.x}, kScalarCount, gpu);
}

Status bn_stats(const BnStatsArgs& args, const Place& place) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const BnStats<T> op{static_cast<const T*>(args.x),
                        {static_cast<A*>(args.mean), static_cast<A*>(args.m2)}};
    return sum_channels<T>(args.dtype, view_of(args), {args.x}, place, op);
  });
}

}  // namespace fused_resnet::cuda
