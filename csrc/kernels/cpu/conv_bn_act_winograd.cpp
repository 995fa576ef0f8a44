// Winograd's convolution of some tiles at a time: their input is transformed, each of the products
// is a matrix product of a register tile's rows, which are tiles of the image, by one panel of
// output channels, and what these make of a panel is transformed back and stored while it is in the
// cache.
#include "buffer.h"
#include "channels.h"
#include "conv_tile.h"
#include "winograd.h"

FR_NAMESPACE_BEGIN

namespace {

constexpr int64_t kLane = kLanes<float>, kWidth = kMaxVecs * kLane;
// Transformed input of a block of tiles, which every panel passes over.
constexpr int64_t kWinogradBlockBytes = 512 << 10;

// Tiles ahead of the one at hand whose input and output are brought in: the processor's own
// prefetching does not see them coming.
constexpr int64_t kAhead = 2;

// Rows of a register tile, by how many tiles there are: 49 are seven times 7, and 16 twice 8. More
// rows are faster where few of them are left over.
struct Rows {
  int64_t count;
  void (*sum_up)(const TileArgs<float>&, float*);
};
constexpr Rows kRowCounts[] = {
    {kRows, sum_up<float, kRows, kMaxVecs, false>},
    {kRows / 2 + 1, sum_up<float, kRows / 2 + 1, kMaxVecs, false>},
    {(kRows + 1) / 2, sum_up<float, (kRows + 1) / 2, kMaxVecs, false>},
};

FR_VEC int64_t in_rows_of(int64_t tiles, int64_t rows) { return (tiles + rows - 1) / rows * rows; }

FR_VEC Rows rows_for(int64_t tiles) {
  const Rows* best = kRowCounts;
  for (const Rows& rows : kRowCounts)
    if (in_rows_of(tiles, rows.count) * 8 < in_rows_of(tiles, best->count) * 7) best = &rows;
  return *best;
}

template <int kOut>
struct Convolution {
  static constexpr int kIn = kOut + 2;
  static constexpr int64_t kProducts = kIn * kIn;

  const ConvBnActArgs& args;
  const ConvShape& s;
  const float* packed;
  Rows rows = kRowCounts[0];

  // The image in which a tile lies, and its first output there.
  struct Place {
    int64_t image, top, left;
  };
  int64_t down() const { return (s.out_height + kOut - 1) / kOut; }
  int64_t across() const { return (s.out_width + kOut - 1) / kOut; }
  int64_t tiles() const { return s.batch * down() * across(); }
  Place place(int64_t tile) const {
    return {tile / across() / down(), tile / across() % down() * kOut, tile % across() * kOut};
  }
  // Counted on from tile to tile: dividing for each would take a fifth of a transform's time.
  void advance(Place& p) const {
    p.left += kOut;
    if (p.left < s.out_width) return;
    p.left = 0;
    p.top += kOut;
    if (p.top < s.out_height) return;
    p.top = 0;
    ++p.image;
  }

  // From a tile's transformed input to the next one's: whole vectors, and not a multiple of 4096
  // bytes, which would bring all rows into one set of the first-level cache.
  int64_t pitch() const { return in_rows_of(s.in_channels, kLane) + kLane; }
  int64_t panel_elements() const { return s.in_channels * kWidth; }  // of one product

  template <class Lanes>
  FR_VEC void transform_input(const float* const (&at)[kIn][kIn], int64_t c, Lanes lanes, float* to,
                              int64_t product, int64_t ahead) {
    VecF columns[kIn][kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) {
      VecF d[kIn];
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) {
        d[i] = load(at[i][j] + c, lanes);
        // The first two columns are the last ones of the tile before.
        if (j >= 2) __builtin_prefetch(at[i][j] + c + ahead, 0, 3);
      }
      Winograd<kOut>::input(d, columns[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) {
      VecF d[kIn], v[kIn];
#pragma GCC unroll 6
      for (int j = 0; j < kIn; ++j) d[j] = columns[j][i];
      Winograd<kOut>::input(d, v);
#pragma GCC unroll 6
      for (int j = 0; j < kIn; ++j, to += product) store(to, v[j]);
    }
  }

  // The transformed input of tiles, [product][tile][channel].
  void read(int64_t begin, int64_t end, const float* zeros, float* to) const {
    const int64_t product = (end - begin) * pitch(), ahead = kAhead * kOut * s.in_channels;
    Place p = place(begin);
    for (int64_t tile = begin; tile < end; ++tile, to += pitch(), advance(p)) {
      const float* at[kIn][kIn];
      for (int i = 0; i < kIn; ++i) {
        const int64_t h = p.top + i - s.padding[0], left = p.left - s.padding[1];
        const int64_t first = (p.image * s.height + h) * s.width + left;
        const bool has_row = h >= 0 && h < s.height;
        for (int j = 0; j < kIn; ++j)
          at[i][j] = has_row && left + j >= 0 && left + j < s.width
                         ? static_cast<const float*>(args.x) + (first + j) * s.in_channels
                         : zeros;
      }
      int64_t c = 0;
      for (; c + kLane <= s.in_channels; c += kLane)
        transform_input(at, c, Whole{}, to + c, product, ahead);
      if (c < s.in_channels)
        transform_input(at, c, Part{s.in_channels - c}, to + c, product, ahead);
    }
  }

  template <bool kResidual, class Lanes>
  FR_VEC void transform_output(const ConvBnActArgs& args, const ConvShape& s, const Place& p,
                               const float* from, int64_t product, int64_t c, Lanes lanes) {
    VecF rows[kOut][kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) {
      VecF m[kIn], y[kOut];
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) m[i] = load(from + (i * kIn + j) * product);
      Winograd<kOut>::output(m, y);
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) rows[i][j] = y[i];
    }
    const int64_t ahead = kAhead * kOut * s.out_channels;
    const EachChannel<Lanes> channel{c, lanes};
    const float* scale = static_cast<const float*>(args.scale);
    const float* shift = static_cast<const float*>(args.shift);
    const VecF a = scale ? channel(scale) : splat(1.0f);
    const VecF b = shift ? channel(shift) : VecF{};
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      VecF y[kOut];
      Winograd<kOut>::output(rows[i], y);
      const int64_t h = p.top + i;
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        const int64_t w = p.left + j;
        if (h >= s.out_height || w >= s.out_width) continue;
        const int64_t at = ((p.image * s.out_height + h) * s.out_width + w) * s.out_channels + c;
        __builtin_prefetch(static_cast<float*>(args.out) + at + ahead, 1, 3);
        VecF value = math::scale_shift(y[j], a, b);
        if (kResidual) value += load(static_cast<const float*>(args.residual) + at, lanes);
        if (args.act == Act::relu) value = relu(value);
        store(static_cast<float*>(args.out) + at, value, lanes);
      }
    }
  }

  // The outputs of tiles in a panel, from its products, [product][tile][channel].
  template <bool kResidual>
  void write(int64_t begin, int64_t end, int64_t panel, const float* from, int64_t product) const {
    Place p = place(begin);
    for (int64_t tile = begin; tile < end; ++tile, from += kWidth, advance(p)) {
      for (int64_t v = 0; v < kWidth; v += kLane) {
        const int64_t c = panel * kWidth + v, left = s.out_channels - c;
        if (left >= kLane)
          transform_output<kResidual>(args, s, p, from + v, product, c, Whole{});
        else if (left > 0)
          transform_output<kResidual>(args, s, p, from + v, product, c, Part{left});
      }
    }
  }

  Status block(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    const int64_t tiles = end - begin, padded = in_rows_of(tiles, rows.count);
    Workspace<float> zeros(pitch()), input(kProducts * tiles * pitch());
    Workspace<float> products(kProducts * padded * kWidth);
    Workspace<const float*> row(padded);
    if (!zeros.data || !input.data || !products.data || !row.data) return Status::out_of_memory;
    __builtin_memset(zeros.data, 0, pitch() * sizeof(float));
    read(begin, end, zeros.data, input.data);
    // What a register tile has beyond the tiles there are repeats the last one, and is not stored.
    for (int64_t r = 0; r < padded; ++r)
      row.data[r] = input.data + (r < tiles ? r : tiles - 1) * pitch();

    TileArgs<float> a{};
    a.taps = 1;
    a.depth = s.in_channels;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t k = 0; k < kProducts; ++k) {
        a.panel[0] = packed + (panel * kProducts + k) * panel_elements();
        a.offset = k * tiles * pitch();
        for (int64_t r = 0; r < padded; r += rows.count) {
          a.rows = row.data + r;
          rows.sum_up(a, products.data + (k * padded + r) * kWidth);
        }
      }
      args.residual ? write<true>(begin, end, panel, products.data, padded * kWidth)
                    : write<false>(begin, end, panel, products.data, padded * kWidth);
    }
    return Status::ok;
  }
};

template <int kOut>
Status convolve(const ConvBnActWinogradArgs& all, const Pool& pool) {
  const ConvBnActArgs& args = all.conv;
  const ConvShape& s = args.shape;
  constexpr int64_t kProducts = Convolution<kOut>::kProducts;
  const int64_t panels = panels_of<float>(s).count;
  Workspace<float> own(args.packed ? 0 : panels * kProducts * s.in_channels * kWidth);
  if (!own.data) return Status::out_of_memory;
  if (!args.packed) {
    ConvWinogradPackArgs pack{{args.dtype, s, args.weight, {}, own.data}, all.tile};
    for (int d = 0; d < 4; ++d) pack.pack.weight_stride[d] = args.weight_stride[d];
    FUSED_RESNET_ISA::conv_winograd_pack(pack, pool);
  }
  Convolution<kOut> work{args, s, args.packed ? static_cast<const float*>(args.packed) : own.data};
  const int64_t tiles = work.tiles();
  if (tiles == 0) return Status::ok;
  work.rows = rows_for(tiles);

  // The threads share out the tiles, or the panels where those are the more bytes to pass around.
  const int64_t steps = in_rows_of(tiles, work.rows.count) / work.rows.count;
  const int64_t step_bytes = kProducts * work.pitch() * work.rows.count * sizeof(float);
  const int64_t weight_bytes = panels * kProducts * work.panel_elements() * sizeof(float);
  int64_t chunks = (steps * step_bytes + kWinogradBlockBytes - 1) / kWinogradBlockBytes, splits = 1;
  if (weight_bytes > steps * step_bytes || steps < 2 * pool.threads)
    splits = panels < pool.threads ? panels : pool.threads;
  else
    chunks = (chunks + pool.threads - 1) / pool.threads * pool.threads;
  if (chunks > steps) chunks = steps;
  int failed = 0;
  parallel(pool, chunks * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t split = job / chunks, chunk = job % chunks;
      const int64_t first = steps * chunk / chunks * work.rows.count;
      const int64_t last = steps * (chunk + 1) / chunks * work.rows.count;
      if (work.block(first, last < tiles ? last : tiles, panels * split / splits,
                     panels * (split + 1) / splits) != Status::ok)
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace

Status conv_bn_act_winograd(const ConvBnActWinogradArgs& args, const Pool& pool) {
  if (args.conv.dtype != DType::f32) return Status::unsupported;
  if (args.tile == 2) return convolve<2>(args, pool);
  return args.tile == 4 ? convolve<4>(args, pool) : Status::unsupported;
}

FR_NAMESPACE_END
