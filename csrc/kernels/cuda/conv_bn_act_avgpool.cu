// A convolution and the mean over each image of its result, of which nothing is stored. Tiles are
// of one image's pixels, so many whatever the GPU, and leave their sums, which are added in order;
// where an image is one tile, that makes the mean at once. The depth is not split.
#include "conv_block.cuh"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

constexpr int kTileRows = 64;  // the 7x7 pixels that ResNets end in leave 15 of them empty

int64_t image_pixels(const Conv& c) { return int64_t{c.out_height} * c.out_width; }
int64_t image_tiles(const Conv& c) { return ceil_div(image_pixels(c), kTileRows); }

// What would be stored is left where the sums were.
struct InPlaceOfSums : AsTheyAre {
  template <int n>
  __device__ __forceinline__ InPlaceOfSums of(int) const {
    return {};
  }
  __device__ __forceinline__ InPlaceOfSums on(const Pixel&) const { return {}; }
  template <class T, int n>
  __device__ __forceinline__ void put(const Conv&, int64_t, const Vector<T, n>& result,
                                      Acc<T>* sums) const {
    keep_values(result, sums);
  }
};

template <class T>
__device__ __forceinline__ T mean_of(double sum, int64_t pixels) {
  return narrow<T>(static_cast<Acc<T>>(sum / static_cast<double>(pixels)));
}

// Of images of so many tiles each, [image][tile][channel]; `partial` is null where that is one.
template <class B, bool wide>
__global__ void __launch_bounds__(B::kThreads)
    conv_avgpool_kernel(const __grid_constant__ Conv c, unsigned tiles, bool vectors,
                        Acc<typename B::T>* partial, typename B::T* out) {
  using T = typename B::T;
  using A = Acc<T>;
  constexpr int kDepth = kRowBytes / sizeof(T), kPitch = B::Sums::kPitch;
  static_assert(B::kRows == kTileRows);
  static_assert((B::kRows * kPitch + B::kThreads) * sizeof(A) <= B::kStages * B::kStageBytes);
  FR_DYNAMIC_SHARED(memory);
  Pixel* const pixels = reinterpret_cast<Pixel*>(memory + B::kStages * B::kStageBytes);

  Tile tile = Tile::of<B>(c);
  const int of_image = c.out_height * c.out_width;
  const int first = static_cast<int>(tile.row_tile % tiles) * B::kRows;
  const int rows = of_image - first < B::kRows ? of_image - first : B::kRows;
  tile.first_row = tile.row_tile / tiles * of_image + first;
  for (int i = threadIdx.x; i < B::kRows; i += B::kThreads)
    pixels[i] = i < rows ? pixel_at(c, tile.first_row, i) : Pixel{0, 0, kNowhere, 0};
  __syncthreads();
  A* const all =
      sum_products<B, wide>(c, tile, pixels, 0, (c.depth() + kDepth - 1) / kDepth, memory);
  const int channel = tile.channel(c), columns = tile.columns(c);
  if (vectors)
    write_vectors<B>(c, pixels, rows, channel, columns, all, InPlaceOfSums{});
  else
    write_elements<B>(c, pixels, rows, channel, columns, all, InPlaceOfSums{});
  __syncthreads();
  const int column = threadIdx.x % B::kColumns;
  const A sum = sum_column<B>(all + B::kRows * kPitch, rows, column < columns,
                              [&](int row) { return all[row * kPitch + column]; });
  if (column >= columns || threadIdx.x >= B::kColumns) return;
  const int64_t at = tile.row_tile * c.out_channels + channel + column;
  if (partial)
    partial[at] = sum;
  else
    out[at] = mean_of<T>(sum, of_image);
}

template <class T>
__global__ void __launch_bounds__(Streaming::kThreads)
    conv_avgpool_finish_kernel(const Acc<T>* partial, int64_t size, int64_t channels, int64_t tiles,
                               int64_t pixels, T* out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const Acc<T>* const from = partial + i / channels * tiles * channels + i % channels;
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * channels];
    out[i] = mean_of<T>(sum, pixels);
  }
}

template <class B, bool wide>
Status launch_avgpool(const Conv& c, void* workspace, void* out, void* stream) {
  using T = typename B::T;
  const int64_t tiles = image_tiles(c), blocks = c.batch * tiles * Tile::across<B>(c);
  if (blocks > INT32_MAX) return Status::unsupported;
  Acc<T>* const partial = tiles > 1 ? static_cast<Acc<T>*>(workspace) : nullptr;
  T* const means = static_cast<T*>(out);
  const Status status =
      launch(conv_avgpool_kernel<B, wide>, static_cast<unsigned>(blocks), B::kThreads, B::kBytes,
             stream, c, static_cast<unsigned>(tiles), writes_vectors(c), partial, means);
  if (status != Status::ok || !partial) return status;
  const int64_t size = c.batch * c.out_channels, most = ceil_div(size, Streaming::kThreads);
  return launch(conv_avgpool_finish_kernel<T>,
                static_cast<unsigned>(std::min<int64_t>(most, 1 << 16)), Streaming::kThreads, 0,
                stream, static_cast<const Acc<T>*>(partial), size, int64_t{c.out_channels}, tiles,
                image_pixels(c), means);
}

struct Job {
  Conv conv;
  bool fits;
  int64_t pack_bytes = 0;

  explicit Job(const ConvBnActArgs& args) : fits(describe(args, &conv)) {
    if (fits && !reads_wide(conv) && packs_wide(conv)) pack_bytes = packed_bytes(conv);
  }
};

}  // namespace

int64_t workspace_bytes(const ConvBnActAvgpoolArgs& args, const Gpu&) {
  const Job job(args.conv);
  if (!job.fits) return 0;
  const int64_t tiles = image_tiles(job.conv), sum_bytes = args.conv.dtype == DType::f64 ? 8 : 4;
  const int64_t sums = tiles > 1 ? job.conv.batch * tiles * job.conv.out_channels : 0;
  return job.pack_bytes + sums * sum_bytes;
}

Status conv_bn_act_avgpool(const ConvBnActAvgpoolArgs& args, const Place& place) {
  Job job(args.conv);
  Conv& c = job.conv;
  if (!job.fits) return Status::unsupported;
  if (c.batch == 0) return Status::ok;
  unsigned char* const sums = static_cast<unsigned char*>(place.workspace) + job.pack_bytes;
  if (job.pack_bytes > 0) {
    const Status status = pack(&c, place.workspace, place.stream);
    if (status != Status::ok) return status;
  }
  const bool wide = reads_wide(c);
  return dispatch(c.dtype, [&](auto type) {
    using T = decltype(type);
    auto with = [&](auto block) {
      using B = decltype(block);
      if constexpr (sizeof(T) < 8) {
        if (wide) return launch_avgpool<B, true>(c, sums, args.out, place.stream);
      }
      return launch_avgpool<B, false>(c, sums, args.out, place.stream);
    };
    if constexpr (sizeof(T) < 8) {
      if (c.math == Math::tensor) return with(SmallBlock<T>{});
    }
    if constexpr (sizeof(T) > 2) return with(ExactBlock<T, kTileRows>{});
    return Status::unsupported;
  });
}

}  // namespace fused_resnet::cuda
