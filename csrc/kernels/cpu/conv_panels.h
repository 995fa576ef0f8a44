// How a convolution's weight is cut up for conv_bn_act: panels of `width` output channels, each
// stored [tap][depth][width], so that the innermost loop reads it straight through. Grouped
// convolutions are packed block-diagonally: a panel spans as many groups as its outputs belong to,
// reads all of their input channels, and holds zeros where output and input are of different
// groups.
#pragma once

#include "vec.h"

FR_NAMESPACE_BEGIN

// The register tile: rows of pixels by vectors of channels; the accumulators plus one row of
// weights plus one broadcast fill the register file.
#if defined(__AVX512F__)
constexpr int kRows = 14;
constexpr int kMaxVecs = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6;
constexpr int kMaxVecs = 1;
#else
constexpr int kRows = 3;
constexpr int kMaxVecs = 1;
#endif

struct Panels {
  int64_t vecs;   // vectors a panel is wide
  int64_t width;  // output channels of a panel; the last one is filled up with zeros
  int64_t count;
  int64_t depth;  // input channels a panel reads
  int64_t taps;   // kernel positions

  int64_t elements() const { return taps * depth * width; }  // of one panel
};

template <class A>
FR_VEC Panels panels_of(const ConvShape& s) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  Panels p;
  // Narrow groups waste work in proportion to the panel's width.
  p.vecs = s.groups > 1 && group_out < kMaxVecs * kLanes<A> ? 1 : kMaxVecs;
  p.width = p.vecs * kLanes<A>;
  p.count = (s.out_channels + p.width - 1) / p.width;
  p.taps = s.kernel[0] * s.kernel[1];
  p.depth = 0;
  for (int64_t k = 0; k < s.out_channels; k += p.width) {
    const int64_t last = (k + p.width < s.out_channels ? k + p.width : s.out_channels) - 1;
    const int64_t spanned = (last / group_out - k / group_out + 1) * group_in;
    if (spanned > p.depth) p.depth = spanned;
  }
  return p;
}

// First input channel panel `index` reads.
FR_VEC int64_t first_channel(const Panels& p, const ConvShape& s, int64_t index) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t wanted = index * p.width / group_out * group_in;
  return wanted + p.depth <= s.in_channels ? wanted : s.in_channels - p.depth;
}

// rows[i][j] <-> rows[j][i] for one square of vectors.
FR_VEC void transpose(VecF* rows) {
#define FR_STAGE(step, ...)                                          \
  for (int i = 0; i < 16; ++i)                                       \
    if (!(i & step)) {                                               \
      const VecF a = rows[i], b = rows[i | step];                    \
      rows[i] = __builtin_shufflevector(a, b, FR_LOW##step);         \
      rows[i | step] = __builtin_shufflevector(a, b, FR_HIGH##step); \
    }
#define FR_LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define FR_HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define FR_LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define FR_HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FR_LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define FR_HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define FR_LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define FR_HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
  FR_STAGE(1)
  FR_STAGE(2)
  FR_STAGE(4)
  FR_STAGE(8)
#undef FR_STAGE
}

// One panel of a dense, ungrouped weight: each output channel is one run of depth * taps elements,
// in either order, so that squares of 16 outputs by 16 elements can be transposed in registers.
template <class T>
FR_VEC void pack_dense(const Panels& p, const T* weight, int64_t run, bool taps_inner,
                       int64_t columns, float* to) {
  // Row of the panel that element j of a run goes to; divisions would cost more than the
  // transposition.
  int64_t tap = 0, channel = 0;
  int64_t row[16];
  for (int64_t j = 0; j < run; j += 16) {
    const int64_t n = run - j < 16 ? run - j : 16;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = taps_inner ? tap * p.depth + channel : j + i;
      if (++tap == p.taps) {
        tap = 0;
        ++channel;
      }
    }
    for (int64_t k = 0; k < p.width; k += 16) {
      VecF square[16] = {};
      for (int64_t i = 0; i < 16 && k + i < columns; ++i) {
        const T* from = weight + (k + i) * run + j;
        square[i] = n == 16 ? load(from) : load(from, n);
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) store(to + row[i] * p.width + k, square[i]);
    }
  }
}

template <class T>
FR_VEC void pack_panel(const Panels& p, const ConvShape& s, const T* weight, const int64_t* stride,
                       int64_t index, Acc<T>* to) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t first = first_channel(p, s, index);
  const int64_t begin = index * p.width;
  const int64_t columns = s.out_channels - begin < p.width ? s.out_channels - begin : p.width;
  if constexpr (sizeof(Acc<T>) == 4) {
    const int64_t run = p.depth * p.taps;
    const bool taps_inner =
        stride[1] == p.taps && stride[2] == s.kernel[1] && stride[3] == 1;  // contiguous
    const bool taps_outer = stride[1] == 1 && stride[2] == s.kernel[1] * p.depth &&
                            stride[3] == p.depth;  // channels_last
    if (s.groups == 1 && stride[0] == run && (taps_inner || taps_outer)) {
      pack_dense(p, weight + begin * run, run, taps_inner, columns, to);
      return;
    }
  }
  for (int64_t c = 0; c < p.depth; ++c)
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      Acc<T>* row = to + (tap * p.depth + c) * p.width;
      const T* from = weight + tap / s.kernel[1] * stride[2] + tap % s.kernel[1] * stride[3];
      for (int64_t k = 0; k < p.width; ++k) {
        const int64_t in = first + c - (begin + k) / group_out * group_in;
        const bool own = k < columns && in >= 0 && in < group_in;
        row[k] = own ? load_one(from + (begin + k) * stride[0] + in * stride[1]) : Acc<T>(0);
      }
    }
}

FR_NAMESPACE_END
