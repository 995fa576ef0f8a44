// The implicit matrix product of conv_bn_act, of one product or of two that are summed in the same
// tile, whose first operand is normalised: in shared memory where it was copied asynchronously, by
// the thread that copied it; on its way where elements are loaded one by one. A second image that
// is read with it lies in a part of the stage of its own. What is written may be masked, and
// reduced over the pixels of the tile.
#include "conv_block.cuh"
#include "conv_chain.cuh"
#include "prologue.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

// A ring whose stages have room for the second image, if there is one: as many as fit.
template <class B>
class ChainRing {
  static constexpr int kStages = B::kStages, kWidened = B::kStageBytes + B::kRows * kRowBytes;
  static constexpr bool kFewer = kStages * kWidened >
                                 (99 << 10) - B::kRows* static_cast<int>(sizeof(Pixel));
  static_assert(kStages == 3 && (kStages - kFewer) * kWidened <= 96 << 10);

 public:
  __host__ __device__ explicit ChainRing(bool widened) : widened_(widened) {}
  __host__ __device__ __forceinline__ int stages() const { return kStages - fewer(); }
  __host__ __device__ int bytes() const {
    const int ring = stages() * stage_bytes(), least = kStages * B::kStageBytes;
    return ring > least ? ring : least;
  }
  __device__ __forceinline__ int slot(int stage) const { return fewer() ? stage % 2 : stage % 3; }
  __device__ __forceinline__ int begin(int stage) const { return slot(stage) * stage_bytes(); }
  __device__ __forceinline__ void wait() const {
    if (fewer())
      cp_async_wait<0>();
    else
      cp_async_wait<1>();
  }

 private:
  __host__ __device__ __forceinline__ bool fewer() const { return kFewer && widened_; }
  __host__ __device__ __forceinline__ int stage_bytes() const {
    return widened_ ? kWidened : B::kStageBytes;
  }
  bool widened_;
};

// PixelRows that are normalised once they have landed.
template <class B, bool wide>
class ChangedRows {
  using T = typename B::T;
  static constexpr int n = kVectorBytes / sizeof(T);
  using Rows = PixelRows<T, B::kRows, B::kThreads, wide>;
  static constexpr int kCount = Rows::kCount;
  static_assert(kCount * B::kStages <= 32);

 public:
  __device__ __forceinline__ ChangedRows(const Product& product, const Pixel* pixels, int group)
      : c_(product.conv),
        in_(product.in),
        rows_(c_, pixels, group),
        first_channel_(group * c_.group_channels()),
        arriving_(c_, threadIdx.x % kRowChunks * n) {}

  __device__ __forceinline__ void load(const Depth& at, unsigned char* stage, int slot) {
    if constexpr (wide) {
      uint32_t inside = 0;
      load_chunks<T, B::kRows, B::kThreads, true>(c_, at, stage, [&](int i, const Depth& k) {
        const T* const from = rows_.element(c_, i, k);
        inside |= uint32_t{from != nullptr} << i;
        return from;
      });
      if (in_.other) {
        load_chunks<T, B::kRows, B::kThreads, true>(c_, at, stage + B::kStageBytes,
                                                    [&](int i, const Depth& k) {
                                                      const T* const from = rows_.element(c_, i, k);
                                                      return from ? beside(from) : nullptr;
                                                    });
      }
      inside_ = (inside_ & ~(kAll << slot * kCount)) | inside << slot * kCount;
    } else {
      load_chunks<T, B::kRows, B::kThreads, false>(
          c_, at, stage, [&](int i, const Depth& k) { return rows_.element(c_, i, k); },
          [&](const T* from, const Depth& k) {
            const T other = in_.other ? *beside(from) : T(0);
            return change_at<T, 1>(in_, first_channel_ + k.channel)(*from, other, 0);
          });
    }
  }

  // The next stage, in order.
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot) {
    if (!wide || !changes(in_)) return;
    const uint32_t inside = inside_ >> slot * kCount;
    if (!arriving_.ended(c_)) {
      const auto change = change_at<T, n>(in_, first_channel_ + arriving_.channel);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!(inside >> i & 1)) continue;
        const int row = threadIdx.x / kRowChunks + i * (B::kThreads / kRowChunks);
        T* const at = reinterpret_cast<T*>(stage + chunk_at(row, threadIdx.x % kRowChunks));
        Vector<T, n> values = cuda::load<n>(at), others = {};
        if (in_.other) others = cuda::load<n>(at + B::kStageBytes / sizeof(T));
#pragma unroll
        for (int k = 0; k < n; ++k) values.at[k] = change(values.at[k], others.at[k], k);
        store<n>(at, values);
      }
    }
    arriving_.advance(c_, kRowBytes / sizeof(T));
  }

 private:
  static constexpr uint32_t kAll = (uint32_t{1} << kCount) - 1;

  __device__ __forceinline__ const T* beside(const T* from) const {
    return static_cast<const T*>(in_.other) + (from - static_cast<const T*>(c_.x));
  }

  const Conv& c_;
  const Prologue& in_;
  const Rows rows_;
  const int first_channel_;
  Depth arriving_;  // of the thread's chunk, in the stage that arrives next
  uint32_t inside_ = 0;
};

// Adds what is spread to what is written, masks it, and keeps it in place of the sums if it is to
// be reduced.
template <class T>
struct MaskAndKeep {
  const Chain& chain;

  template <int n>
  struct OnPixel;
  template <int n>
  struct Channels {
    using A = Acc<T>;
    const Chain& chain;
    int channel;
    A scale[n], shift[n];

    __device__ __forceinline__ OnPixel<n> on(const Pixel& pixel) const { return {*this, pixel}; }
  };
  template <int n>
  struct OnPixel {
    using A = Acc<T>;
    const Channels<n>& of;
    const Pixel& pixel;

    // Of what is spread, `in` of a pixel tells where it is; see conv_chain_kernel.
    __device__ __forceinline__ void change(A (&values)[n], int64_t at) const {
      const Chain& chain = of.chain;
      if (chain.added.image && pixel.in >= 0) {
        const Vector<T, n> added =
            load<n>(static_cast<const T*>(chain.added.image) + pixel.in + of.channel);
#pragma unroll
        for (int k = 0; k < n; ++k) values[k] += widen(added.at[k]);
      }
      if (!chain.mask_x) return;
      const Vector<T, n> raw = load<n>(static_cast<const T*>(chain.mask_x) + at);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T z = narrow<T>(multiply_add(widen(raw.at[k]), of.scale[k], of.shift[k]));
        values[k] = math::relu_backward(widen(z), values[k]);
      }
    }
    __device__ __forceinline__ void put(const Conv& c, int64_t at, const Vector<T, n>& result,
                                        A* sums) const {
      store_values(c, at, result);
      if (of.chain.first) keep_values(result, sums);
    }
  };

  template <int n>
  __device__ __forceinline__ Channels<n> of(int channel) const {
    Channels<n> channels{chain, channel, {}, {}};
    if (!chain.mask_x) return channels;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      channels.scale[k] = static_cast<const Acc<T>*>(chain.mask_scale)[channel + k];
      channels.shift[k] = static_cast<const Acc<T>*>(chain.mask_shift)[channel + k];
    }
    return channels;
  }
};

// What Chain's `first` and `second` are, of what was written.
template <class B, class A>
__device__ __forceinline__ void reduce_tile(const Chain& chain, const Pixel* pixels,
                                            int64_t row_tile, int64_t rows_left, int channel,
                                            int columns, const A* written, A* parts) {
  using T = typename B::T;
  const int column = threadIdx.x % B::kColumns;
  const bool there = column < columns;
  const int rows = rows_left < B::kRows ? static_cast<int>(rows_left) : B::kRows;
  channel += column;
  auto value = [&](int row) { return written[row * B::Sums::kPitch + column]; };
  A first, second;
  if (chain.mask_x) {
    const A mean = there ? static_cast<const A*>(chain.mask_mean)[channel] : A{};
    first = sum_column<B>(parts, rows, there, value);
    second = sum_column<B>(parts, rows, there, [&](int row) {
      const T raw = static_cast<const T*>(chain.mask_x)[pixels[row].out + channel];
      return value(row) * (widen(raw) - mean);
    });
  } else {
    // From a value of its own: the sum keeps its bits, wherever the mean is.
    const A any = there ? value(0) : A{}, from = any - any == A{} ? any : A{};
    const A rest =
        sum_column<B>(parts, rows, there, [&](int row) { return value(row) - from; }) / rows;
    first = from + rest;
    second = sum_column<B>(parts, rows, there, [&](int row) {
      const A away = value(row) - from - rest;
      return away * away;
    });
  }
  if (!there || threadIdx.x >= B::kColumns) return;
  const int64_t at = row_tile * chain.products[0].conv.out_channels + channel;
  static_cast<A*>(chain.first)[at] = first;
  static_cast<A*>(chain.second)[at] = second;
}

// Scales a product's sums by output channel, and adds them to what is there, if they are not the
// first; then there are none.
template <class B, class Sum>
__device__ __forceinline__ void move_sums(typename B::Sums& sums, const void* factors, int channel,
                                          int columns, bool first, Sum* to) {
  constexpr int n = B::Sums::kWidth;
  sums.each([&](int row, int column, const auto& v) {
    Vector<Sum, n>* const place =
        reinterpret_cast<Vector<Sum, n>*>(to + row * B::Sums::kPitch + column);
    Vector<Sum, n> result = {};
    if (!first) result = *place;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool scaled = factors && column + k < columns;
      const Sum factor = scaled ? static_cast<const Sum*>(factors)[channel + column + k] : Sum(1);
      result.at[k] = first ? v.at[k] * factor : multiply_add(v.at[k], factor, result.at[k]);
    }
    *place = result;
  });
  sums = {};
}

template <class B>
constexpr int kSumsBytes =
    B::kRows * B::Sums::kPitch * static_cast<int>(sizeof(typename B::Sums::Sum));

template <class B>
constexpr bool kHasRoom = B::kBytes + kSumsBytes<B> <= 99 << 10;

template <class B, bool wide>
__global__ void __launch_bounds__(B::kThreads)
    conv_chain_kernel(const __grid_constant__ Chain chain, bool widened, bool vectors) {
  using T = typename B::T;
  using Sum = typename B::Sums::Sum;
  constexpr int kDepth = kRowBytes / sizeof(T);
  static_assert(B::kRows * B::Sums::kPitch + B::kThreads <=
                B::kStages * B::kStageBytes / sizeof(Sum));
  FR_DYNAMIC_SHARED(memory);
  const ChainRing<B> ring(widened);
  Pixel* const pixels = reinterpret_cast<Pixel*>(memory + ring.bytes());

  const Tile tile = Tile::of<B>(chain.products[0].conv);
  const Conv& out = chain.products[0].conv;
  Sum* const free = reinterpret_cast<Sum*>(memory);  // once products are summed
  Sum* const all = chain.apart ? reinterpret_cast<Sum*>(pixels + B::kRows) : free;
  typename B::Sums sums;
#pragma unroll 1
  for (int i = 0; i < chain.count; ++i) {
    const Conv& c = chain.products[i].conv;
    for (int row = threadIdx.x; row < B::kRows; row += B::kThreads)
      pixels[row] = pixel_at(c, tile.first_row, row);
    __syncthreads();
    // The second product may be of one group where the first has several.
    const int group = c.groups == 1 ? 0 : tile.group;
    const int first_column = c.groups == 1 ? tile.channel(out) : tile.first_column;
    ChangedRows<B, wide> rows(chain.products[i], pixels, group);
    const WeightRows<T, B::kColumns, B::kThreads, wide> columns(c, group, first_column);
    add_products<B>(
        c, 0, (c.depth() + kDepth - 1) / kDepth, memory, ring, sums,
        [&](const Depth& at, unsigned char* to, int slot) {
          rows.load(at, to, slot);
          columns.load(c, at, to + B::kRows * kRowBytes);
        },
        [&](unsigned char* stage, int slot) { rows.arrive(stage, slot); });
    if constexpr (kHasRoom<B>) {
      if (chain.apart)
        move_sums<B>(sums, chain.factors[i], tile.channel(out), tile.columns(out), i == 0, all);
    }
  }
  const int64_t rows_left = out.pixels() - tile.first_row;
  const int channel = tile.channel(out), columns_left = tile.columns(out);
  if (chain.added.image) {
    for (int row = threadIdx.x; row < B::kRows && row < rows_left; row += B::kThreads)
      pixels[row].in = chain.added.find(out, tile.first_row, row);
  }
  if (!chain.apart) store_sums(sums, all);
  __syncthreads();
  const MaskAndKeep<T> after{chain};
  if (vectors)
    write_vectors<B>(out, pixels, rows_left, channel, columns_left, all, after);
  else
    write_elements<B>(out, pixels, rows_left, channel, columns_left, all, after);
  if (!chain.first) return;
  __syncthreads();
  reduce_tile<B>(chain, pixels, tile.row_tile, rows_left, channel, columns_left, all,
                 free + B::kRows * B::Sums::kPitch);
}

// Whether 16 bytes of each operand, and what normalises them, can be read at once.
bool wide_in(const Product& p, bool (*reads)(const Conv&)) {
  return reads(p.conv) && vector_aligned(p.in.scale) && vector_aligned(p.in.slope) &&
         vector_aligned(p.in.shift) && vector_aligned(p.in.center) && vector_aligned(p.in.other);
}
bool reads_or_packs_wide(const Conv& c) { return reads_wide(c) || packs_wide(c); }
bool wide_in(const Chain& chain, bool (*reads)(const Conv&)) {
  return wide_in(chain.products[0], reads) &&
         (chain.count == 1 || wide_in(chain.products[1], reads));
}
template <class B, bool wide>
Status launch_chain(const Chain& chain, void* stream) {
  const Conv& c = chain.products[0].conv;
  const int64_t tiles = Tile::count<B>(c);
  if (tiles > INT32_MAX) return Status::unsupported;
  const bool widened = wide && (chain.products[0].in.other || chain.products[1].in.other);
  const size_t bytes =
      ChainRing<B>(widened).bytes() + B::kRows * sizeof(Pixel) + (chain.apart ? kSumsBytes<B> : 0);
  return launch(
      conv_chain_kernel<B, wide>, static_cast<unsigned>(tiles), B::kThreads, bytes, stream, chain,
      widened,
      writes_vectors(c) && vector_aligned(chain.mask_x) && vector_aligned(chain.added.image));
}

template <class T>
Status launch_tensor(const Chain& chain, const ChainPlan& plan, void* stream) {
  if (!wide_in(chain, reads_wide)) return launch_chain<SmallBlock<T>, false>(chain, stream);
  if (plan.tile == 0) return launch_chain<SmallBlock<T>, true>(chain, stream);
  return launch_chain<LargeBlock<T>, true>(chain, stream);
}

}  // namespace

ChainPlan plan_of(const Chain& chain) {
  ConvSizes sizes = sizes_of(chain.products[0].conv);
  sizes.wide = wide_in(chain, reads_or_packs_wide);
  const int tile = chain.apart ? 0 : chain_tile(sizes);  // a large one leaves no room
  return {tile, ceil_div(sizes.pixels, kConvTiles[tile].rows)};
}

int64_t packed_bytes(const Chain& chain) {
  int64_t bytes = 0;
  for (int i = 0; i < chain.count; ++i) {
    const Conv& c = chain.products[i].conv;
    if (!reads_wide(c) && packs_wide(c)) bytes += packed_bytes(c);
  }
  return bytes;
}

Status pack(Chain* chain, void* workspace, void* stream) {
  unsigned char* to = static_cast<unsigned char*>(workspace);
  for (int i = 0; i < chain->count; ++i) {
    Conv& c = chain->products[i].conv;
    if (reads_wide(c) || !packs_wide(c)) continue;
    const Status status = pack(&c, to, stream);
    if (status != Status::ok) return status;
    to += packed_bytes(c);
  }
  return Status::ok;
}

Status convolve(const Chain& chain, const ChainPlan& plan, void* stream) {
  const Conv& c = chain.products[0].conv;
  if (c.dtype == DType::f64) return launch_chain<ExactBlock<double, 64>, false>(chain, stream);
  if (c.dtype == DType::bf16) return launch_tensor<__nv_bfloat16>(chain, plan, stream);
  if (c.dtype == DType::f16) return launch_tensor<__half>(chain, plan, stream);
  if (c.math == Math::tensor) return launch_tensor<float>(chain, plan, stream);
  return wide_in(chain, reads_wide) ? launch_chain<ExactBlock<float, 64>, true>(chain, stream)
                                    : launch_chain<ExactBlock<float, 64>, false>(chain, stream);
}

bool describe(const ConvBnActArgs& args, const Prologue& in, Chain* chain) {
  *chain = {};
  chain->count = 1;
  chain->products[0].in = in;
  return describe(args, &chain->products[0].conv);
}

namespace {

bool describe(const BnActConvBnActArgs& args, Chain* chain) {
  if (!describe(args.conv, args.in, chain)) return false;
  const Projection& p = args.projection;
  if (p.channels == 0) return true;
  const ConvShape& s = args.conv.shape;
  const ConvShape second{s.batch,        p.height,     p.width,
                         p.channels,     s.out_height, s.out_width,
                         s.out_channels, {1, 1},       {p.stride[0], p.stride[1]},
                         {0, 0},         {1, 1},       1};
  Conv& c = chain->products[1].conv;
  if (!describe(args.conv.dtype, args.conv.tf32, second, &c)) return false;
  c.x = p.x;
  c.weight = p.weight;
  for (int i = 0; i < 2; ++i) c.weight_stride[i] = p.weight_stride[i];
  chain->count = 2;
  chain->apart = args.conv.scale || p.scale;
  chain->factors[0] = args.conv.scale;
  chain->factors[1] = p.scale;
  chain->products[0].conv.scale = nullptr;
  return true;
}

}  // namespace

int64_t workspace_bytes(const BnActConvBnActArgs& args, const Gpu&) {
  Chain chain;
  return describe(args, &chain) ? packed_bytes(chain) : 0;
}

Status bn_act_conv_bn_act(const BnActConvBnActArgs& args, const Place& place) {
  Chain chain;
  if (!describe(args, &chain)) return Status::unsupported;
  if (chain.products[0].conv.pixels() == 0) return Status::ok;
  const Status status = pack(&chain, place.workspace, place.stream);
  return status == Status::ok ? convolve(chain, plan_of(chain), place.stream) : status;
}

}  // namespace fused_resnet::cuda
