// Loops over a dense activation [outer, channels, inner], for kernels that compute with values of
// each channel or sum over each channel's pixels. A vector holds the channels of one pixel where
// inner is 1 (channels_last), else pixels of one channel (contiguous).
//
// A kernel says what it computes in two steps. prepare(constant) reads what belongs to a channel,
// constant(p) being the vector of p's values there. The rest is called for each vector with what
// prepare returned, the offset of its first element, and its lanes: all (Whole) or some (Part).
#pragma once

#include "buffer.h"
#include "vec.h"

FR_NAMESPACE_BEGIN

constexpr int64_t kMapGrain = 16384;  // elements; as the kGrain of other elementwise kernels

struct Whole {};
struct Part {
  int64_t n;
};

template <class T>
FR_VEC Vec<Acc<T>> load(const T* p, Whole) {
  return load(p);
}
template <class T>
FR_VEC Vec<Acc<T>> load(const T* p, Part lanes) {
  return load(p, lanes.n);
}
template <class T>
FR_VEC void store(T* p, Vec<Acc<T>> v, Whole) {
  store(p, v);
}
template <class T>
FR_VEC void store(T* p, Vec<Acc<T>> v, Part lanes) {
  store(p, v, lanes.n);
}

// What storing v as T and loading it again gives.
template <class T>
FR_VEC Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) return v;
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  return load(buffer);
}

// Zero in the lanes beyond.
template <class A>
FR_VEC Vec<A> only(Vec<A> v, Whole) {
  return v;
}
template <class A>
FR_VEC Vec<A> only(Vec<A> v, Part lanes) {
  for (int64_t i = lanes.n; i < kLanes<A>; ++i) v[i] = 0;
  return v;
}

template <class Lanes>
struct EachChannel {
  int64_t c;
  Lanes lanes;
  template <class A>
  FR_LAMBDA Vec<A> operator()(const A* p) const {
    return load(p + c, lanes);
  }
};
struct OneChannel {
  int64_t c;
  template <class A>
  FR_LAMBDA Vec<A> operator()(const A* p) const {
    return splat(p[c]);
  }
};

template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

// f(width, at) for register tiles of up to kMost vectors that cover those from `at` to `end`. Four
// are two and two: a tile of one vector waits for its loads.
template <int kMost, class F>
FR_VEC void for_tiles(int64_t at, int64_t end, const F& f) {
  while (at < end) {
    const int64_t left = end - at;
    if (kMost >= 3 && left >= 3 && left != 4) {
      f(Width<kMost >= 3 ? 3 : 1>{}, at);
      at += 3;
    } else if (kMost >= 2 && left >= 2) {
      f(Width<kMost >= 2 ? 2 : 1>{}, at);
      at += 2;
    } else {
      f(Width<1>{}, at);
      at += 1;
    }
  }
}

// f(offset, lanes) for every vector of n elements.
template <class A, class F>
FR_VEC void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// body(prepared, offset, lanes) for every vector.
template <class A, class Prepare, class Body>
FR_VEC void map_channels(const Pool& pool, int64_t outer, int64_t channels, int64_t inner,
                         const Prepare& prepare, const Body& body) {
  const bool channels_last = inner == 1;
  // A row is a pixel's channels or a channel's pixels.
  const int64_t length = channels_last ? channels : inner;
  const int64_t rows = channels_last ? outer : outer * channels;
  if (length == 0) return;
  parallel(pool, rows, kMapGrain / length + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * length;
      if (channels_last) {
        for_vectors<A>(length, [&](int64_t c, auto lanes) FR_LAMBDA {
          body(prepare(EachChannel<decltype(lanes)>{c, lanes}), at + c, lanes);
        });
      } else {
        const auto prepared = prepare(OneChannel{row % channels});
        for_vectors<A>(length,
                       [&](int64_t i, auto lanes) FR_LAMBDA { body(prepared, at + i, lanes); });
      }
    }
  });
}

// How an activation is cut up for sums: into blocks that stay in the second-level cache and whose
// sums are short enough for fp32. The cut depends on sizes alone, so that sums do not depend on the
// number of threads; the blocks' sums are added up in fp64.
constexpr int64_t kBlockElements = 32768;
constexpr int64_t kLeastBlockRows = 64;  // or the blocks' sums would be as large as the blocks
constexpr int64_t kMostBlockRows = 1024;
constexpr int64_t kBlockPixels = 8192;  // of a contiguous channel
constexpr int kRowsAtOnce = 8;          // added up in registers before they go to the sums

struct Blocks {
  int64_t outer, channels, inner;
  int64_t length;  // pixels of a block; the last one may have fewer
  int64_t pieces;  // blocks of an image's channel (contiguous)
  int64_t count;   // blocks of a channel

  Blocks(int64_t outer, int64_t channels, int64_t inner)
      : outer(outer), channels(channels), inner(inner) {
    if (by_rows()) {
      length = kBlockElements / (channels > 0 ? channels : 1);
      if (length < kLeastBlockRows) length = kLeastBlockRows;
      if (length > kMostBlockRows) length = kMostBlockRows;
      pieces = 1;
      count = (outer + length - 1) / length;
    } else {
      length = kBlockPixels;
      pieces = (inner + length - 1) / length;
      count = outer * pieces;
    }
  }

  bool by_rows() const { return inner == 1; }
  // Where a block of a channel begins.
  int64_t at(int64_t block, int64_t c) const {
    if (by_rows()) return block * length * channels + c;
    return (block / pieces * channels + c) * inner + block % pieces * length;
  }
  int64_t pixels() const { return outer * inner; }
  int64_t pixels_of(int64_t block) const {
    const int64_t whole = by_rows() ? outer : inner, piece = by_rows() ? block : block % pieces;
    return whole - piece * length < length ? whole - piece * length : length;
  }
};

// sums[k][c] of one block of rows; term(prepared, offset, lanes, terms) gives a vector's kSums
// terms.
template <int kSums, class A, class Prepare, class Term>
FR_VEC void sum_rows(const Blocks& blocks, int64_t block, const Prepare& prepare, const Term& term,
                     A* sums) {
  const int64_t channels = blocks.channels;
  const int64_t begin = block * blocks.length, end = begin + blocks.pixels_of(block);
  for (int64_t i = 0; i < kSums * channels; ++i) sums[i] = 0;
  auto add = [&](int64_t row, int64_t count) FR_LAMBDA {
    for_vectors<A>(channels, [&](int64_t c, auto lanes) FR_LAMBDA {
      const auto prepared = prepare(EachChannel<decltype(lanes)>{c, lanes});
      Vec<A> sum[kSums] = {};
#pragma GCC unroll 8
      for (int64_t r = 0; r < count; ++r) {
        Vec<A> terms[kSums];
        term(prepared, (row + r) * channels + c, lanes, terms);
        for (int k = 0; k < kSums; ++k) sum[k] += terms[k];
      }
      for (int k = 0; k < kSums; ++k) {
        A* to = sums + k * channels + c;
        store(to, load(to, lanes) + sum[k], lanes);
      }
    });
  };
  int64_t row = begin;
  for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) add(row, kRowsAtOnce);
  if (row < end) add(row, end - row);
}

// The same of one block of one channel's pixels, whose lanes are added up in fp64.
template <int kSums, class A, class Prepare, class Term>
FR_VEC void sum_pixels(const Blocks& blocks, int64_t block, int64_t c, const Prepare& prepare,
                       const Term& term, double* sums) {
  constexpr int kChains = 4;
  const int64_t at = blocks.at(block, c), n = blocks.pixels_of(block);
  const auto prepared = prepare(OneChannel{c});
  Vec<A> sum[kChains][kSums] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<A> <= n; i += kChains * kLanes<A>)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      Vec<A> terms[kSums];
      term(prepared, at + i + chain * kLanes<A>, Whole{}, terms);
      for (int k = 0; k < kSums; ++k) sum[chain][k] += terms[k];
    }
  for_vectors<A>(n - i, [&](int64_t j, auto lanes) FR_LAMBDA {
    Vec<A> terms[kSums];
    term(prepared, at + i + j, lanes, terms);
    for (int k = 0; k < kSums; ++k) sum[0][k] += only<A>(terms[k], lanes);
  });
  for (int k = 0; k < kSums; ++k) {
    const Vec<A> total = (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]);
    sums[k] = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sums[k] += total[lane];
  }
}

// Adds up the blocks' sums, [block][sum][channel], row by row as they lie in memory; finish(c,
// sums) gets a channel's.
template <int kSums, class Finish>
FR_VEC Status add_up(const double* table, int64_t blocks, int64_t channels, const Finish& finish) {
  const int64_t length = kSums * channels;
  Workspace<double> total(length);
  if (!total.data) return Status::out_of_memory;
  for (int64_t i = 0; i < length; ++i) total.data[i] = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < length; ++i) total.data[i] += table[block * length + i];
  for (int64_t c = 0; c < channels; ++c) {
    double sums[kSums];
    for (int k = 0; k < kSums; ++k) sums[k] = total.data[k * channels + c];
    finish(c, sums);
  }
  return Status::ok;
}

// Sums of one pass over each channel's pixels: finish(c, sums) gets a channel's, in fp64.
template <int kSums, class A, class Prepare, class Term, class Finish>
FR_VEC Status sum_channels(const Pool& pool, const Blocks& blocks, const Prepare& prepare,
                           const Term& term, const Finish& finish) {
  const int64_t channels = blocks.channels;
  Workspace<double> table(blocks.count * kSums * channels);  // [block][sum][channel]
  if (!table.data) return Status::out_of_memory;
  int failed = 0;
  auto row_of = [&](int64_t block) { return table.data + block * kSums * channels; };
  if (blocks.by_rows()) {
    parallel(pool, blocks.count, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> sums(kSums * channels);
      if (!sums.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t block = begin; block < end; ++block) {
        sum_rows<kSums>(blocks, block, prepare, term, sums.data);
        for (int64_t i = 0; i < kSums * channels; ++i) row_of(block)[i] = sums.data[i];
      }
    });
  } else {
    parallel(pool, blocks.count * channels, kMapGrain / blocks.length + 1,
             [&](int64_t begin, int64_t end) {
               for (int64_t job = begin; job < end; ++job) {
                 double sums[kSums];
                 const int64_t block = job / channels, c = job % channels;
                 sum_pixels<kSums, A>(blocks, block, c, prepare, term, sums);
                 for (int k = 0; k < kSums; ++k) row_of(block)[k * channels + c] = sums[k];
               }
             });
  }
  if (failed) return Status::out_of_memory;
  return add_up<kSums>(table.data, blocks.count, channels, finish);
}

FR_NAMESPACE_END
