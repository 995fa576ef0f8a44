// Convolution as an implicit matrix product over channels_last activations. The register tile is
// kRows output pixels by one panel of output channels; for each kernel position, a row of the tile
// is a pointer to the input pixel it reads. A 1x1 convolution of fp32 reads its input where it
// lies. Any other first copies the image rows that a chunk of pixels needs, widened and with their
// padding, into the cache.
#include <cstdlib>

#include "../math.h"
#include "conv_panels.h"

FR_NAMESPACE_BEGIN

namespace {

// A chunk's input and output stay in the second-level cache while every panel passes over them.
constexpr int64_t kChunkBytes = 256 << 10;
// Weights of up to this size are passed over for every tile, larger ones once a chunk.
constexpr int64_t kCachedWeightBytes = 512 << 10;
// Up to this much input and output, panels are packed on the way rather than beforehand.
constexpr int64_t kPackInPassBytes = 1 << 20;
// Steps of a tile between one round of prefetches and the next.
constexpr int64_t kBlock = 16;
// Products summed up in registers before they are added to the sum in memory.
constexpr int64_t kSumSteps = 256;

template <class E>
struct Buffer {
  E* data;
  explicit Buffer(int64_t n) : data(static_cast<E*>(std::malloc((n > 0 ? n : 1) * sizeof(E)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Memory to prefetch while a tile is computed: so many bytes from `at` on for each kBlock steps of
// it.
struct Ahead {
  const char* at;
  int64_t bytes;
};

template <int kWrite>
FR_VEC void prefetch(Ahead& ahead) {
  for (int64_t line = 0; line < ahead.bytes; line += 64)
    __builtin_prefetch(ahead.at + line, kWrite, 3);
  ahead.at += ahead.bytes;
}

// acc[r][:] = sum over taps and depth of rows[tap][r][k] * panel[tap][k][:]. Sums are kept in
// registers for kSumSteps products and then added up in acc: a shorter chain rounds less, and costs
// 1% of the time.
template <class A, int kVecs>
__attribute__((noinline)) void tile(const A* const* rows, int64_t taps, int64_t offset,
                                    int64_t depth, const A* panel, Ahead next_panel,
                                    Ahead next_input, Ahead next_output, Ahead next_residual,
                                    A* acc) {
  Vec<A> sum[kRows][kVecs] = {};
  bool first = true;
  auto flush = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        A* to = acc + (r * kVecs + v) * kLanes<A>;
        store(to, first ? sum[r][v] : load(to) + sum[r][v]);
        sum[r][v] = Vec<A>{};
      }
    first = false;
  };
  int64_t room = kSumSteps;
  for (int64_t tap = 0; tap < taps; ++tap, rows += kRows) {
    const A* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows[r] + offset;
    for (int64_t k = 0; k < depth;) {
      const int64_t left = depth - k < room ? depth - k : room;
      const int64_t end = k + (left < kBlock ? left : kBlock);
      room -= end - k;
      prefetch<0>(next_panel);
      prefetch<0>(next_input);
      prefetch<1>(next_output);
      prefetch<0>(next_residual);
      for (; k < end; ++k, panel += kVecs * kLanes<A>) {
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
  const A* packed;    // null: pack in the pass
  const bool copies;  // image rows are copied, widened and padded, before they are read
  const bool merged;  // a kernel row is one run of memory, so one tap

  int64_t taps() const { return merged ? s.kernel[0] : panels.taps; }
  int64_t depth() const { return merged ? s.kernel[1] * s.in_channels : panels.depth; }

  // Rows are counted through all images, with their padding where they are copied.
  int64_t image_rows() const { return s.height + 2 * s.padding[0]; }
  int64_t row_pixels() const { return s.width + 2 * s.padding[1]; }
  int64_t row_of(int64_t pixel) const {
    const int64_t line = pixel / s.out_width;
    return line / s.out_height * image_rows() + line % s.out_height * s.stride[0];
  }
  int64_t rows_for(int64_t begin, int64_t end) const {
    return row_of(end - 1) + (s.kernel[0] - 1) * s.dilation[0] + 1 - row_of(begin);
  }

  void widen(const T* from, int64_t n, A* to) const {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load(from + i));
    if (i < n) store(to + i, load(from + i, n - i), n - i);
  }

  void copy_rows(int64_t first, int64_t count, A* to) const {
    const int64_t side = s.padding[1] * s.in_channels, width = s.width * s.in_channels;
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t image = row / image_rows(), h = row % image_rows() - s.padding[0];
      const bool inside = h >= 0 && h < s.height;
      for (int64_t i = 0; i < side; ++i) to[i] = to[side + width + i] = 0;
      if (inside)
        widen(static_cast<const T*>(args.x) + (image * s.height + h) * width, width, to + side);
      else
        for (int64_t i = 0; i < width; ++i) to[side + i] = 0;
      to += width + 2 * side;
    }
  }

  // Row pointers of one chunk, [tile][tap][row], into `input`, which begins at image row `from`;
  // the rows of the last tile that lie beyond the chunk repeat its last pixel and are not stored.
  void point(int64_t begin, int64_t end, const A* input, int64_t from, const A** rows) const {
    // Counted on from pixel to pixel: dividing for each would cost a third of a small tile's time.
    int64_t w = begin % s.out_width, h = begin / s.out_width % s.out_height;
    int64_t row = row_of(begin) - from;
    for (int64_t first = begin; first < end; first += kRows, rows += taps() * kRows)
      for (int r = 0; r < kRows; ++r) {
        const A* at = input + (row * row_pixels() + w * s.stride[1]) * s.in_channels;
        for (int64_t tap = 0; tap < taps(); ++tap) {
          const int64_t kh = merged ? tap : tap / s.kernel[1];
          const int64_t kw = merged ? 0 : tap % s.kernel[1];
          rows[tap * kRows + r] =
              at + (kh * s.dilation[0] * row_pixels() + kw * s.dilation[1]) * s.in_channels;
        }
        if (first + r + 1 >= end || ++w < s.out_width) continue;
        w = 0;
        row += s.stride[0];
        if (++h < s.out_height) continue;
        h = 0;
        row += image_rows() - s.out_height * s.stride[0];
      }
  }

  // act(acc * scale + shift + residual) for `count` pixels from `pixel` on, one panel wide.
  void finish(const A* acc, int64_t pixel, int64_t count, int64_t panel) const {
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    for (int64_t v = 0; v < panels.vecs; ++v) {
      const int64_t c = panel * panels.width + v * kLanes<A>;
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
    const int64_t tiles = (end - begin + kRows - 1) / kRows, steps = taps() * depth();
    const int64_t from = row_of(begin), count = rows_for(begin, end);
    Buffer<const A*> rows(tiles * taps() * kRows);
    Buffer<A> copy(copies ? count * row_pixels() * s.in_channels : 0);
    Buffer<A> panel(packed ? 0 : panels.elements());
    if (!rows.data || !copy.data || !panel.data) return Status::out_of_memory;
    if (copies) {
      copy_rows(from, count, copy.data);
      point(begin, end, copy.data, from, rows.data);
    } else {
      point(begin, end, static_cast<const A*>(args.x), 0, rows.data);
    }
    A acc[kRows * kMaxVecs * kLanes<A>];
    const int64_t weight_bytes = (panel_end - panel_begin) * panels.elements() * sizeof(A);
    // Weights that stay in the cache are passed over for every tile, which then writes whole
    // pixels.
    const bool whole_pixels =
        packed && weight_bytes <= kCachedWeightBytes && panel_end - panel_begin == panels.count;
    const int64_t blocks = taps() * ((depth() + kBlock - 1) / kBlock);
    const int64_t panel_bytes = panels.elements() * sizeof(A) / (tiles * blocks);
    const int64_t tile_bytes = kRows * s.out_channels * sizeof(T);
    const int64_t output_bytes = whole_pixels ? tile_bytes / (blocks * panels.count) : 0;
    auto one = [&](int64_t p, int64_t t) {
      const A* weights = packed ? packed + p * panels.elements() : panel.data;
      const A* const* tile_rows = rows.data + t * taps() * kRows;
      // The processor does not see these coming. The first panel brings in the input, where it was
      // not copied; later ones find it in the cache.
      Ahead next_panel{}, next_input{}, next_output{}, next_residual{};
      if (packed && p + 1 < panel_end)
        next_panel = {
            reinterpret_cast<const char*>(weights + panels.elements()) + t * blocks * panel_bytes,
            panel_bytes};
      if (!copies && p == panel_begin && t + 1 < tiles)
        next_input = {reinterpret_cast<const char*>(tile_rows[kRows]),
                      kRows * kBlock * static_cast<int64_t>(sizeof(A))};
      if (output_bytes && t + 1 < tiles) {
        const int64_t at =
            (begin + (t + 1) * kRows) * s.out_channels * sizeof(T) + p * blocks * output_bytes;
        next_output = {static_cast<const char*>(args.out) + at, output_bytes};
        if (args.residual)
          next_residual = {static_cast<const char*>(args.residual) + at, output_bytes};
      }
      const int64_t offset = merged ? 0 : first_channel(panels, s, p);
      if (panels.vecs == 1)
        tile<A, 1>(tile_rows, taps(), offset, depth(), weights, next_panel, next_input, next_output,
                   next_residual, acc);
      else
        tile<A, kMaxVecs>(tile_rows, taps(), offset, depth(), weights, next_panel, next_input,
                          next_output, next_residual, acc);
      const int64_t first = begin + t * kRows;
      finish(acc, first, end - first < kRows ? end - first : kRows, p);
    };
    if (whole_pixels) {
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t p = panel_begin; p < panel_end; ++p) one(p, t);
      return Status::ok;
    }
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      if (!packed)
        pack_panel(panels, s, static_cast<const T*>(args.weight), args.weight_stride, p,
                   panel.data);
      for (int64_t t = 0; t < tiles; ++t) one(p, t);
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

  const int64_t pixel_bytes =
      sizeof(A) * (s.in_channels * s.stride[0] * s.stride[1] + s.out_channels);
  const int64_t weight_bytes = panels.count * panels.elements() * sizeof(A);
  const int64_t tiles = (pixels + kRows - 1) / kRows;
  const bool pack_in_pass = !args.packed && pixels * pixel_bytes <= kPackInPassBytes;
  // The threads share out the pixels, or the panels where those are the more bytes to pass around.
  int64_t chunks = pack_in_pass ? 1 : (pixels * pixel_bytes + kChunkBytes - 1) / kChunkBytes;
  int64_t splits = 1;
  if (pack_in_pass || weight_bytes > pixels * pixel_bytes || tiles < 2 * pool.threads)
    splits = panels.count < pool.threads ? panels.count : pool.threads;
  else
    chunks = (chunks + pool.threads - 1) / pool.threads * pool.threads;
  if (chunks > tiles) chunks = tiles;

  Buffer<A> own(args.packed || pack_in_pass ? 0 : panels.count * panels.elements());
  if (!own.data) return Status::out_of_memory;
  const A* packed = static_cast<const A*>(args.packed);
  if (!packed && !pack_in_pass) {
    ConvPackArgs pack{args.dtype, s, args.weight, {}, own.data};
    for (int d = 0; d < 4; ++d) pack.weight_stride[d] = args.weight_stride[d];
    FUSED_RESNET_ISA::conv_pack(pack, pool);
    packed = own.data;
  }

  const bool copies = sizeof(T) != sizeof(A) || panels.taps > 1 || s.padding[0] || s.padding[1];
  const bool merged = panels.depth == s.in_channels && s.dilation[1] == 1;
  const Conv<T> work{args, s, panels, packed, copies, merged};
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
