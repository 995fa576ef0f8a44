// Two passes over each block while it is in the cache: its mean, then the deviations from it. Their
// squares are small whatever the mean is, and their plain sum takes back what rounding the mean
// did. The blocks are joined in fp64 as Chan, Golub and LeVeque join them. Means are made of
// differences from a first value, so that of equal values they are exactly those.
#include "../math.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

namespace {

// From what is infinite, everything would differ by infinity.
template <class A>
A finite(A x) {
  return x - x == A{} ? x : A{};
}

template <class T>
struct Stats {
  using A = Acc<T>;
  const Blocks blocks;
  const T* x;
  double* means;  // [block][channel]
  double* m2s;

  // The terms of both passes; what is prepared is the channel's first value, then its center.
  auto differences() const {
    return [x = x](const Vec<A>& first, int64_t at, auto lanes, Vec<A>* terms)
               FR_LAMBDA { terms[0] = load(x + at, lanes) - first; };
  }
  auto deviations() const {
    return [x = x](const Vec<A>& center, int64_t at, auto lanes, Vec<A>* terms) FR_LAMBDA {
      terms[0] = load(x + at, lanes) - center;
      terms[1] = terms[0] * terms[0];
    };
  }

  A first_of(int64_t block, int64_t c) const { return finite(load_one(x + blocks.at(block, c))); }

  void put(int64_t block, int64_t c, A center, double sum_d, double sum_dd) const {
    const double n = static_cast<double>(blocks.pixels_of(block));
    const double rest = sum_d / n;
    // An infinite center has no deviations.
    means[block * blocks.channels + c] = rest == rest ? center + rest : center;
    m2s[block * blocks.channels + c] = sum_dd - sum_d * rest;
  }

  // centers[channels] and sums[2 * channels] are room to work in.
  void rows(int64_t block, A* centers, A* sums) const {
    const int64_t channels = blocks.channels;
    const A n = static_cast<A>(blocks.pixels_of(block));
    auto prepare = [&](auto constant) FR_LAMBDA { return constant(centers); };
    for (int64_t c = 0; c < channels; ++c) centers[c] = first_of(block, c);
    sum_rows<1>(blocks, block, prepare, differences(), sums);
    for (int64_t c = 0; c < channels; ++c) centers[c] += sums[c] / n;
    sum_rows<2>(blocks, block, prepare, deviations(), sums);
    for (int64_t c = 0; c < channels; ++c) put(block, c, centers[c], sums[c], sums[channels + c]);
  }

  void pixels(int64_t block, int64_t c) const {
    double sums[2];
    const A first = first_of(block, c);
    sum_pixels<1, A>(
        blocks, block, c, [&](auto) FR_LAMBDA { return splat(first); }, differences(), sums);
    const A center = static_cast<A>(first + sums[0] / static_cast<double>(blocks.pixels_of(block)));
    sum_pixels<2, A>(
        blocks, block, c, [&](auto) FR_LAMBDA { return splat(center); }, deviations(), sums);
    put(block, c, center, sums[0], sums[1]);
  }
};

// Joins the blocks of channels [begin, end), row by row as their numbers lie in memory.
template <class T>
void join(const Stats<T>& stats, int64_t begin, int64_t end, double* mean, double* m2,
          const BnStatsArgs& args) {
  const Blocks& blocks = stats.blocks;
  auto over_blocks = [&](auto&& f) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t at = block * blocks.channels;
      const double n = static_cast<double>(blocks.pixels_of(block));
      for (int64_t c = begin; c < end; ++c) f(c, n, stats.means[at + c], stats.m2s[at + c]);
    }
  };
  auto first = [&](int64_t c) { return blocks.count ? finite(stats.means[c]) : 0.0; };
  for (int64_t c = begin; c < end; ++c) mean[c] = m2[c] = 0;
  over_blocks([&](int64_t c, double n, double block_mean, double) {
    mean[c] += n * (block_mean - first(c));
  });
  for (int64_t c = begin; c < end; ++c)
    mean[c] = first(c) + mean[c] / static_cast<double>(blocks.pixels());
  over_blocks([&](int64_t c, double n, double block_mean, double block_m2) {
    const double d = block_mean - mean[c];
    m2[c] += block_m2 + n * d * d;
  });
  for (int64_t c = begin; c < end; ++c) {
    static_cast<Acc<T>*>(args.mean)[c] = static_cast<Acc<T>>(mean[c]);
    static_cast<Acc<T>*>(args.m2)[c] = static_cast<Acc<T>>(math::relu(m2[c]));
  }
}

template <class T>
Status compute(const BnStatsArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const Blocks blocks(args.outer, args.channels, args.inner);
  const int64_t channels = args.channels;
  Workspace<double> table((2 * blocks.count + 2) * channels);
  if (!table.data) return Status::out_of_memory;
  double* joined = table.data + 2 * blocks.count * channels;
  const Stats<T> stats{blocks, static_cast<const T*>(args.x), table.data,
                       table.data + blocks.count * channels};
  int failed = 0;
  if (blocks.by_rows()) {
    parallel(pool, blocks.count, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> room(3 * channels);
      if (!room.data) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      for (int64_t block = begin; room.data && block < end; ++block)
        stats.rows(block, room.data, room.data + channels);
    });
  } else {
    parallel(pool, blocks.count * channels, kMapGrain / blocks.length + 1,
             [&](int64_t begin, int64_t end) {
               for (int64_t job = begin; job < end; ++job)
                 stats.pixels(job / channels, job % channels);
             });
  }
  if (failed) return Status::out_of_memory;
  join(stats, 0, channels, joined, joined + channels, args);
  return Status::ok;
}

}  // namespace

Status bn_stats(const BnStatsArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return compute<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
