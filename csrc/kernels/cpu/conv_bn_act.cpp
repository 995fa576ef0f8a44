// Convolution as an implicit matrix product over channels_last activations. The register tile is
// kRows output pixels by one panel of output channels; for each kernel position a row of the tile
// is a pointer to the input pixel it reads, or to zeros where that pixel lies in the padding.
// Nothing is copied, except that half types are widened and few-channel inputs (the stem) gathered
// into patches, both a cache-sized chunk at a time.
#include <cstdlib>

#include "../math.h"
#include "conv_panels.h"

FR_NAMESPACE_BEGIN

namespace {

// A chunk's input stays in the second-level cache while every panel passes over it.
constexpr int64_t kChunkBytes = 512 << 10;
// Up to this much input, panels are packed on the way rather than beforehand.
constexpr int64_t kPackInPassBytes = 1 << 20;
// Below this depth a row of a tile is too short to be worth a pointer: patches are gathered
// instead.
constexpr int64_t kPatchDepth = 16;

constexpr int64_t kSumSteps = 256;

template <class E>
struct Buffer {
  E* data;
  explicit Buffer(int64_t n) : data(static_cast<E*>(std::malloc((n > 0 ? n : 1) * sizeof(E)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// acc[r][:] = sum over taps and depth of rows[tap][r][k] * panel[tap][k][:]. Sums are kept in
// registers for kSumSteps products and then added up in acc: a shorter chain rounds less, and costs
// 1% of the time. On the way it asks for `ahead`, the panel to come, at ahead_step bytes a step.
template <class A, int kVecs>
__attribute__((noinline)) void tile(const A* const* rows, int64_t taps, int64_t offset,
                                    int64_t depth, const A* panel, const char* ahead,
                                    int64_t ahead_step, A* acc) {
  Vec<A> sum[kRows][kVecs] = {};
  for (int i = 0; i < kRows * kVecs; ++i) store(acc + i * kLanes<A>, Vec<A>{});
  auto flush = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        A* to = acc + (r * kVecs + v) * kLanes<A>;
        store(to, load(to) + sum[r][v]);
        sum[r][v] = Vec<A>{};
      }
  };
  int64_t room = kSumSteps;
  for (int64_t tap = 0; tap < taps; ++tap, rows += kRows) {
    const A* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows[r] + offset;
    for (int64_t k = 0; k < depth;) {
      const int64_t end = depth - k < room ? depth : k + room;
      room -= end - k;
      for (; k < end; ++k, panel += kVecs * kLanes<A>) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
        Vec<A> w[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) w[v] = load(panel + v * kLanes<A>);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec<A> x = splat(row[r][k]);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) sum[r][v] += x * w[v];
        }
      }
      if (room == 0) {
        flush();
        room = kSumSteps;
      }
    }
  }
  flush();
}

template <class T>
struct Conv {
  using A = Acc<T>;
  const ConvBnActArgs& args;
  const ConvShape& s;
  const Panels panels;
  const A* packed;  // null: pack in the pass
  const A* zeros;
  int64_t pixels;      // of the output
  int64_t chunk_rows;  // output pixels of a chunk
  bool patches;

  // The input pixels a run of output pixels may read, as one contiguous range.
  void source_range(int64_t begin, int64_t end, int64_t* from, int64_t* to) const {
    const int64_t image = s.out_height * s.out_width;
    auto row = [&](int64_t m, int64_t tap) {
      const int64_t h = m % image / s.out_width * s.stride[0] - s.padding[0] + tap * s.dilation[0];
      const int64_t inside = h < 0 ? 0 : h > s.height - 1 ? s.height - 1 : h;
      return (m / image * s.height + inside) * s.width;
    };
    *from = row(begin, 0);
    *to = row(end - 1, s.kernel[0] - 1) + s.width;
  }

  void widen(const T* from, int64_t n, A* to) const {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
  }

  // Where output pixel m's window begins: image row 0 of its image, then h and w, maybe in the
  // padding.
  struct Origin {
    int64_t image, h, w;
  };
  Origin origin(int64_t m) const {
    const int64_t image = s.out_height * s.out_width;
    const int64_t at = m % image;
    return {m / image * s.height, at / s.out_width * s.stride[0] - s.padding[0],
            at % s.out_width * s.stride[1] - s.padding[1]};
  }

  // Row pointers of one chunk, [tile][tap][row]; the rows of the last tile that lie beyond the
  // chunk repeat its last pixel and are not stored.
  void point(int64_t begin, int64_t end, const A* x, int64_t base, const A** rows) const {
    for (int64_t first = begin; first < end; first += kRows) {
      Origin at[kRows];
      for (int r = 0; r < kRows; ++r) at[r] = origin(first + r < end ? first + r : end - 1);
      for (int64_t kh = 0; kh < s.kernel[0]; ++kh)
        for (int64_t kw = 0; kw < s.kernel[1]; ++kw)
          for (int r = 0; r < kRows; ++r) {
            const int64_t h = at[r].h + kh * s.dilation[0], w = at[r].w + kw * s.dilation[1];
            const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
            *rows++ = inside ? x + ((at[r].image + h) * s.width + w - base) * s.in_channels : zeros;
          }
    }
  }

  // The windows of a chunk's pixels, side by side, and the row pointers to them.
  void gather(int64_t begin, int64_t end, A* to, const A** rows) const {
    const int64_t length = panels.taps * s.in_channels;
    const int64_t padded = (end - begin + kRows - 1) / kRows * kRows;
    for (int64_t r = 0; r < padded; ++r)
      rows[r] = to + (r < end - begin ? r : end - begin - 1) * length;
    const int64_t across = s.kernel[1] * s.in_channels;
    for (int64_t m = begin; m < end; ++m) {
      const Origin at = origin(m);
      const bool run = s.dilation[1] == 1 && at.w >= 0 && at.w + s.kernel[1] <= s.width;
      for (int64_t kh = 0; kh < s.kernel[0]; ++kh, to += across) {
        const int64_t h = at.h + kh * s.dilation[0];
        const bool inside = h >= 0 && h < s.height;
        const T* row = static_cast<const T*>(args.x) + (at.image + h) * s.width * s.in_channels;
        if (inside && run) {
          widen(row + at.w * s.in_channels, across, to);
          continue;
        }
        for (int64_t i = 0; i < across; ++i) {
          const int64_t w = at.w + i / s.in_channels * s.dilation[1];
          const bool read = inside && w >= 0 && w < s.width;
          to[i] = read ? load_one(row + w * s.in_channels + i % s.in_channels) : A(0);
        }
      }
    }
  }

  // act(acc * scale + shift + residual) for `count` pixels from `pixel` on, one panel wide.
  void finish(const A* acc, int64_t pixel, int64_t count, int64_t panel) const {
    const int64_t first = panel * panels.width;
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    for (int64_t v = 0; v < panels.vecs; ++v) {
      const int64_t c = first + v * kLanes<A>;
      const int64_t columns = s.out_channels - c;
      if (columns <= 0) break;
      const bool whole = columns >= kLanes<A>;
      auto get = [&](const auto* p) { return whole ? load(p) : load(p, columns); };
      const Vec<A> a = scale ? get(scale + c) : splat(A(1));
      const Vec<A> b = shift ? get(shift + c) : Vec<A>{};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (pixel + r) * s.out_channels + c;
        Vec<A> y = load(acc + (r * panels.vecs + v) * kLanes<A>);
        y = math::scale_shift(y, a, b);
        if (args.residual) y += get(static_cast<const T*>(args.residual) + at);
        y = math::activate(y, args.act);
        T* out = static_cast<T*>(args.out) + at;
        if (whole)
          store(out, y);
        else
          store(out, y, columns);
      }
    }
  }

  // One chunk of pixels by a range of panels.
  Status chunk(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    const int64_t tiles = (end - begin + kRows - 1) / kRows;
    const int64_t taps = patches ? 1 : panels.taps;
    const int64_t depth = patches ? panels.taps * panels.depth : panels.depth;
    int64_t from = 0, to = 0;
    source_range(begin, end, &from, &to);
    constexpr bool kWiden = sizeof(T) != sizeof(A);
    Buffer<const A*> rows(tiles * taps * kRows);
    Buffer<A> input(patches ? (end - begin) * depth : kWiden ? (to - from) * s.in_channels : 0);
    Buffer<A> panel(packed ? 0 : panels.elements());
    if (!rows.data || !input.data || !panel.data) return Status::out_of_memory;
    const T* x = static_cast<const T*>(args.x);
    if (patches) {
      gather(begin, end, input.data, rows.data);
    } else if constexpr (kWiden) {
      widen(x + from * s.in_channels, (to - from) * s.in_channels, input.data);
      point(begin, end, input.data, from, rows.data);
    } else {
      point(begin, end, x, 0, rows.data);
    }
    A acc[kRows * kMaxVecs * kLanes<A>];
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const A* weights = packed ? packed + p * panels.elements() : panel.data;
      if (!packed)
        pack_panel(panels, s, static_cast<const T*>(args.weight), args.weight_stride, p,
                   panel.data);
      const int64_t offset = patches ? 0 : first_channel(panels, s, p);
      const A* next = packed && p + 1 < panel_end ? weights + panels.elements() : weights;
      const int64_t step = panels.elements() * sizeof(A) / (tiles * taps * depth);
      for (int64_t t = 0; t < tiles; ++t) {
        const A* const* tile_rows = rows.data + t * taps * kRows;
        const char* ahead = reinterpret_cast<const char*>(next) + t * taps * depth * step;
        if (panels.vecs == 1)
          tile<A, 1>(tile_rows, taps, offset, depth, weights, ahead, step, acc);
        else
          tile<A, kMaxVecs>(tile_rows, taps, offset, depth, weights, ahead, step, acc);
        const int64_t first = begin + t * kRows;
        finish(acc, first, end - first < kRows ? end - first : kRows, p);
      }
    }
    return Status::ok;
  }
};

template <class T>
Status conv(const ConvBnActArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const ConvShape& s = args.shape;
  const Panels panels = panels_of<A>(s);
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  if (pixels == 0 || s.out_channels == 0) return Status::ok;

  const bool patches = s.groups == 1 && s.in_channels < kPatchDepth && panels.taps > 1;
  const int64_t row_bytes = sizeof(A) * (patches ? panels.taps * s.in_channels
                                                 : s.in_channels * s.stride[0] * s.stride[1]);
  const int64_t tiles = (pixels + kRows - 1) / kRows;
  int64_t chunks = (pixels * row_bytes + kChunkBytes - 1) / kChunkBytes;
  const bool pack_in_pass = !args.packed && pixels * row_bytes <= kPackInPassBytes;
  // The threads share out the pixels, or the panels where those are the more bytes to pass around.
  const int64_t weight_bytes = panels.count * panels.elements() * sizeof(A);
  int64_t splits = 1;
  if (pack_in_pass || weight_bytes > pixels * row_bytes || tiles < 2 * pool.threads) {
    if (pack_in_pass) chunks = 1;
    splits = panels.count < pool.threads ? panels.count : pool.threads;
  } else {
    chunks = (chunks + pool.threads - 1) / pool.threads * pool.threads;
    if (chunks > tiles) chunks = tiles;
  }

  Buffer<A> zeros(s.in_channels);
  Buffer<A> own(args.packed || pack_in_pass ? 0 : panels.count * panels.elements());
  if (!zeros.data || !own.data) return Status::out_of_memory;
  for (int64_t c = 0; c < s.in_channels; ++c) zeros.data[c] = 0;
  const A* packed = static_cast<const A*>(args.packed);
  if (!packed && !pack_in_pass) {
    FUSED_RESNET_ISA::conv_pack({args.dtype,
                                 s,
                                 args.weight,
                                 {args.weight_stride[0], args.weight_stride[1],
                                  args.weight_stride[2], args.weight_stride[3]},
                                 own.data},
                                pool);
    packed = own.data;
  }

  const Conv<T> work{args, s, panels, packed, zeros.data, pixels, 0, patches};
  int failed = 0;
  parallel(pool, chunks * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t split = job / chunks, chunk = job % chunks;
      const int64_t first = tiles * chunk / chunks * kRows;
      const int64_t last = tiles * (chunk + 1) / chunks * kRows;
      if (work.chunk(first, last < pixels ? last : pixels, panels.count * split / splits,
                     panels.count * (split + 1) / splits) != Status::ok)
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace

Status conv_bn_act(const ConvBnActArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return conv<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
