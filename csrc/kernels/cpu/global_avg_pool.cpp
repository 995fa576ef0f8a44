#include "channels.h"

FR_NAMESPACE_BEGIN

Status global_avg_pool(const GlobalAvgPoolArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const double pixels = static_cast<double>(args.pixels);
    auto prepare = [](const auto&) FR_LAMBDA { return 0; };
    if (!args.channels_last) {  // every channel of every image is one by itself
      auto term = [&](int, int64_t at, auto lanes, Vec<A>(&terms)[1])
                      FR_LAMBDA { terms[0] = load(x + at, lanes); };
      return sum_channels<1, A>(pool, Blocks(1, args.batch * args.channels, args.pixels), prepare,
                                term, [&](int64_t c, const double* sums) {
                                  store(out + c, splat(static_cast<A>(sums[0] / pixels)), 1);
                                });
    }
    const int64_t channels = args.channels;
    const Blocks blocks(args.pixels, channels, 1);  // of an image
    int failed = 0;
    parallel(pool, args.batch, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> sums(channels);
      Workspace<double> total(channels);
      if (!sums.data || !total.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t n = begin; n < end; ++n) {
        const T* image = x + n * args.pixels * channels;
        auto term = [&](int, int64_t at, auto lanes, Vec<A>(&terms)[1])
                        FR_LAMBDA { terms[0] = load(image + at, lanes); };
        for (int64_t c = 0; c < channels; ++c) total.data[c] = 0;
        for (int64_t block = 0; block < blocks.count; ++block) {
          sum_rows<1>(blocks, block, prepare, term, sums.data);
          for (int64_t c = 0; c < channels; ++c) total.data[c] += sums.data[c];
        }
        for (int64_t c = 0; c < channels; ++c)
          sums.data[c] = static_cast<A>(total.data[c] / pixels);
        for_vectors<A>(channels, [&](int64_t c, auto lanes) FR_LAMBDA {
          store(out + n * channels + c, load(sums.data + c, lanes), lanes);
        });
      }
    });
    return failed ? Status::out_of_memory : Status::ok;
  });
}

FR_NAMESPACE_END
