#include "channels.h"
#include "wide_sum.h"

FR_NAMESPACE_BEGIN

namespace {

template <class T>
Status compute(const GramStatsArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const int64_t channels = args.channels;
  parallel(pool, args.rows, kMapGrain / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* weight = static_cast<const T*>(args.weight) + k * channels;
      const A* product = static_cast<const A*>(args.product) + k * channels;
      const A* center = static_cast<const A*>(args.center);
      WideSum<A> squares, offset;
      for_vectors<A>(channels, [&](int64_t c, auto lanes) FR_LAMBDA {
        const Vec<A> w = load(weight + c, lanes);
        squares.add(w * load(product + c, lanes));
        offset.add(w * load(center + c, lanes));
      });
      double about = 0;
      for (int64_t c = 0; c < channels; ++c) about += load_one(weight + c) * args.sum[c];
      about /= args.count;
      const double m2 = squares.total();
      static_cast<A*>(args.about)[k] = static_cast<A>(about);
      static_cast<A*>(args.mean)[k] = static_cast<A>(about + offset.total());
      // Rounding alone can go below zero; NaN stays.
      static_cast<A*>(args.m2)[k] = static_cast<A>(m2 < 0 ? 0 : m2);
    }
  });
  return Status::ok;
}

}  // namespace

Status gram_stats(const GramStatsArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return compute<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
