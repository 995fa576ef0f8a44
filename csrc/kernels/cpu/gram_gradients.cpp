#include "../math.h"
#include "channels.h"
#include "wide_sum.h"

FR_NAMESPACE_BEGIN

namespace {

template <class T>
Status compute(const GramGradientsArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const int64_t channels = args.channels;
  auto get = [](const void* p, int64_t k) -> double { return static_cast<const A*>(p)[k]; };
  parallel(pool, args.rows, kMapGrain / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* weight = static_cast<const T*>(args.weight) + k * channels;
      const A* s = static_cast<const A*>(args.s) + k * channels;
      const double mean = get(args.mean, k), invstd = get(args.invstd, k);
      const double sum_g = get(args.sum_g, k);
      double sum_gx;
      if (args.sum_gx) {
        sum_gx = get(args.sum_gx, k);
      } else {
        WideSum<A> products;
        for_vectors<A>(channels, [&](int64_t c, auto lanes) FR_LAMBDA {
          products.add(load(weight + c, lanes) * load(s + c, lanes));
        });
        sum_gx = invstd * (products.total() - mean * sum_g);
      }
      const auto terms =
          math::gradient_terms<double>(get(args.scale, k), invstd, sum_g, sum_gx, args.count);
      const A a = static_cast<const A*>(args.scale)[k], b = static_cast<A>(terms.slope);
      A* scaled_s = static_cast<A*>(args.scaled_s) + k * channels;
      A* slopes = static_cast<A*>(args.slopes) + k * (channels + 1);
      T* scaled_weight = static_cast<T*>(args.scaled_weight) + k * channels;
      for_vectors<A>(channels, [&](int64_t c, auto lanes) FR_LAMBDA {
        const Vec<A> w = load(weight + c, lanes);
        store(scaled_s + c, splat(a) * load(s + c, lanes), lanes);
        store(slopes + c, splat(b) * w, lanes);
        store(scaled_weight + c, splat(a) * w, lanes);
      });
      slopes[channels] = static_cast<A>(terms.offset - terms.slope * mean);
      static_cast<A*>(args.dgamma)[k] = static_cast<A>(sum_gx);
    }
  });
  return Status::ok;
}

}  // namespace

Status gram_gradients(const GramGradientsArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return compute<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
