// How a convolution's weight is cut up for conv_bn_act: panels of `width` output channels, each
// stored [tap][depth][width], so that the innermost loop reads it straight through. Grouped
// convolutions are packed block-diagonally: a panel spans as many groups as its outputs belong to,
// reads all of their input channels, and holds zeros where output and input are of different
// groups. Where the processor multiplies narrow types in pairs or quads, a step of depth is that
// many input channels and the panel is stored [tap][depth][width][2 or 4].
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec.h"

FR_NAMESPACE_BEGIN

// The register tile: rows of pixels by vectors of channels, a panel wide; the accumulators plus one
// row of weights plus one broadcast fill the register file. A wide tile has kWideRows rows and two
// panels.
#if defined(__AVX512F__)
constexpr int kRows = 14;
constexpr int kMaxVecs = 2;
constexpr int kWideRows = 7;
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRows = 6;
constexpr int kMaxVecs = 1;
constexpr int kWideRows = 3;
constexpr int kRegisterBytes = 32;
#else
constexpr int kRows = 3;
constexpr int kMaxVecs = 1;
constexpr int kWideRows = 1;
constexpr int kRegisterBytes = 16;
#endif

// What a convolution of T multiplies, as it lies in packed weights and in copied input: T itself
// where the processor can multiply that, else what T is computed in.
template <class T>
struct ElementOf {
  using type = Acc<T>;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<bf16> {
  using type = bf16;
};
#endif
#if defined(__AVX512VNNI__)
template <>
struct ElementOf<uint8_t> {
  using type = uint8_t;
};
#elif defined(__AVX2__)
template <>
struct ElementOf<uint8_t> {
  using type = int16_t;
};
#endif
template <class T>
using Element = typename ElementOf<T>::type;

// What a weight is given as.
template <class T>
struct WeightOf {
  using type = T;
};
template <>
struct WeightOf<uint8_t> {
  using type = int8_t;
};
template <class T>
using Weight = typename WeightOf<T>::type;

// Elements multiplied into one lane of an accumulator in one step, and in all of a vector.
template <class T>
constexpr int kPer = sizeof(Acc<T>) / sizeof(Element<T>);
template <class T>
constexpr int kVecElements = kLanes<Acc<T>> * kPer<T>;

// What accumulates: one register. A vector of several would be kept in memory by GCC.
template <class A>
struct RegisterOf {
  using type = float __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct RegisterOf<double> {
  using type = double __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct RegisterOf<int32_t> {
  using type = int32_t __attribute__((vector_size(kRegisterBytes)));
};
template <class T>
using Register = typename RegisterOf<Acc<T>>::type;
using RegisterU32 = uint32_t __attribute__((vector_size(kRegisterBytes)));
constexpr int kRegisters = 64 / kRegisterBytes;  // of a vector

// One step's weights, one step's input in every lane, and their product. A register of pairs or
// quads is held as the bits of accumulators.
template <class T, class P>
FR_VEC Register<T> load_register(const P* p) {
  Register<T> v;
  __builtin_memcpy(&v, p, kRegisterBytes);
  return v;
}

template <class T>
FR_VEC Register<T> splat_step(const Element<T>* p) {
  if constexpr (kPer<T> == 1) {
    return *p - Register<T>{};
  } else {
    uint32_t step;
    __builtin_memcpy(&step, p, 4);
    return (Register<T>)(step - RegisterU32{});
  }
}

template <class T>
FR_VEC void multiply_add(Register<T>& sum, Register<T> x, Register<T> w) {
#if defined(__AVX512BF16__)
  if constexpr (kPer<T> == 2) {
    sum = (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    return;
  }
#endif
  // Of bytes every sum is exact: those of pairs, widened first, too. vpmaddubsw's would saturate.
#if defined(__AVX512VNNI__)
  if constexpr (kPer<T> == 4) {
    sum = (Register<T>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    return;
  }
#elif defined(__AVX512BW__)
  if constexpr (sizeof(Element<T>) == 2) {
    sum += (Register<T>)_mm512_madd_epi16((__m512i)x, (__m512i)w);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Element<T>) == 2) {
    sum += (Register<T>)_mm256_madd_epi16((__m256i)x, (__m256i)w);
    return;
  }
#endif
  sum += x * w;
}

// Stores what a convolution has computed. The processor's own conversion takes a tenth of the
// instructions; like its multiplication, it knows no denormal numbers.
template <class T>
FR_VEC void store_result(T* p, Vec<Acc<T>> v) {
#if defined(__AVX512BF16__)
  if constexpr (kPer<T> == 2) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &half, 32);
    return;
  }
#endif
  store(p, v);
}

// Memory to prefetch while a tile is computed: `bytes` from `at` on each time, into the caches of a
// level that __builtin_prefetch's locality names.
struct Stream {
  const char* at;
  int64_t bytes;

  template <int kLocality>
  FR_LAMBDA void prefetch() {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, kLocality);
    at += bytes;
  }
};

struct Panels {
  int64_t vecs;   // vectors a panel is wide
  int64_t width;  // output channels of a panel; the last one is filled up with zeros
  int64_t count;
  int64_t channels;  // input channels there are, filled up to whole steps
  int64_t depth;     // steps a panel reads at each tap
  int64_t taps;      // kernel positions
  int64_t per;       // input channels of a step

  int64_t elements() const { return taps * depth * width * per; }  // of one panel
};

template <class T>
FR_VEC Panels panels_of(const ConvShape& s) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  constexpr int64_t lanes = kLanes<Acc<T>>, per = kPer<T>;
  Panels p;
  // Narrow groups waste work in proportion to the panel's width.
  p.vecs = s.groups > 1 && group_out < kMaxVecs * lanes ? 1 : kMaxVecs;
  p.width = p.vecs * lanes;
  p.count = (s.out_channels + p.width - 1) / p.width;
  p.taps = s.kernel[0] * s.kernel[1];
  p.per = per;
  p.channels = (s.in_channels + per - 1) / per * per;
  p.depth = 0;
  for (int64_t k = 0; k < s.out_channels; k += p.width) {
    const int64_t last = (k + p.width < s.out_channels ? k + p.width : s.out_channels) - 1;
    const int64_t spanned = (last / group_out - k / group_out + 1) * group_in;
    if ((spanned + per - 1) / per > p.depth) p.depth = (spanned + per - 1) / per;
  }
  return p;
}

// First input channel panel `index` reads.
FR_VEC int64_t first_channel(const Panels& p, const ConvShape& s, int64_t index) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t wanted = index * p.width / group_out * group_in, reads = p.depth * p.per;
  return wanted + reads <= p.channels ? wanted : p.channels - reads;
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

// One panel of a dense, ungrouped weight: each output channel is one run of channels * taps
// elements, in either order, so that squares of 16 outputs by 16 elements can be transposed in
// registers.
template <class T>
FR_VEC void pack_dense(const Panels& p, const T* weight, int64_t channels, bool taps_inner,
                       int64_t columns, Element<T>* to) {
  const int64_t run = channels * p.taps;
  // Tap and channel of element j of a run; divisions would cost more than the transposition.
  int64_t tap = 0, channel = 0;
  int64_t row[16], part[16];
  for (int64_t j = 0; j < run; j += 16) {
    const int64_t n = run - j < 16 ? run - j : 16;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = tap * p.depth + channel / kPer<T>;
      part[i] = channel % kPer<T>;
      int64_t& inner = taps_inner ? tap : channel;
      int64_t& outer = taps_inner ? channel : tap;
      if (++inner == (taps_inner ? p.taps : channels)) {
        inner = 0;
        ++outer;
      }
    }
    for (int64_t k = 0; k < p.width; k += 16) {
      VecF square[16] = {};
      for (int64_t i = 0; i < 16 && k + i < columns; ++i) {
        const T* from = weight + (k + i) * run + j;
        square[i] = n == 16 ? load(from) : load(from, n);
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) {
        Element<T>* at = to + (row[i] * p.width + k) * kPer<T>;
        if constexpr (kPer<T> == 1) {
          store(at, square[i]);
        } else {
          // A channel of even number is stored beside zeros, and one of odd number, later, there.
          VecU32 bits = (VecU32)square[i], pair = bits >> 16;
          if (part[i] == 1) {
            __builtin_memcpy(&pair, at, 64);
            pair |= bits & 0xffff0000u;
          }
          __builtin_memcpy(at, &pair, 64);
        }
      }
    }
  }
}

// One panel of an ungrouped weight whose output channels are neighbours in memory, as in the
// transposed view of a channels_last one: its rows are copied.
template <class T>
FR_VEC void pack_rows(const Panels& p, const ConvShape& s, const T* weight, const int64_t* stride,
                      int64_t columns, Element<T>* to) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t c = 0; c < s.in_channels; c += kPer<T>)
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const T* from =
          weight + c * stride[1] + tap / s.kernel[1] * stride[2] + tap % s.kernel[1] * stride[3];
      Element<T>* at = to + (tap * p.depth + c / kPer<T>)*p.width * kPer<T>;
      for (int64_t k = 0; k < p.width; k += lanes, at += kVecElements<T>) {
        auto get = [&](const T* row) FR_LAMBDA {
          return k + lanes <= columns ? load(row + k)
                 : k < columns        ? load(row + k, columns - k)
                                      : Vec<Acc<T>>{};
        };
        if constexpr (kPer<T> == 1) {
          store(at, get(from));
        } else {
          VecU32 pair = (VecU32)get(from) >> 16;
          if (c + 1 < s.in_channels) pair |= (VecU32)get(from + stride[1]);
          __builtin_memcpy(at, &pair, 64);
        }
      }
    }
}

// What one of a weight's values is multiplied as; of bytes the bits are kept.
template <class T>
FR_VEC Element<T> element(const Weight<T>* from) {
  if constexpr (sizeof(*from) == 1)
    return static_cast<Element<T>>(*from);
  else if constexpr (kPer<T> == 1)
    return load_one(from);
  else
    return *from;
}

// One panel, value by value.
template <class T>
FR_VEC void pack_values(const Panels& p, const ConvShape& s, const Weight<T>* weight,
                        const int64_t* stride, int64_t index, Element<T>* to) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t first = first_channel(p, s, index), begin = index * p.width;
  for (int64_t c = 0; c < p.depth * p.per; ++c)
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      Element<T>* row = to + (tap * p.depth + c / p.per) * p.width * p.per + c % p.per;
      const Weight<T>* from =
          weight + tap / s.kernel[1] * stride[2] + tap % s.kernel[1] * stride[3];
      for (int64_t k = 0; k < p.width; ++k) {
        const int64_t in = first + c - (begin + k) / group_out * group_in;
        const bool own = begin + k < s.out_channels && in >= 0 && in < group_in;
        row[k * p.per] =
            own ? element<T>(from + (begin + k) * stride[0] + in * stride[1]) : Element<T>{};
      }
    }
}

template <class T>
FR_VEC void pack_panel(const Panels& p, const ConvShape& s, const T* weight, const int64_t* stride,
                       int64_t index, Element<T>* to) {
  const int64_t begin = index * p.width;
  const int64_t columns = s.out_channels - begin < p.width ? s.out_channels - begin : p.width;
  if (s.groups == 1 && stride[0] == 1) {
    pack_rows(p, s, weight + begin, stride, columns, to);
    return;
  }
  if constexpr (sizeof(Acc<T>) == 4) {
    const int64_t run = s.in_channels * p.taps;
    const bool taps_inner =
        stride[1] == p.taps && stride[2] == s.kernel[1] && stride[3] == 1;  // contiguous
    const bool taps_outer = stride[1] == 1 && stride[2] == s.kernel[1] * s.in_channels &&
                            stride[3] == s.in_channels;  // channels_last
    if (s.groups == 1 && stride[0] == run && (taps_inner || taps_outer)) {
      // Pairs that lie side by side already move like floats.
      if (kPer<T> == 2 && taps_outer && s.in_channels % 2 == 0)
        pack_dense(p, reinterpret_cast<const float*>(weight + begin * run), s.in_channels / 2,
                   false, columns, reinterpret_cast<float*>(to));
      else
        pack_dense(p, weight + begin * run, s.in_channels, taps_inner, columns, to);
      return;
    }
  }
  pack_values<T>(p, s, weight, stride, index, to);
}

// Bytes are packed once, when a model is frozen.
FR_VEC void pack_panel(const Panels& p, const ConvShape& s, const int8_t* weight,
                       const int64_t* stride, int64_t index, Element<uint8_t>* to) {
  pack_values<uint8_t>(p, s, weight, stride, index, to);
}

// All panels of a weight.
template <class T>
FR_VEC void pack_panels(const Panels& p, const ConvShape& s, const Weight<T>* weight,
                        const int64_t* stride, Element<T>* to, const Pool& pool) {
  parallel(pool, p.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_panel(p, s, weight, stride, i, to + i * p.elements());
  });
}

FR_NAMESPACE_END
