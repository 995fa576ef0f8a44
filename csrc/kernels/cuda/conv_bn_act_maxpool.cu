// A convolution of few channels and the max pooling of its result, of which nothing is stored in
// between. A block has a tile of one image's pooled pixels. The part of the image they depend on
// and the weight lie in shared memory, from where matrix instructions' operands are gathered; the
// sums, activated and rounded, then take that place, and maxima of windows are read from them. What
// the windows of two tiles share is computed in both: of a ResNet's stem, whose tiles are 8x7, 4.6
// outputs are computed for each pooled pixel, where 4 are needed.
//
// Products that are made one by one, in fp32 and fp64, take longer than the image does to be stored
// and read. They are left to two kernels, and so is what does not fit into a tile.
#include "../math.h"
#include "mma.cuh"
#include "scale_shift.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

constexpr int kTileRows = 256;    // outputs of the convolution that a block computes,
constexpr int kTileColumns = 64;  // of so many channels
constexpr int kTileThreads = 256;
constexpr int kWeightBytes = 320;  // of a channel's depth, in shared memory at a time: a stem's all
// Eight adjacent channels, which are read together, lie in different banks.
constexpr int kWeightPitch = kWeightBytes + 16;
constexpr int kMostPatchBytes = 64 << 10;

// All pairs are (rows, columns).
struct Stem {
  Conv conv;
  int kernel[2], stride[2], padding[2], dilation[2];  // of the pooling
  int pooled[2];                                      // pixels of an image
  int tile[2];                                        // those of a block
  int reads[2];                                       // outputs that their windows read
  int patch[2];                                       // pixels that those read

  __host__ __device__ int tiles(int i) const { return (pooled[i] + tile[i] - 1) / tile[i]; }
  __host__ __device__ int patch_elements() const { return patch[0] * patch[1] * conv.channels; }
};

template <class T>
struct Layout {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;  // values are moved as such
  static constexpr int kDepth = kWeightBytes / sizeof(T);
  static constexpr int kSlice = 32 / sizeof(T);  // of the depth, that a matrix instruction takes
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kOutPitch = kTileColumns + kVector;
  static constexpr int kOutBytes = kTileRows * kOutPitch * static_cast<int>(sizeof(T));
  // Where the values of a depth are, in the patch and in the weight.
  struct Places {
    int patch[kDepth];
    int64_t weight[kDepth];
  };
  static constexpr int kFixedBytes = sizeof(Places) + kTileColumns * kWeightPitch;
  static __host__ int bytes(const Stem& s) {
    const int patch = s.patch_elements() * static_cast<int>(sizeof(T));
    return std::max(kOutBytes, kFixedBytes + patch);
  }
};

// As a matrix instruction reads it.
__device__ __forceinline__ uint16_t operand(uint16_t x) { return x; }
__device__ __forceinline__ uint32_t operand(uint32_t x) { return to_tf32(x); }

template <class T>
class StemBlock {
 public:
  __device__ __forceinline__ StemBlock(const Stem& s, unsigned char* memory)
      : s_(s),
        places_(reinterpret_cast<Places*>(memory)),
        weight_(memory + sizeof(Places)),
        patch_(reinterpret_cast<Bits*>(weight_ + kTileColumns * kWeightPitch)),
        outputs_(reinterpret_cast<T*>(memory)),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * 32) {
    // Blocks that share a patch are launched together.
    const unsigned columns = (s.conv.out_channels + kTileColumns - 1) / kTileColumns;
    first_channel_ = blockIdx.x % columns * kTileColumns;
    unsigned tile = blockIdx.x / columns;
    const int across = tile % s.tiles(1);
    tile /= s.tiles(1);
    first_[0] = tile % s.tiles(0) * s.tile[0];
    first_[1] = across * s.tile[1];
    image_ = tile / s.tiles(0);
    for (int i = 0; i < 2; ++i) {
      read_[i] = first_[i] * s.stride[i] - s.padding[i];
      in_[i] = read_[i] * s.conv.stride[i] - s.conv.padding[i];
    }
  }

  // The part of the image, with zeros around it.
  __device__ __forceinline__ void load_patch() const {
    const Conv& c = s_.conv;
    const int line = s_.patch[1] * c.channels, left = in_[1] * c.channels;
    const Bits* const image =
        static_cast<const Bits*>(c.x) + int64_t{image_} * c.height * c.width * c.channels;
    for (int i = threadIdx.x; i < s_.patch[0] * line; i += kTileThreads) {
      const int row = in_[0] + i / line, at = left + i % line;
      const bool inside =
          unsigned(row) < unsigned(c.height) && unsigned(at) < unsigned(c.width * c.channels);
      patch_[i] = inside ? operand(image[int64_t{row} * c.width * c.channels + at]) : Bits{};
    }
  }

  // Of the depth from `begin` on.
  __device__ __forceinline__ void find_places(int begin) const {
    const Conv& c = s_.conv;
    for (int k = threadIdx.x; k < kDepth && begin + k < c.depth(); k += kTileThreads) {
      const int tap = (begin + k) / c.channels, channel = (begin + k) % c.channels;
      const int row = tap / c.kernel[1], column = tap % c.kernel[1];
      places_->patch[k] =
          (row * c.dilation[0] * s_.patch[1] + column * c.dilation[1]) * c.channels + channel;
      places_->weight[k] =
          channel * c.weight_stride[1] + row * c.weight_stride[2] + column * c.weight_stride[3];
    }
  }

  __device__ __forceinline__ void load_weight(int begin) const {
    const Conv& c = s_.conv;
    for (int i = threadIdx.x; i < kTileColumns * kDepth; i += kTileThreads) {
      const int column = i / kDepth, k = i % kDepth, channel = first_channel_ + column;
      Bits value{};
      if (channel < c.out_channels && begin + k < c.depth())
        value = operand(
            static_cast<const Bits*>(c.weight)[channel * c.weight_stride[0] + places_->weight[k]]);
      *reinterpret_cast<Bits*>(weight_ + column * kWeightPitch + k * sizeof(T)) = value;
    }
  }

  // Adds `depth` products of each output.
  __device__ __forceinline__ void multiply(int depth) {
    int base[2][2];  // where outputs read by the first tap
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row_ + i * 8 + lane_ / 4;
      const int down = row / s_.reads[1], across = row % s_.reads[1];
      // Rows beyond the tile read something, too.
      base[i / 2][i % 2] =
          down < s_.reads[0]
              ? (down * s_.conv.stride[0] * s_.patch[1] + across * s_.conv.stride[1]) *
                    s_.conv.channels
              : 0;
    }
#pragma unroll 1
    for (int slice = 0; slice < depth; slice += Layout<T>::kSlice) {
      uint32_t x[2][4] = {}, w[kTileColumns / 16][4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        constexpr int kEach = 4 / sizeof(T);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int k = slice + (part * 16 + lane_ % 4 * 4) / static_cast<int>(sizeof(T)) + e;
          if (k >= depth) continue;  // a zero: what lies elsewhere might be NaN
          const Bits* const from = patch_ + places_->patch[k];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[i / 2][part * 2 + i % 2] |= uint32_t{from[base[i / 2][i % 2]]} << (16 * e);
        }
      }
#pragma unroll
      for (int j = 0; j < kTileColumns / 16; ++j)
        ldmatrix_x4<false>(w[j], weight_ + (j * 16 + lane_ / 16 * 8 + lane_ % 8) * kWeightPitch +
                                     slice * sizeof(T) + lane_ / 8 % 2 * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kTileColumns / 8; ++j) {
          const uint32_t pair[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
          if constexpr (sizeof(T) == 2)
            mma_m16n8k16<T>(sums_[i][j], x[i], pair);
          else
            mma_m16n8k8(sums_[i][j], x[i], pair);
        }
      }
    }
  }

  __device__ __forceinline__ void store_outputs() const {
    const Conv& c = s_.conv;
#pragma unroll
    for (int j = 0; j < kTileColumns / 8; ++j) {
      const int column = j * 8 + lane_ % 4 * 2;
      const ScaleShift<T, 2> scale_shift(c, first_channel_ + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vector<T, 2> pair;
#pragma unroll
        for (int k = 0; k < 2; ++k)
          pair.at[k] =
              narrow<T>(math::activate(scale_shift(sums_[i / 2][j][i % 2 * 2 + k], k), c.act));
        store<2>(outputs_ + (warp_row_ + i * 8 + lane_ / 4) * kOutPitch + column, pair);
      }
    }
  }

  // Maxima of windows, 16 bytes of channels at a time.
  __device__ __forceinline__ void pool(bool vectors) const {
    const Conv& c = s_.conv;
    constexpr int n = Layout<T>::kVector, kUnits = kTileColumns / n;
    const int column = threadIdx.x % kUnits * n, left = c.out_channels - first_channel_ - column;
    if (left <= 0) return;
    for (int i = threadIdx.x / kUnits; i < s_.tile[0] * s_.tile[1]; i += kTileThreads / kUnits) {
      const int down = i / s_.tile[1], across = i % s_.tile[1];
      const int row = first_[0] + down, pixel = first_[1] + across;
      if (row >= s_.pooled[0] || pixel >= s_.pooled[1]) continue;
      auto best = each<n>([](int) { return -INFINITY; });
      for (int kh = 0; kh < s_.kernel[0]; ++kh) {
        const int h = down * s_.stride[0] + kh * s_.dilation[0];
        if (unsigned(read_[0] + h) >= unsigned(c.out_height)) continue;
        for (int kw = 0; kw < s_.kernel[1]; ++kw) {
          const int w = across * s_.stride[1] + kw * s_.dilation[1];
          if (unsigned(read_[1] + w) >= unsigned(c.out_width)) continue;
          const auto y = load_wide<n>(outputs_ + (h * s_.reads[1] + w) * kOutPitch + column);
#pragma unroll
          for (int k = 0; k < n; ++k) best.at[k] = math::maximum(best.at[k], y.at[k]);
        }
      }
      T* const out =
          static_cast<T*>(c.out) +
          ((int64_t{image_} * s_.pooled[0] + row) * s_.pooled[1] + pixel) * c.out_channels +
          first_channel_ + column;
      Vector<T, n> rounded;
#pragma unroll
      for (int k = 0; k < n; ++k) rounded.at[k] = narrow<T>(best.at[k]);
      if (vectors) {
        store_global<n>(out, rounded);
      } else {
#pragma unroll
        for (int k = 0; k < n; ++k)
          if (k < left) out[k] = rounded.at[k];
      }
    }
  }

 private:
  using Bits = typename Layout<T>::Bits;
  using Places = typename Layout<T>::Places;
  static constexpr int kDepth = Layout<T>::kDepth, kOutPitch = Layout<T>::kOutPitch;

  const Stem& s_;
  Places* const places_;
  unsigned char* const weight_;
  Bits* const patch_;
  T* const outputs_;
  const int lane_, warp_row_;
  int image_, first_channel_;
  int first_[2], read_[2], in_[2];  // pooled pixel, output and pixel where the tile begins
  float sums_[2][kTileColumns / 8][4] = {};
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    conv_maxpool_kernel(const __grid_constant__ Stem s, bool vectors) {
  constexpr int kDepth = Layout<T>::kDepth;
  FR_DYNAMIC_SHARED(memory);
  StemBlock<T> block(s, memory);
  block.load_patch();
  const int depth = s.conv.depth();
  for (int begin = 0; begin < depth; begin += kDepth) {
    block.find_places(begin);
    __syncthreads();
    block.load_weight(begin);
    __syncthreads();
    block.multiply(depth - begin < kDepth ? depth - begin : kDepth);
    __syncthreads();
  }
  block.store_outputs();
  __syncthreads();
  block.pool(vectors);
}

// How many adjacent values a number of adjacent windows read.
int64_t span(int64_t count, int64_t kernel, int64_t stride, int64_t dilation) {
  return (count - 1) * stride + dilation * (kernel - 1) + 1;
}

// Chooses the tile of the fewest blocks whose outputs and patch fit; false where not even a single
// pixel's do.
bool choose_tile(Stem* s) {
  const Conv& c = s->conv;
  int64_t fewest = 0;
  auto reads = [&](int64_t n, int i) {
    return span(n, s->kernel[i], s->stride[i], s->dilation[i]);
  };
  auto patch = [&](int64_t n, int i) {
    return span(reads(n, i), c.kernel[i], c.stride[i], c.dilation[i]);
  };
  const int64_t most = kMostPatchBytes / (conv_element_bytes(c.dtype) * int64_t{c.channels});
  for (int64_t w = 1; w <= s->pooled[1] && reads(w, 1) <= kTileRows; ++w)
    for (int64_t h = 1; h <= s->pooled[0]; ++h) {
      if (reads(h, 0) * reads(w, 1) > kTileRows || patch(h, 0) * patch(w, 1) > most) break;
      const int64_t blocks = ceil_div(s->pooled[0], h) * ceil_div(s->pooled[1], w);
      if (fewest && blocks >= fewest) continue;
      fewest = blocks;
      const int64_t tile[2] = {h, w};
      for (int i = 0; i < 2; ++i) {
        s->tile[i] = static_cast<int>(tile[i]);
        s->reads[i] = static_cast<int>(reads(tile[i], i));
        s->patch[i] = static_cast<int>(patch(tile[i], i));
      }
    }
  return fewest > 0;
}

template <class T>
Status launch_stem(const Stem& s, void* stream) {
  const Conv& c = s.conv;
  const bool vectors = vector_aligned(c.out) && c.out_channels % Layout<T>::kVector == 0;
  const int64_t blocks = c.batch * s.tiles(0) * s.tiles(1) * ceil_div(c.out_channels, kTileColumns);
  if (blocks > INT32_MAX) return Status::unsupported;
  return launch(conv_maxpool_kernel<T>, static_cast<unsigned>(blocks), kTileThreads,
                Layout<T>::bytes(s), stream, s, vectors);
}

struct Job {
  Stem stem{};
  bool fits;     // sizes are what a convolution can have
  bool at_once;  // by one kernel, and not by these two
  ConvBnActArgs conv;
  BnActMaxpoolArgs pool{};

  explicit Job(const ConvBnActMaxpoolArgs& args) : conv(args.conv) {
    const PoolShape& p = args.pool;
    Conv& c = stem.conv;
    fits = describe(conv.dtype, conv.tf32, conv.shape, &c);
    for (int64_t n : {p.kernel[0] * p.dilation[0], p.kernel[1] * p.dilation[1],
                      p.stride[0] * p.out_height, p.stride[1] * p.out_width})
      fits = fits && n < 1 << 29;
    if (!fits) return;
    c.act = conv.act;
    c.x = conv.x;
    c.weight = conv.weight;
    for (int d = 0; d < 4; ++d) c.weight_stride[d] = conv.weight_stride[d];
    c.scale = conv.scale;
    c.shift = conv.shift;
    c.out = args.out;
    for (int i = 0; i < 2; ++i) {
      stem.kernel[i] = static_cast<int>(p.kernel[i]);
      stem.stride[i] = static_cast<int>(p.stride[i]);
      stem.padding[i] = static_cast<int>(p.padding[i]);
      stem.dilation[i] = static_cast<int>(p.dilation[i]);
    }
    stem.pooled[0] = static_cast<int>(p.out_height);
    stem.pooled[1] = static_cast<int>(p.out_width);
    at_once = c.math == Math::tensor && choose_tile(&stem);
    pool.dtype = conv.dtype;
    pool.channels_last = true;
    pool.shape = p;
    pool.out = args.out;
  }
  int64_t image_bytes() const {
    const int64_t values = stem.conv.pixels() * stem.conv.out_channels;
    return ceil_div(values * conv_element_bytes(conv.dtype), 16) * 16;
  }
};

}  // namespace

int64_t workspace_bytes(const ConvBnActMaxpoolArgs& args, const Gpu& gpu) {
  const Job job(args);
  return !job.fits || job.at_once ? 0 : job.image_bytes() + workspace_bytes(job.conv, gpu);
}

Status conv_bn_act_maxpool(const ConvBnActMaxpoolArgs& args, const Place& place) {
  Job job(args);
  if (!job.fits) return Status::unsupported;
  if (args.pool.batch == 0) return Status::ok;
  if (job.at_once) {
    if (job.conv.dtype == DType::bf16) return launch_stem<__nv_bfloat16>(job.stem, place.stream);
    if (job.conv.dtype == DType::f16) return launch_stem<__half>(job.stem, place.stream);
    return launch_stem<float>(job.stem, place.stream);
  }
  unsigned char* const image = static_cast<unsigned char*>(place.workspace);
  job.pool.x = job.conv.out = image;
  const Status status = conv_bn_act(job.conv, {place.stream, place.gpu, image + job.image_bytes()});
  return status == Status::ok ? bn_act_maxpool(job.pool, place) : status;
}

}  // namespace fused_resnet::cuda
