// Convolution as an implicit matrix product: output pixels by output channels, summed over kernel
// positions and input channels. A block has one tile of it; blocks may share out its depth.
#include "conv_block.cuh"
#include "conv_wgmma.h"
#include "workspace.h"

namespace fused_resnet::cuda {

namespace {

template <class B, bool wide>
__global__ void __launch_bounds__(B::kThreads)
    conv_kernel(const __grid_constant__ Conv c, int split_stages, bool vectors, void* partial) {
  using T = typename B::T;
  using Sum = typename B::Sums::Sum;
  constexpr int kDepth = kRowBytes / sizeof(T);
  FR_DYNAMIC_SHARED(memory);
  Pixel* const pixels = reinterpret_cast<Pixel*>(memory + B::kStages * B::kStageBytes);

  const Tile tile = Tile::of<B>(c);
  for (int i = threadIdx.x; i < B::kRows; i += B::kThreads)
    pixels[i] = pixel_at(c, tile.first_row, i);
  __syncthreads();
  const int begin = blockIdx.y * split_stages, stages = (c.depth() + kDepth - 1) / kDepth;
  const int end = begin + split_stages < stages ? begin + split_stages : stages;
  Sum* const all = sum_products<B, wide>(c, tile, pixels, begin, end, memory);
  const int64_t rows_left = c.pixels() - tile.first_row;
  const int channel = tile.channel(c), columns_left = tile.columns(c);
  if (partial) {  // as they are, [split][pixel][channel]
    const int column = threadIdx.x % B::kColumns;
    Sum* const part = static_cast<Sum*>(partial) + channel + column +
                      (blockIdx.y * c.pixels() + tile.first_row) * c.out_channels;
    if (column >= columns_left) return;
    each_row<B>(rows_left, [&](int row) {
      part[int64_t{row} * c.out_channels] = all[row * B::Sums::kPitch + column];
    });
  } else if (vectors) {
    write_vectors<B>(c, pixels, rows_left, channel, columns_left, all, AsTheyAre{});
  } else {
    write_elements<B>(c, pixels, rows_left, channel, columns_left, all, AsTheyAre{});
  }
}

// Adds the parts up, in order.
template <class T>
__global__ void __launch_bounds__(Streaming::kThreads)
    conv_finish_kernel(const __grid_constant__ Conv c, const Acc<T>* partial, int splits) {
  const int64_t size = c.pixels() * c.out_channels, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    Acc<T> sum{};
    for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
    write_values<T>(c, &sum, i, ScaleShift<T, 1>(c, static_cast<int>(i % c.out_channels)),
                    AsTheyAre{});
  }
}

template <class B, bool wide>
Status launch_conv(const Conv& c, int splits, void* partial, void* stream) {
  using T = typename B::T;
  const int64_t tiles = Tile::count<B>(c);
  const int64_t stages = ceil_div(int64_t{c.depth()} * sizeof(T), kRowBytes);
  if (tiles > INT32_MAX) return Status::unsupported;
  const Status status = launch(
      conv_kernel<B, wide>, dim3(static_cast<unsigned>(tiles), splits), B::kThreads, B::kBytes,
      stream, c, static_cast<int>(ceil_div(stages, splits)), writes_vectors(c), partial);
  if (status != Status::ok || !partial) return status;
  const int64_t blocks = ceil_div(c.pixels() * c.out_channels, Streaming::kThreads);
  return launch(conv_finish_kernel<T>, static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)),
                Streaming::kThreads, 0, stream, c, static_cast<const Acc<T>*>(partial), splits);
}

template <class T>
using TallBlock = Block<T, TensorSums<T, 128, 64, 2, 2>, 128, 64, 3>;

template <class T>
Status launch_tensor(const Conv& c, bool wide, const ConvPlan& plan, void* partial, void* stream) {
  if (!wide) return launch_conv<SmallBlock<T>, false>(c, plan.splits, partial, stream);
  if (plan.tile == 0) return launch_conv<SmallBlock<T>, true>(c, plan.splits, partial, stream);
  if (plan.tile == 1) return launch_conv<TallBlock<T>, true>(c, plan.splits, partial, stream);
  return launch_conv<LargeBlock<T>, true>(c, plan.splits, partial, stream);
}

Status launch_scalar(const Conv& c, bool wide, const ConvPlan& plan, void* partial, void* stream) {
  if (c.dtype == DType::f64)
    return launch_conv<ExactBlock<double, 64>, false>(c, plan.splits, partial, stream);
  if (!wide) return launch_conv<ExactBlock<float, 64>, false>(c, plan.splits, partial, stream);
  if (plan.tile == 0)
    return launch_conv<ExactBlock<float, 64>, true>(c, plan.splits, partial, stream);
  return launch_conv<ExactBlock<float, 128>, true>(c, plan.splits, partial, stream);
}

}  // namespace

Status convolve(const Conv& c, const ConvPlan& plan, void* partial, void* stream) {
  const bool wide = reads_wide(c);
  if (plan.splits == 1) partial = nullptr;
  if (c.math == Math::scalar) return launch_scalar(c, wide, plan, partial, stream);
  if (c.dtype == DType::bf16) return launch_tensor<__nv_bfloat16>(c, wide, plan, partial, stream);
  if (c.dtype == DType::f16) return launch_tensor<__half>(c, wide, plan, partial, stream);
  return launch_tensor<float>(c, wide, plan, partial, stream);
}

bool describe(const ConvBnActArgs& args, Conv* conv) {
  if (!describe(args.dtype, args.tf32, args.shape, conv)) return false;
  conv->act = args.act;
  conv->x = args.x;
  conv->scale = args.scale;
  conv->shift = args.shift;
  conv->residual = args.residual;
  conv->out = args.out;
  conv->weight = args.packed ? args.packed : args.weight;
  if (!args.packed) {
    for (int d = 0; d < 4; ++d) conv->weight_stride[d] = args.weight_stride[d];
    conv->group_stride = args.weight_stride[0] * conv->group_out_channels();
  }
  return true;
}

namespace {

struct Job {
  Conv conv;
  bool fits, packs;
  ConvPlan plan;

  Job(const ConvBnActArgs& args, const Gpu& gpu) : fits(describe(args, &conv)) {
    if (!fits) return;
    packs = !reads_wide(conv) && packs_wide(conv);
    plan = plan_of(conv, gpu, !args.wgmma);
  }
  int64_t pack_bytes() const { return packs ? packed_bytes(conv) : 0; }
};

}  // namespace

int64_t workspace_bytes(const ConvBnActArgs& args, const Gpu& gpu) {
  const Job job(args, gpu);
  return job.fits ? job.pack_bytes() + partial_bytes(job.conv, job.plan) : 0;
}

Status conv_bn_act(const ConvBnActArgs& args, const Place& place) {
  Job job(args, place.gpu);
  if (!job.fits) return Status::unsupported;
  if (args.wgmma && !wgmma_takes(args.dtype, args.shape, place.gpu)) return Status::unsupported;
  if (job.conv.pixels() == 0) return Status::ok;
  if (args.wgmma) return convolve_wgmma(job.conv, place.gpu, place.stream);
  unsigned char* const workspace = static_cast<unsigned char*>(place.workspace);
  if (job.packs) {
    const Status status = pack(&job.conv, workspace, place.stream);
    if (status != Status::ok) return status;
  }
  return convolve(job.conv, job.plan, workspace + job.pack_bytes(), place.stream);
}

}  // namespace fused_resnet::cuda
