// Convolution as an implicit matrix product over channels_last activations. The register tile is
// some output pixels by one or two panels of output channels; for each kernel position, a row of
// the tile is a pointer to the input pixel it reads, in the input itself wherever that can be
// multiplied as it lies. Otherwise the image rows that a chunk of pixels needs are first copied,
// widened and with their padding, into the cache.
#pragma once

#include <cstdlib>

#include "conv_tile.h"

FR_NAMESPACE_BEGIN

// A chunk's input and output stay in the second-level cache while every panel passes over them.
constexpr int64_t kChunkBytes = 512 << 10;
// Weights of up to this size are passed over for every tile, larger ones once a chunk.
constexpr int64_t kCachedWeightBytes = 512 << 10;
// Up to this much input and output, panels are packed on the way rather than beforehand.
constexpr int64_t kPackInPassBytes = 1 << 20;
// Kernel positions of fewer steps are copied, so that a row of them is one run of memory.
constexpr int64_t kShortDepth = 16;
// Pixels that lie a multiple of this apart fall into one set of the first-level cache, which holds
// fewer of them than a tile has rows.
constexpr int64_t kSetBytes = 4096;

// Where a tile's rows are read: in the input itself; in a copy of the image rows that a chunk
// needs, with their padding; or, where a kernel is one pixel, in a copy of just the pixels it
// reads.
enum class Source { in_place, rows, pixels };

// Input positions that an output reaches over, from the first padding on. conv_dgrad's convolutions
// may need more than `padding` behind an image, and have a negative padding where they skip input.
FR_VEC int64_t reach_of(const ConvShape& s, int axis) {
  const int64_t out = axis == 0 ? s.out_height : s.out_width;
  return (out - 1) * s.stride[axis] + (s.kernel[axis] - 1) * s.dilation[axis] + 1;
}

FR_VEC int64_t padded_size(const ConvShape& s, int axis) {
  const int64_t size = (axis == 0 ? s.height : s.width) + 2 * s.padding[axis];
  return size > reach_of(s, axis) ? size : reach_of(s, axis);
}

FR_VEC bool reads_padding(const ConvShape& s) {
  return s.padding[0] > 0 || s.padding[1] > 0 || reach_of(s, 0) - s.padding[0] > s.height ||
         reach_of(s, 1) - s.padding[1] > s.width;
}

template <class E>
struct Buffer {
  E* data;
  explicit Buffer(int64_t n) : data(static_cast<E*>(std::malloc((n > 0 ? n : 1) * sizeof(E)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class T>
struct Conv {
  using A = Acc<T>;
  using E = Element<T>;
  const ConvArgs<T>& args;
  const ConvShape& s;
  const Panels panels;
  const E* packed;  // null: pack in the pass
  const Source source;
  const bool merged;  // a kernel row is one run of memory, so one tap
  const int zero;     // what the padding holds; its products are left out where that is 0
  const int64_t residual_size, out_size;  // bytes of an element
  const int tile_rows;
  const int tile_panels;

  int64_t taps() const { return merged ? s.kernel[0] : panels.taps; }
  int64_t depth() const { return merged ? s.kernel[1] * panels.depth : panels.depth; }

  // Rows are counted through all images, with their padding where they are copied.
  int64_t image_rows() const { return padded_size(s, 0); }
  int64_t row_elements() const { return padded_size(s, 1) * panels.channels; }
  int64_t row_of(int64_t pixel) const {
    const int64_t line = pixel / s.out_width;
    return line / s.out_height * image_rows() + line % s.out_height * s.stride[0];
  }
  int64_t rows_for(int64_t begin, int64_t end) const {
    return row_of(end - 1) + (s.kernel[0] - 1) * s.dilation[0] + 1 - row_of(begin);
  }

  void pad(E* to, int64_t n) const {
    if (zero == 0) {
      __builtin_memset(to, 0, n * sizeof(E));
      return;
    }
    if constexpr (sizeof(T) == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<E>(zero);
  }

  void widen(const T* from, int64_t n, E* to) const {
    if constexpr (sizeof(T) == sizeof(E)) {
      __builtin_memcpy(to, from, n * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load(from + i));
      if (i < n) store(to + i, load(from + i, n - i), n - i);
    }
  }

  void copy_pixel(const T* from, E* to) const {
    if constexpr (sizeof(T) == sizeof(E))
      for (int64_t c = 0; c < s.in_channels; ++c) to[c] = from[c];
    else
      widen(from, s.in_channels, to);
    for (int64_t c = s.in_channels; c < panels.channels; ++c) to[c] = E{};
  }

  void copy_rows(int64_t first, int64_t count, E* to) const {
    const int64_t padding = s.padding[1] > 0 ? s.padding[1] : 0, skipped = padding - s.padding[1];
    const int64_t room = padded_size(s, 1) - padding, there = s.width - skipped;
    const int64_t columns = there < 0 ? 0 : there < room ? there : room;
    const int64_t side = padding * panels.channels, inside = columns * panels.channels;
    for (int64_t row = first; row < first + count; ++row, to += row_elements()) {
      const int64_t image = row / image_rows(), h = row % image_rows() - s.padding[0];
      const T* from = static_cast<const T*>(args.x) +
                      ((image * s.height + h) * s.width + skipped) * s.in_channels;
      if (h < 0 || h >= s.height) {
        pad(to, row_elements());
        continue;
      }
      pad(to, side);
      pad(to + side + inside, row_elements() - side - inside);
      if (panels.channels == s.in_channels) {
        widen(from, inside, to + side);
        continue;
      }
      for (int64_t w = 0; w < columns; ++w)
        copy_pixel(from + w * s.in_channels, to + side + w * panels.channels);
    }
  }

  // Row pointers of one chunk, [tile][row][tap], into a copy that begins at image row `from`; the
  // rows of the last tile that lie beyond the chunk repeat its last pixel and are not stored.
  void point(int64_t begin, int64_t end, const E* copy, int64_t from, const E** rows) const {
    // Counted on from pixel to pixel: dividing for each would cost a third of a small tile's time.
    int64_t w = begin % s.out_width, h = begin / s.out_width % s.out_height;
    int64_t row = row_of(begin) - from;
    for (int64_t first = begin; first < end; first += tile_rows)
      for (int r = 0; r < tile_rows; ++r, rows += taps()) {
        const E* at = copy + row * row_elements() + w * s.stride[1] * panels.channels;
        for (int64_t tap = 0; tap < taps(); ++tap) {
          const int64_t kh = merged ? tap : tap / s.kernel[1];
          const int64_t kw = merged ? 0 : tap % s.kernel[1];
          rows[tap] =
              at + kh * s.dilation[0] * row_elements() + kw * s.dilation[1] * panels.channels;
        }
        if (first + r + 1 >= end || ++w < s.out_width) continue;
        w = 0;
        row += s.stride[0];
        if (++h < s.out_height) continue;
        h = 0;
        row += image_rows() - s.out_height * s.stride[0];
      }
  }

  // The same into the input, where padding is `outside`; `reach` is [tile][tap].
  void point_in_place(int64_t begin, int64_t end, const E* outside, const E** rows,
                      Reach* reach) const {
    const E* x = static_cast<const E*>(args.x);
    int64_t w = begin % s.out_width, h = begin / s.out_width % s.out_height;
    int64_t image = begin / s.out_width / s.out_height;
    const int64_t reach_h = (s.kernel[0] - 1) * s.dilation[0];
    const int64_t reach_w = (s.kernel[1] - 1) * s.dilation[1];
    for (int64_t first = begin; first < end; first += tile_rows, reach += panels.taps) {
      bool padded = false;
      const E** const of_tile = rows;
      for (int r = 0; r < tile_rows; ++r, rows += panels.taps) {
        const int64_t top = h * s.stride[0] - s.padding[0], left = w * s.stride[1] - s.padding[1];
        const int64_t at = (image * s.height + top) * s.width + left;
        const bool inside =
            top >= 0 && top + reach_h < s.height && left >= 0 && left + reach_w < s.width;
        padded |= !inside;
        const E** to = rows;
        for (int64_t i = 0; i <= reach_h; i += s.dilation[0])
          for (int64_t j = 0; j <= reach_w; j += s.dilation[1])
            *to++ = inside || (top + i >= 0 && top + i < s.height && left + j >= 0 &&
                               left + j < s.width)
                        ? x + (at + i * s.width + j) * s.in_channels
                        : outside;
        if (first + r + 1 >= end || ++w < s.out_width) continue;
        w = 0;
        if (++h < s.out_height) continue;
        h = 0;
        ++image;
      }
      for (int64_t tap = 0; tap < panels.taps; ++tap) {
        int count = 0;
        if (padded && zero == 0)
          for (int r = 0; r < tile_rows; ++r) count += of_tile[r * panels.taps + tap] == outside;
        const E* const last = of_tile[(tile_rows - 1) * panels.taps + tap];
        reach[tap] = count == tile_rows                      ? kNone
                     : count == 1 && of_tile[tap] == outside ? kNotFirst
                     : count == 1 && last == outside         ? kNotLast
                                                             : kAll;
      }
    }
  }

  // From one pixel to the next in a copy of pixels: not a multiple of kSetBytes.
  int64_t pitch() const { return panels.channels + 64 / static_cast<int64_t>(sizeof(E)); }

  void copy_pixels(int64_t begin, int64_t end, E* to, const E** rows) const {
    int64_t w = begin % s.out_width, h = begin / s.out_width % s.out_height;
    int64_t image = begin / s.out_width / s.out_height;
    for (int64_t pixel = begin; pixel < end; ++pixel, to += pitch()) {
      const int64_t row = image * s.height + h * s.stride[0];
      copy_pixel(static_cast<const T*>(args.x) + (row * s.width + w * s.stride[1]) * s.in_channels,
                 to);
      *rows++ = to;
      if (++w < s.out_width) continue;
      w = 0;
      if (++h < s.out_height) continue;
      h = 0;
      ++image;
    }
    for (int64_t pixel = end; (pixel - begin) % tile_rows; ++pixel) *rows++ = to - pitch();
  }

  // One chunk of pixels by a range of panels.
  Status chunk(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    const int64_t tiles = (end - begin + tile_rows - 1) / tile_rows;
    const int64_t from = row_of(begin);
    const int64_t copied = source == Source::rows     ? rows_for(begin, end) * row_elements()
                           : source == Source::pixels ? (end - begin) * pitch()
                                                      : panels.channels;
    Buffer<const E*> rows(tiles * taps() * tile_rows);
    Buffer<Reach> reach(tiles * taps());
    Buffer<E> copy(copied);
    Buffer<E> own(packed ? 0 : tile_panels * panels.elements());
    if (!rows.data || !reach.data || !copy.data || !own.data) return Status::out_of_memory;
    if (source == Source::in_place) {
      pad(copy.data, copied);
      point_in_place(begin, end, copy.data, rows.data, reach.data);
    } else {
      __builtin_memset(reach.data, kAll, tiles * taps() * sizeof(Reach));
      if (source == Source::pixels) {
        copy_pixels(begin, end, copy.data, rows.data);
      } else {
        copy_rows(from, rows_for(begin, end), copy.data);
        point(begin, end, copy.data, from, rows.data);
      }
    }
    const int64_t weight_bytes = (panel_end - panel_begin) * panels.elements() * sizeof(E);
    // Weights that stay in the cache are passed over for every tile, which then writes whole
    // pixels.
    const bool whole_pixels =
        packed && weight_bytes <= kCachedWeightBytes && panel_end - panel_begin == panels.count;
    const int64_t blocks = taps() * ((depth() + kBlock - 1) / kBlock);
    const int64_t panel_bytes = tile_panels * panels.elements() * sizeof(E) / (tiles * blocks);
    const bool padded = source == Source::in_place && reads_padding(s);
    TileArgs<T> a{};
    a.taps = taps();
    a.depth = depth();
    a.pixel = s.out_channels * out_size;
    a.residual_pixel = s.out_channels * residual_size;
    a.ahead = whole_pixels ? tile_rows : 0;
    a.ahead_pixels = (tile_rows + blocks - 1) / blocks;
    a.args = &args;
    if (s.groups > 1 && panels.depth * panels.per > s.in_channels / s.groups)
      a.groups = {s.in_channels / s.groups, s.out_channels / s.groups, 0, panels.channels};
    auto one = [&](int64_t p, int64_t t) FR_LAMBDA {
      const E* weights = packed ? packed + p * panels.elements() : own.data;
      const int64_t first = begin + t * tile_rows, c = p * panels.width;
      const int64_t at = first * s.out_channels + c;
      a.rows = rows.data + t * a.taps * tile_rows;
      a.reach = reach.data + t * a.taps;
      if (s.groups > 1) a.offset = first_channel(panels, s, p);
      a.groups.first = c;
      a.panel[0] = weights;
      a.panel[1] = weights + panels.elements();
      if (args.scale) a.scale = static_cast<const Factor<T>*>(args.scale) + c;
      if (args.shift) a.shift = static_cast<const Factor<T>*>(args.shift) + c;
      if (args.residual) a.residual = static_cast<const char*>(args.residual) + at * residual_size;
      a.out = static_cast<char*>(args.out) + at * out_size;
      a.count = end - first < tile_rows ? end - first : tile_rows;
      a.columns = s.out_channels - c;
      // The processor does not see these coming. The first panel brings in the input, where it was
      // not copied; later ones find it in the cache.
      if (packed && !whole_pixels && p + tile_panels < panel_end)
        a.next_panel = {reinterpret_cast<const char*>(weights + tile_panels * panels.elements()) +
                            t * blocks * panel_bytes,
                        panel_bytes};
      else
        a.next_panel.bytes = 0;
      if (source == Source::in_place && panels.taps == 1 && p == panel_begin && t + 1 < tiles)
        a.next_input = {reinterpret_cast<const char*>(a.rows[tile_rows]),
                        tile_rows * kBlock * kPer<T> * static_cast<int64_t>(sizeof(E))};
      else
        a.next_input.bytes = 0;
      if (tile_panels == 2)
        p + 1 < panel_end ? tile<T, kWideRows, 2 * kMaxVecs, true>(a)
                          : tile<T, kWideRows, kMaxVecs, true>(a);
      else if (panels.vecs == 1)
        tile<T, kRows, 1, true>(a);
      else if (padded)
        tile<T, kRows, kMaxVecs, true>(a);
      else
        tile<T, kRows, kMaxVecs, false>(a);
    };
    if (whole_pixels) {
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t p = panel_begin; p < panel_end; p += tile_panels) one(p, t);
      return Status::ok;
    }
    for (int64_t p = panel_begin; p < panel_end; p += tile_panels) {
      if (!packed)
        for (int64_t i = 0; i < tile_panels && p + i < panel_end; ++i)
          pack_panel(panels, s, static_cast<const Weight<T>*>(args.weight), args.weight_stride,
                     p + i, own.data + i * panels.elements());
      for (int64_t t = 0; t < tiles; ++t) one(p, t);
    }
    return Status::ok;
  }
};

// Whether tiles of half the rows and twice the panels suit an image better: a line of it is an odd
// number of those, which leaves padding at the ends of tiles, or they waste fewer rows at the end.
FR_VEC bool wide_tiles(const ConvShape& s, const Panels& panels, int64_t pixels) {
  if (s.groups > 1 || panels.count < 2) return false;
  if (panels.taps > 1 && s.out_width % (2 * kWideRows) == kWideRows) return true;
  const int64_t wasted = (pixels + kRows - 1) / kRows * kRows - pixels;
  return wasted >= kWideRows && wasted * 10 > pixels;
}

// act(conv(x, weight) * scale + shift + residual), or what else Finish<T> makes of the sums; `zero`
// is what the padding holds, the sizes are those of an element.
template <class T>
Status convolve(const ConvArgs<T>& args, int zero, int64_t residual_size, int64_t out_size,
                const Pool& pool) {
  using E = Element<T>;
  const ConvShape& s = args.shape;
  const Panels panels = panels_of<T>(s);
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  if (pixels == 0 || s.out_channels == 0) return Status::ok;

  const bool wide = wide_tiles(s, panels, pixels);
  const int64_t tile_rows = wide ? kWideRows : kRows, tile_panels = wide ? 2 : 1;
  const int64_t pixel_bytes =
      sizeof(E) * (s.in_channels * s.stride[0] * s.stride[1] + s.out_channels);
  const int64_t weight_bytes = panels.count * panels.elements() * sizeof(E);
  const int64_t tiles = (pixels + tile_rows - 1) / tile_rows;
  const int64_t columns = (panels.count + tile_panels - 1) / tile_panels;
  const bool pack_in_pass = !args.packed && pixels * pixel_bytes <= kPackInPassBytes;
  // The threads share out the pixels, or the panels where those are the more bytes to pass around.
  int64_t chunks = pack_in_pass ? 1 : (pixels * pixel_bytes + kChunkBytes - 1) / kChunkBytes;
  int64_t splits = 1;
  if (pack_in_pass || weight_bytes > pixels * pixel_bytes || tiles < 2 * pool.threads)
    splits = columns < pool.threads ? columns : pool.threads;
  else
    chunks = (chunks + pool.threads - 1) / pool.threads * pool.threads;
  if (chunks > tiles) chunks = tiles;

  Buffer<E> own(args.packed || pack_in_pass ? 0 : panels.count * panels.elements());
  if (!own.data) return Status::out_of_memory;
  const E* packed = static_cast<const E*>(args.packed);
  if (!packed && !pack_in_pass) {
    pack_panels<T>(panels, s, static_cast<const Weight<T>*>(args.weight), args.weight_stride,
                   own.data, pool);
    packed = own.data;
  }

  const bool as_it_lies = sizeof(T) == sizeof(E) && panels.channels == s.in_channels;
  const bool whole_depth = panels.depth * panels.per == panels.channels && s.dilation[1] == 1;
  Source source = as_it_lies ? Source::in_place : Source::rows;
  if (panels.taps > 1) {
    if (whole_depth && panels.depth < kShortDepth) source = Source::rows;
  } else if (!s.padding[0] && !s.padding[1] && !reads_padding(s)) {
    const bool one_set = s.in_channels * s.stride[1] * sizeof(E) % kSetBytes == 0;
    if (!as_it_lies || one_set) source = Source::pixels;
  }
  const Conv<T> work{args,
                     s,
                     panels,
                     packed,
                     source,
                     source == Source::rows && whole_depth,
                     zero,
                     residual_size,
                     out_size,
                     static_cast<int>(tile_rows),
                     static_cast<int>(tile_panels)};
  int failed = 0;
  parallel(pool, chunks * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t split = job / chunks, chunk = job % chunks;
      const int64_t first = tiles * chunk / chunks * tile_rows;
      const int64_t last = tiles * (chunk + 1) / chunks * tile_rows;
      const int64_t panel_end = columns * (split + 1) / splits * tile_panels;
      if (work.chunk(first, last < pixels ? last : pixels, columns * split / splits * tile_panels,
                     panel_end < panels.count ? panel_end : panels.count) != Status::ok)
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  });
  return failed ? Status::out_of_memory : Status::ok;
}

FR_NAMESPACE_END
