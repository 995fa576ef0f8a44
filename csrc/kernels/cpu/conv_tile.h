// The innermost part of a convolution: a register tile of kR output pixels by kV vectors of output
// channels, from the first product to the stored result.
#pragma once

#include "../api_int8.h"
#include "../math.h"
#include "conv_panels.h"

FR_NAMESPACE_BEGIN

// Steps summed up in registers before they are added to the sum in memory. A shorter chain rounds
// less, and costs 1% of the time.
constexpr int64_t kSumSteps = 256;
// Steps of a tile between one round of prefetches and the next.
constexpr int64_t kBlock = 16;

// Which rows of a tile a kernel position contributes to: those that lie in the padding are left
// out where they are the first, the last, or all of a tile. Elsewhere they read zeros.
enum Reach : uint8_t { kAll, kNotFirst, kNotLast, kNone };

// Which input channels belong to an output channel, where a panel spans several groups.
struct Groups {
  int64_t in, out;   // channels of a group; 0: a panel is of one group
  int64_t first;     // output channel of a panel
  int64_t channels;  // of all input
};

// What a convolution of T is called with.
template <class T>
struct ArgsOf {
  using type = ConvBnActArgs;
};
template <>
struct ArgsOf<uint8_t> {
  using type = ConvInt8Args;
};
template <class T>
using ConvArgs = typename ArgsOf<T>::type;

// Of what type a convolution's scale and shift are.
template <class T>
struct FactorOf {
  using type = Acc<T>;
};
template <>
struct FactorOf<uint8_t> {
  using type = float;
};
template <class T>
using Factor = typename FactorOf<T>::type;

template <class T>
struct TileArgs {
  // Where row r reads its input for kernel position `tap`: rows[r * taps + tap] + offset.
  const Element<T>* const* rows;
  const Reach* reach;  // of each tap
  int64_t taps, offset, depth;
  const Element<T>* panel[2];  // the second only where a tile is two panels wide
  const Factor<T>* scale;      // of the tile's first channel, as all that follows
  const Factor<T>* shift;
  const char* residual;
  char* out;
  int64_t pixel, residual_pixel;  // bytes from one pixel to the next
  int64_t ahead;  // pixels to the output that is to be prefetched, so many at a time
  int64_t ahead_pixels;
  int64_t count;    // pixels there are, of the tile's kR
  int64_t columns;  // channels there are, of the tile's kV vectors
  const ConvArgs<T>* args;
  Groups groups;
  Stream next_panel, next_input;
};

// What is prefetched while a tile is computed, a part every kBlock steps: all at once would hold up
// the weights. The processor does not see these coming; output and residual lie in pieces.
template <class T>
struct Ahead {
  Stream panel, input;
  const char* out;
  const char* residual;
  int64_t pixel, residual_pixel, pixels;

  FR_LAMBDA explicit Ahead(const TileArgs<T>& t)
      : panel(t.next_panel),
        input(t.next_input),
        out(t.out + t.ahead * t.pixel),
        residual(t.residual ? t.residual + t.ahead * t.residual_pixel : out),
        pixel(t.pixel),
        residual_pixel(t.residual_pixel),
        pixels(t.ahead_pixels) {}

  template <int kWidth>
  FR_LAMBDA void prefetch() {
    // A panel is more than the first-level cache holds.
    panel.template prefetch<2>();
    input.template prefetch<3>();
    for (int64_t i = 0; i < pixels; ++i, out += pixel, residual += residual_pixel)
      for (int64_t c = 0; c < kWidth * static_cast<int64_t>(sizeof(T)); c += 64) {
        __builtin_prefetch(out + c, 1, 3);
        __builtin_prefetch(residual + c, 0, 3);
      }
  }
};

// sum[r][:] += row[r][k] * panel[k][:], for rows kFrom to kTo and `steps` k.
template <class T, int kR, int kV, int kFrom, int kTo>
FR_VEC void multiply(Register<T> (&sum)[kR][kV * kRegisters], const Element<T>* const (&row)[kR],
                     int64_t steps, const Element<T>* const* panel, Ahead<T>& ahead) {
  constexpr int kWidth = kMaxVecs < kV ? kMaxVecs : kV;
  const Element<T>* first = panel[0];
  const Element<T>* second = panel[1];
  const int64_t end = steps * kPer<T>;
  for (int64_t k = 0; k < end;) {
    ahead.template prefetch<kV * kLanes<Acc<T>>>();
    const int64_t stop = end - k < kBlock * kPer<T> ? end : k + kBlock * kPer<T>;
    for (; k < stop; k += kPer<T>) {
      Register<T> w[kV * kRegisters];
#pragma GCC unroll 8
      for (int v = 0; v < kV * kRegisters; ++v)
        w[v] = load_register<T>((v < kWidth * kRegisters ? first : second) +
                                v % (kWidth * kRegisters) * (kVecElements<T> / kRegisters));
      // Too far ahead for the processor's own prefetching, which works page by page.
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) {
        const int64_t at = (kBlock * kWidth + v) * kVecElements<T>;
        __builtin_prefetch(first + at, 0, 3);
        if constexpr (kV > kWidth) __builtin_prefetch(second + at, 0, 3);
      }
#pragma GCC unroll 16
      for (int r = kFrom; r < kTo; ++r) {
        const Register<T> x = splat_step<T>(row[r] + k);
#pragma GCC unroll 8
        for (int v = 0; v < kV * kRegisters; ++v) multiply_add<T>(sum[r][v], x, w[v]);
      }
      first += kWidth * kVecElements<T>;
      if constexpr (kV > kWidth) second += kWidth * kVecElements<T>;
    }
  }
}

// math::relu. The processor's maximum is its second operand where either is NaN or both are zero.
template <class V>
FR_VEC V relu(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_max_ps(__m512{}, (__m512)x);
#endif
  return math::relu(x);
}

// act(sum * scale + shift + residual), for a tile that is all there. The sums come from memory: a
// compiler that has to hold them in registers up to here spills them in the loops before.
template <class T, int kR, int kV, bool kResidual, bool kRelu>
__attribute__((noinline)) void finish(const Acc<T>* sum, const TileArgs<T>& t) {
  using A = Acc<T>;
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const Vec<A> a = t.scale ? load(t.scale + v * kLanes<A>) : splat(A(1));
    const Vec<A> b = t.shift ? load(t.shift + v * kLanes<A>) : Vec<A>{};
    const char* residual = t.residual + v * kLanes<A> * sizeof(T);
    char* out = t.out + v * kLanes<A> * sizeof(T);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r, residual += t.residual_pixel, out += t.pixel) {
      Vec<A> y = math::scale_shift(load(sum + (r * kV + v) * kLanes<A>), a, b);
      if (kResidual) y += load(reinterpret_cast<const T*>(residual));
      if (kRelu) y = relu(y);
      store_result(reinterpret_cast<T*>(out), y);
    }
  }
}

// The same for a tile that ends before its last pixel or channel.
template <class T, int kV>
__attribute__((noinline)) void finish_part(const Acc<T>* sum, const TileArgs<T>& t) {
  using A = Acc<T>;
  for (int64_t v = 0; v < kV; ++v) {
    const int64_t c = v * kLanes<A>, columns = t.columns - c;
    if (columns <= 0) break;
    const bool whole = columns >= kLanes<A>;
    auto get = [&](const auto* p) { return whole ? load(p) : load(p, columns); };
    const Vec<A> a = t.scale ? get(t.scale + c) : splat(A(1));
    const Vec<A> b = t.shift ? get(t.shift + c) : Vec<A>{};
    for (int64_t r = 0; r < t.count; ++r) {
      Vec<A> y = math::scale_shift(load(sum + (r * kV + v) * kLanes<A>), a, b);
      if (t.residual) y += get(reinterpret_cast<const T*>(t.residual + r * t.residual_pixel) + c);
      y = math::activate(y, t.args->act);
      T* out = reinterpret_cast<T*>(t.out + r * t.pixel) + c;
      if (whole) {
        store_result(out, y);
      } else {
        T buffer[kLanes<A>];
        store_result(buffer, y);
        __builtin_memcpy(out, buffer, columns * sizeof(T));
      }
    }
  }
}

// The sums of a tile, [row][vector].
template <class T, int kR, int kV, bool kPadded>
__attribute__((noinline)) void sum_up(const TileArgs<T>& t, Acc<T>* memory) {
  using A = Acc<T>;
  constexpr int64_t kStep = (kMaxVecs < kV ? kMaxVecs : kV) * kVecElements<T>;
  Register<T> sum[kR][kV * kRegisters] = {};
  bool first = true;
  auto add_up = [&]() FR_LAMBDA {
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kV * kRegisters; ++v) {
        A* at = memory + (r * kV * kRegisters + v) * (kLanes<A> / kRegisters);
        if (!first) sum[r][v] += load_register<T>(at);
        __builtin_memcpy(at, &sum[r][v], kRegisterBytes);
        sum[r][v] = Register<T>{};
      }
    first = false;
  };
  Ahead<T> ahead(t);
  const Element<T>* panel[2] = {t.panel[0], t.panel[1]};
  int64_t room = kSumSteps;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    int64_t offset = t.offset;
    for (int64_t left = t.depth; left > 0;) {
      const Element<T>* row[kR];
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) row[r] = t.rows[r * t.taps + tap] + offset;
      const int64_t steps = left < room ? left : room;
      if (!kPadded || t.reach[tap] == kAll)
        multiply<T, kR, kV, 0, kR>(sum, row, steps, panel, ahead);
      else if (t.reach[tap] == kNotFirst)
        multiply<T, kR, kV, 1, kR>(sum, row, steps, panel, ahead);
      else if (t.reach[tap] == kNotLast)
        multiply<T, kR, kV, 0, kR - 1>(sum, row, steps, panel, ahead);
      panel[0] += steps * kStep;
      panel[1] += steps * kStep;
      offset += steps * kPer<T>;
      left -= steps;
      // Counted where nothing is multiplied too: a pixel's sum is cut alike in every tile.
      room -= steps;
      if (room == 0) {
        add_up();
        room = kSumSteps;
      }
    }
  }
  // Also when nothing has come since: zeros are added then.
  add_up();
}

// A panel of several groups multiplies the input of others by zero, which is not nothing where that
// is not finite. Sums that are not are made again, of their own group's input.
template <class T, int kR, int kV>
__attribute__((noinline)) void sum_groups_apart(const TileArgs<T>& t, Acc<T>* memory) {
  constexpr int64_t kWidth = kV * kLanes<Acc<T>>, kStep = kWidth * kPer<T>;
  Vec<Acc<T>> nothing{};  // NaN where a sum is not finite
  for (int64_t i = 0; i < kR * kWidth; i += kLanes<Acc<T>>) nothing += load(memory + i) * 0;
  bool finite = true;
  for (int64_t lane = 0; lane < kLanes<Acc<T>>; ++lane) finite &= nothing[lane] == 0;
  if (finite) return;
  for (int64_t r = 0; r < t.count; ++r)
    for (int64_t c = 0; c < kWidth && c < t.columns; ++c) {
      Acc<T>& sum = memory[r * kWidth + c];
      if (sum * 0 == 0) continue;
      sum = 0;
      const int64_t group = (t.groups.first + c) / t.groups.out;
      for (int64_t tap = 0; tap < t.taps; ++tap) {
        const Reach reach = t.reach[tap];
        if (reach == kNone || (reach == kNotFirst && r == 0) || (reach == kNotLast && r == kR - 1))
          continue;
        const Element<T>* row = t.rows[r * t.taps + tap] + t.offset;
        const Element<T>* weight = t.panel[0] + tap * t.depth * kStep + c * kPer<T>;
        for (int64_t k = 0; k < t.depth * kPer<T>; ++k)
          if ((t.offset + k) % t.groups.channels / t.groups.in == group)
            sum += load_one(row + k) * load_one(weight + k / kPer<T> * kStep + k % kPer<T>);
      }
    }
}

// What is made of a tile's sums.
template <class T>
struct Finish {
  template <int kR, int kV>
  FR_LAMBDA static void run(Acc<T>* sum, const TileArgs<T>& t) {
    if (kV <= kMaxVecs && t.groups.in) sum_groups_apart<T, kR, kV>(t, sum);
    if (t.count < kR || t.columns < kV * kLanes<Acc<T>>)
      finish_part<T, kV>(sum, t);
    else if (t.args->act == Act::relu)
      t.residual ? finish<T, kR, kV, true, true>(sum, t) : finish<T, kR, kV, false, true>(sum, t);
    else
      t.residual ? finish<T, kR, kV, true, false>(sum, t) : finish<T, kR, kV, false, false>(sum, t);
  }
};

template <class T, int kR, int kV, bool kPadded>
FR_VEC void tile(const TileArgs<T>& t) {
  Acc<T> sum[kR * kV * kLanes<Acc<T>>] __attribute__((aligned(64)));
  sum_up<T, kR, kV, kPadded>(t, sum);
  Finish<T>::template run<kR, kV>(sum, t);
}

FR_NAMESPACE_END
