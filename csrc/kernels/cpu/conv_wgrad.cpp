// The gradient of a convolution's weight as matrix products over pixels. For a chunk of output
// rows, the gradient is brought into tiles of output channels, [tile][row][step][kTile], and the
// input, activated, into vectors of channels, once for each kernel column and with the stride and
// the padding resolved, [column][vector][row][step][lane]: then every kernel position is a register
// tile that reads both straight through. A step is a pixel, or a pair of them where the processor
// multiplies pairs.
//
// Rows are cut into ranges that have a sum each, by sizes alone, and the sums are added up in
// order: the result does not depend on the number of threads. Threads beyond the ranges share out
// the output channels.
#include "../math.h"
#include "channels.h"
#include "wgrad_tile.h"

FR_NAMESPACE_BEGIN

namespace {

constexpr int64_t kChunkSteps = 448;        // a chain of sums in fp32; half of it for 1x1 kernels
constexpr int64_t kInputBytes = 300 << 10;  // of a chunk; with its gradient, the second-level cache
constexpr int64_t kMostOutChannels = 256;   // of a chunk's gradient
constexpr int64_t kRangeSteps = 1024;       // at least, of a range
constexpr int64_t kMostRanges = 32;
constexpr int64_t kRangeBytes = 16 << 20;  // of all ranges' sums
constexpr int64_t kFlatRow = 64;

template <class T>
struct Wgrad {
  using A = Acc<T>;
  using E = Element<T>;
  static constexpr int kLength = kLanes<A>;
  const ConvWgradArgs& args;
  const ConvShape& s;
  // A convolution that is a matrix product has its pixels in rows of any length.
  const bool flat;
  int64_t rows, row_pixels;  // of the output, through all images
  int64_t row_steps;
  int64_t tiles, window;  // of output channels; vectors of input channels that one meets
  int64_t ranges;
  A* sums[kMostRanges];  // [out channel][kernel row][kernel column][window][lane]

  explicit Wgrad(const ConvWgradArgs& args)
      : args(args),
        s(args.shape),
        flat(s.kernel[0] * s.kernel[1] == 1 && s.stride[0] * s.stride[1] == 1 && !s.padding[0] &&
             !s.padding[1]) {
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    row_pixels = flat ? kFlatRow : s.out_width;
    rows = row_pixels ? (pixels + row_pixels - 1) / row_pixels : 0;
    row_steps = (row_pixels + kPer<T> - 1) / kPer<T>;
    tiles = (s.out_channels + kTile - 1) / kTile;
    window = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t vectors = last_vector(t) - first_vector(t);
      if (vectors > window) window = vectors;
    }
    ranges = 1;
    while (ranges < kMostRanges && 2 * ranges * sum_elements() * sizeof(A) <= kRangeBytes &&
           2 * ranges * kRangeSteps <= rows * row_steps)
      ranges *= 2;
  }

  // The vectors of input channels that a tile of output channels meets: those of its groups.
  int64_t first_vector(int64_t t) const {
    return t * kTile / (s.out_channels / s.groups) * (s.in_channels / s.groups) / kLength;
  }
  int64_t last_vector(int64_t t) const {
    const int64_t most = s.out_channels - 1, last = t * kTile + kTile - 1;
    const int64_t group = (last < most ? last : most) / (s.out_channels / s.groups);
    return ((group + 1) * (s.in_channels / s.groups) + kLength - 1) / kLength;
  }

  int64_t pixel_sums() const { return window * kLength; }
  int64_t channel_sums() const { return s.kernel[0] * s.kernel[1] * pixel_sums(); }
  int64_t sum_elements() const { return tiles * kTile * channel_sums(); }
  // Whether a range's sum lies as dw does.
  bool as_dw() const {
    return s.groups == 1 && s.in_channels == window * kLength && s.out_channels == tiles * kTile;
  }

  // How many pixels a row has: the last one of flat rows may have fewer.
  int64_t pixels_of(int64_t row) const {
    const int64_t left = s.batch * s.out_height * s.out_width - row * row_pixels;
    return flat && left < row_pixels ? left : row_pixels;
  }

  // Which of a row's pixels read inside the image in a kernel column.
  int64_t first_pixel(int64_t column) const {
    const int64_t outside = s.padding[1] - column * s.dilation[1];
    return outside <= 0 ? 0 : (outside + s.stride[1] - 1) / s.stride[1];
  }
  int64_t end_pixel(int64_t column) const {
    if (flat) return row_pixels;
    const int64_t last = s.width - 1 + s.padding[1] - column * s.dilation[1];
    const int64_t end = last < 0 ? 0 : last / s.stride[1] + 1;
    return end < row_pixels ? end : row_pixels;
  }

  int64_t most_rows() const {  // of a chunk
    const int64_t most = kChunkSteps / (flat ? 2 : 1) / row_steps;
    return most < 1 ? 1 : most < rows ? most : rows;
  }
  int64_t most_slots() const {
    if (flat) return most_rows();
    const int64_t images = most_rows() / s.out_height + 2;
    const int64_t reach = (s.kernel[0] - 1) * s.dilation[0] + 1;
    const int64_t apart = most_rows() * s.kernel[0];
    const int64_t together = most_rows() * s.stride[0] + images * reach;
    return apart < together ? apart : together;
  }

  // What a step holds of a pixel and, where steps are pairs, of the one after it.
  static FR_LAMBDA Vec<A> step_of(Vec<A> first, Vec<A> second) {
    if constexpr (kPer<T> == 1)
      return first;
    else
      return (Vec<A>)(((VecU32)first >> 16) | ((VecU32)second & 0xffff0000u));
  }

  // store(step, vector) for the steps from `at` on, at most kRowsAtOnce, of get(pixel) for the
  // pixels from `first` to `last`, zeros elsewhere.
  template <class Get, class Store>
  static FR_LAMBDA void steps(int64_t at, int64_t end, int64_t first, int64_t last, const Get& get,
                              const Store& store) {
    end = at + kRowsAtOnce < end ? at + kRowsAtOnce : end;
    if (at * kPer<T> >= first && end * kPer<T> <= last) {
      for (; at < end; ++at)
        store(at, step_of(get(at * kPer<T>), kPer<T> == 1 ? Vec<A>{} : get(at * kPer<T> + 1)));
      return;
    }
    auto inside = [&](int64_t pixel)
                      FR_LAMBDA { return first <= pixel && pixel < last ? get(pixel) : Vec<A>{}; };
    for (; at < end; ++at) store(at, step_of(inside(at * kPer<T>), inside(at * kPer<T> + 1)));
  }

  // [tile][row][step][kTile] of the tiles from `begin` to `end`.
  void pack_gradient(int64_t first_row, int64_t count, int64_t begin, int64_t end, E* to) const {
    constexpr int64_t kUnit = kTile * kPer<T>;
    const int64_t size = count * row_steps * kUnit;
    const int64_t most = end * kTile < s.out_channels ? end * kTile : s.out_channels;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t pixels = pixels_of(first_row + row);
      const T* from =
          static_cast<const T*>(args.grad) + (first_row + row) * row_pixels * s.out_channels;
      E* of_row = to + row * row_steps * kUnit;
      for (int64_t i = 0; i < row_steps; i += kRowsAtOnce)
        for_vectors<A>(most - begin * kTile, [&](int64_t at, auto lanes) FR_LAMBDA {
          const T* channel = from + begin * kTile + at;
          E* of_tile = of_row + at / kTile * size;
          const int64_t left = most - begin * kTile - at;
          const int64_t parts = left < kLength ? (left + kTile - 1) / kTile : kLength / kTile;
          steps(
              i, row_steps, 0, pixels,
              [&](int64_t pixel)
                  FR_LAMBDA { return load(channel + pixel * s.out_channels, lanes); },
              [&](int64_t step, Vec<A> v) FR_LAMBDA {
                for (int64_t part = 0; part < parts; ++part)
                  __builtin_memcpy(of_tile + part * size + step * kUnit,
                                   reinterpret_cast<const char*>(&v) + part * kTile * sizeof(A),
                                   kTile * sizeof(A));
              });
        });
    }
  }

  // The rows of the input that a chunk reads: where each begins, and for each kernel row and output
  // row, which it is; -1 where it lies in the padding. Returns how many there are.
  int64_t find_rows(int64_t first_row, int64_t count, int64_t* known, const T** sources,
                    int64_t* slots) const {
    const T* x = static_cast<const T*>(args.x);
    if (flat) {
      for (int64_t r = 0; r < count; ++r) {
        slots[r] = r;
        sources[r] = x + (first_row + r) * row_pixels * s.in_channels;
      }
      return count;
    }
    const int64_t first_image = first_row / s.out_height;
    const int64_t images = (first_row + count - 1) / s.out_height - first_image + 1;
    for (int64_t i = 0; i < images * s.height; ++i) known[i] = -1;
    int64_t found = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t image = (first_row + r) / s.out_height, line = (first_row + r) % s.out_height;
      for (int64_t i = 0; i < s.kernel[0]; ++i) {
        const int64_t h = line * s.stride[0] + i * s.dilation[0] - s.padding[0];
        int64_t& slot = slots[i * count + r];
        slot = -1;
        if (h < 0 || h >= s.height) continue;
        int64_t& own = known[(image - first_image) * s.height + h];
        if (own < 0) {
          sources[found] = x + (image * s.height + h) * s.width * s.in_channels;
          own = found++;
        }
        slot = own;
      }
    }
    return found;
  }

  // [column][vector][slot][step][lane] of the vectors from `begin` to `end`.
  template <bool kPlain>
  void pack_input(int64_t first_row, const T* const* sources, int64_t count, int64_t begin,
                  int64_t end, E* to) const {
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    const int64_t size = count * row_steps * kVecElements<T>;
    const int64_t left = s.in_channels - begin * kLength, most = (end - begin) * kLength;
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t pixels = flat ? pixels_of(first_row + slot) : row_pixels;
      for (int64_t column = 0; column < s.kernel[1]; ++column) {
        const int64_t first = first_pixel(column);
        const int64_t last = end_pixel(column) < pixels ? end_pixel(column) : pixels;
        const int64_t stop = (end_pixel(column) + kPer<T> - 1) / kPer<T>;
        const T* source = sources[slot] + (column * s.dilation[1] - s.padding[1]) * s.in_channels +
                          begin * kLength;
        E* of_slot = to + (column * (end - begin) * count + slot) * row_steps * kVecElements<T>;
        for (int64_t i = first / kPer<T>; i < stop; i += kRowsAtOnce)
          for_vectors<A>(left < most ? left : most, [&](int64_t at, auto lanes) FR_LAMBDA {
            const int64_t c = begin * kLength + at;
            const Vec<A> a = scale ? load(scale + c, lanes) : splat(A(1));
            const Vec<A> b = scale ? load(shift + c, lanes) : Vec<A>{};
            E* of_vector = of_slot + at / kLength * size;
            steps(
                i, stop, first, last,
                [&](int64_t pixel) FR_LAMBDA {
                  Vec<A> z = load(source + pixel * s.stride[1] * s.in_channels + at, lanes);
                  if constexpr (kPlain) return z;
                  if (scale) z = rounded<T>(math::scale_shift(z, a, b));
                  return math::activate(z, args.act);
                },
                [&](int64_t step, Vec<A> v)
                    FR_LAMBDA { __builtin_memcpy(of_vector + step * kVecElements<T>, &v, 64); });
          });
      }
    }
  }

  // What the chunk that begins at `row` reads, for as many steps of one kernel position and vector.
  void look_ahead(int64_t row, int64_t end, int64_t steps, int64_t vectors,
                  Stream (&ahead)[2]) const {
    const int64_t count = end - row < most_rows() ? end - row : most_rows();
    const int64_t groups_of_vectors = (vectors + kTileVecs - 1) / kTileVecs;
    const int64_t blocks = steps * s.kernel[0] * s.kernel[1] * groups_of_vectors / kWgradBlock;
    const int64_t input =
        flat ? row_pixels * s.in_channels : s.height * s.width * s.in_channels / s.out_height;
    auto stream = [&](const void* from, int64_t elements) {
      const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
      return Stream{static_cast<const char*>(from) + row * bytes, count * bytes / (blocks + 1)};
    };
    ahead[0] = stream(args.x, input);
    ahead[1] = stream(args.grad, row_pixels * s.out_channels);
  }

  // One range's sums for the tiles from `begin` to `end`.
  Status range(int64_t index, int64_t begin, int64_t end) const {
    const int64_t first_vec = first_vector(begin), last_vec = last_vector(end - 1);
    const int64_t slot_bytes = s.kernel[1] * row_steps * 64;
    int64_t most = kInputBytes / (slot_bytes * most_slots());
    most = most < 1 ? 1 : most;
    const int64_t blocks = (last_vec - first_vec + most - 1) / most;
    const int64_t block_vecs = (last_vec - first_vec + blocks - 1) / blocks;
    Workspace<E> g((end - begin) * most_rows() * row_steps * kTile * kPer<T>);
    Workspace<E> z(block_vecs * most_slots() * slot_bytes / static_cast<int64_t>(sizeof(E)));
    Workspace<int64_t> slots(s.kernel[0] * most_rows());
    Workspace<int64_t> known(flat ? 0 : (most_rows() / s.out_height + 2) * s.height);
    Workspace<const T*> sources(most_slots());
    if (!g.data || !z.data || !slots.data || !known.data || !sources.data)
      return Status::out_of_memory;
    const int64_t range_begin = rows * index / ranges, range_end = rows * (index + 1) / ranges;
    const int64_t chunks = (range_end - range_begin + most_rows() - 1) / most_rows();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t row = range_begin + (range_end - range_begin) * chunk / chunks;
      const int64_t count = range_begin + (range_end - range_begin) * (chunk + 1) / chunks - row;
      const int64_t found = find_rows(row, count, known.data, sources.data, slots.data);
      pack_gradient(row, count, begin, end, g.data);
      Stream ahead[2];
      look_ahead(row + count, range_end, count * row_steps * (end - begin), last_vec - first_vec,
                 ahead);
      for (int64_t v = first_vec; v < last_vec; v += block_vecs) {
        const int64_t v_end = v + block_vecs < last_vec ? v + block_vecs : last_vec;
        if (!args.scale && args.act == Act::none)
          pack_input<true>(row, sources.data, found, v, v_end, z.data);
        else
          pack_input<false>(row, sources.data, found, v, v_end, z.data);
        for (int64_t t = begin; t < end; ++t)
          multiply(t, g.data + (t - begin) * count * row_steps * kTile * kPer<T>, count, z.data,
                   found, v, v_end, slots.data, chunk > 0, sums[index], ahead);
      }
    }
    return Status::ok;
  }

  // One tile of output channels by the vectors from v to v_end, at every kernel position.
  void multiply(int64_t t, const E* g, int64_t count, const E* z, int64_t found, int64_t v,
                int64_t v_end, const int64_t* slots, bool add, A* sum, Stream (&ahead)[2]) const {
    const int64_t size = found * row_steps * kVecElements<T>;
    const int64_t first = first_vector(t), last = last_vector(t);
    const int64_t from = first > v ? first : v, until = last < v_end ? last : v_end;
    for (int64_t column = 0; column < s.kernel[1]; ++column) {
      const int64_t begin = first_pixel(column) / kPer<T>;
      const int64_t end = (end_pixel(column) + kPer<T> - 1) / kPer<T>;
      for (int64_t i = 0; i < s.kernel[0]; ++i) {
        A* of_tap = sum + t * kTile * channel_sums() + (i * s.kernel[1] + column) * pixel_sums();
        for_tiles<kTileVecs>(from, until, [&](auto width, int64_t at) FR_LAMBDA {
          wgrad_tile<T, width.value>(g, z + (column * (v_end - v) + at - v) * size,
                                     slots + i * count, count, row_steps, begin, end, size, add,
                                     of_tap + (at - first) * kLength, channel_sums(), ahead);
        });
      }
    }
  }

  // Adds up the ranges' sums of one output channel.
  void finish(int64_t k) const {
    const int64_t n = s.in_channels / s.groups;
    const int64_t group = k / (s.out_channels / s.groups);
    const int64_t first = group * n - first_vector(k / kTile) * kLength;
    for (int64_t i = 0; i < s.kernel[0] * s.kernel[1]; ++i) {
      const int64_t at = k * channel_sums() + i * pixel_sums() + first;
      A* to = static_cast<A*>(args.dw) + (k * s.kernel[0] * s.kernel[1] + i) * n;
      for (int64_t c = 0; c < n; ++c) {
        A sum = sums[0][at + c];
        for (int64_t r = 1; r < ranges; ++r) sum += sums[r][at + c];
        to[c] = sum;
      }
    }
  }
};

template <class T>
Status compute(const ConvWgradArgs& args, const Pool& pool) {
  using A = Acc<T>;
  const ConvShape& s = args.shape;
  Wgrad<T> work(args);
  const int64_t elements = s.out_channels * s.in_channels / s.groups * s.kernel[0] * s.kernel[1];
  if (elements == 0) return Status::ok;
  if (work.rows == 0) {
    __builtin_memset(args.dw, 0, elements * sizeof(A));
    return Status::ok;
  }
  const int64_t own = work.as_dw() ? 1 : 0;
  Workspace<A> memory((work.ranges - own) * work.sum_elements());
  if (!memory.data) return Status::out_of_memory;
  for (int64_t r = 0; r < work.ranges; ++r)
    work.sums[r] =
        r < own ? static_cast<A*>(args.dw) : memory.data + (r - own) * work.sum_elements();

  int64_t splits = (s.out_channels + kMostOutChannels - 1) / kMostOutChannels;
  while (work.ranges * splits < pool.threads && splits < work.tiles) ++splits;
  int failed = 0;
  parallel(pool, work.ranges * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t split = job % splits;
      if (work.range(job / splits, work.tiles * split / splits,
                     work.tiles * (split + 1) / splits) != Status::ok)
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  });
  if (failed) return Status::out_of_memory;
  if (own && work.ranges == 1) return Status::ok;
  parallel(pool, s.out_channels, kMapGrain * s.out_channels / elements + 1,
           [&](int64_t begin, int64_t end) {
             for (int64_t k = begin; k < end; ++k) work.finish(k);
           });
  return Status::ok;
}

}  // namespace

Status conv_wgrad(const ConvWgradArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return compute<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
