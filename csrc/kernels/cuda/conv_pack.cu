// Weights for 16-byte loads, and what a convolution's description says of itself.
#include <cstdint>

#include "conv.cuh"
#include "vec.cuh"

namespace fused_resnet::cuda {

namespace {

// Elements of `bytes` bytes are moved as they are.
template <class Bits>
__global__ void __launch_bounds__(Streaming::kThreads)
    conv_pack_kernel(const __grid_constant__ Conv c, Bits* packed, int64_t size) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    int64_t rest = i / c.group_channels();
    const int64_t channel = i % c.group_channels(), column = rest % c.kernel[1];
    rest /= c.kernel[1];
    const int64_t row = rest % c.kernel[0], out = rest / c.kernel[0];
    const int64_t group = out / c.group_out_channels(), within = out % c.group_out_channels();
    packed[i] =
        static_cast<const Bits*>(c.weight)[group * c.group_stride + within * c.weight_stride[0] +
                                           channel * c.weight_stride[1] + row * c.weight_stride[2] +
                                           column * c.weight_stride[3]];
  }
}

void set_dense_weight(Conv* c) {
  c->weight_stride[0] = c->depth();
  c->weight_stride[1] = 1;
  c->weight_stride[2] = int64_t{c->kernel[1]} * c->group_channels();
  c->weight_stride[3] = c->group_channels();
  c->group_stride = int64_t{c->depth()} * c->group_out_channels();
}

int vector_of(const Conv& c) { return kVectorBytes / conv_element_bytes(c.dtype); }

template <class Bits>
Status launch_pack(const Conv& c, void* packed, void* stream) {
  const int64_t size = int64_t{c.depth()} * c.out_channels;
  const int64_t blocks = std::min<int64_t>(ceil_div(size, Streaming::kThreads), 1 << 12);
  return launch(conv_pack_kernel<Bits>, static_cast<unsigned>(blocks), Streaming::kThreads, 0,
                stream, c, static_cast<Bits*>(packed), size);
}

}  // namespace

bool describe(DType dtype, bool tf32, const ConvShape& s, Conv* c) {
  const int64_t depth = s.kernel[0] * s.kernel[1] * (s.in_channels / s.groups);
  for (int64_t n :
       {s.height * s.width, s.in_channels, s.out_height * s.out_width, s.out_channels, s.padding[0],
        s.padding[1], s.dilation[0] * s.kernel[0], s.dilation[1] * s.kernel[1],
        s.stride[0] * s.out_height, s.stride[1] * s.out_width, depth})
    if (n >= 1 << 29) return false;
  *c = {};
  c->dtype = dtype;
  c->math = dtype == DType::f64 || (dtype == DType::f32 && !tf32) ? Math::scalar : Math::tensor;
  c->batch = s.batch;
  c->height = static_cast<int>(s.height);
  c->width = static_cast<int>(s.width);
  c->channels = static_cast<int>(s.in_channels);
  c->out_height = static_cast<int>(s.out_height);
  c->out_width = static_cast<int>(s.out_width);
  c->out_channels = static_cast<int>(s.out_channels);
  for (int i = 0; i < 2; ++i) {
    c->kernel[i] = static_cast<int>(s.kernel[i]);
    c->stride[i] = static_cast<int>(s.stride[i]);
    c->padding[i] = static_cast<int>(s.padding[i]);
    c->dilation[i] = static_cast<int>(s.dilation[i]);
  }
  c->groups = static_cast<int>(s.groups);
  set_dense_weight(c);
  c->out_stride[2] = s.out_channels;
  c->out_stride[1] = s.out_channels * s.out_width;
  c->out_stride[0] = c->out_stride[1] * s.out_height;
  return true;
}

bool packs_wide(const Conv& c) {
  return c.dtype != DType::f64 && c.group_channels() % vector_of(c) == 0 && vector_aligned(c.x);
}

bool reads_wide(const Conv& c) {
  if (!packs_wide(c) || c.weight_stride[1] != 1 || !vector_aligned(c.weight)) return false;
  bool aligned = c.groups == 1 || c.group_stride % vector_of(c) == 0;
  const int64_t sizes[4] = {c.group_out_channels(), 1, c.kernel[0], c.kernel[1]};
  for (int d = 0; d < 4; ++d)
    aligned = aligned && (sizes[d] == 1 || c.weight_stride[d] % vector_of(c) == 0);
  return aligned;
}

int64_t packed_bytes(const Conv& c) {
  return ceil_div(int64_t{c.depth()} * c.out_channels * conv_element_bytes(c.dtype), 16) * 16;
}

Status pack(Conv* c, void* packed, void* stream) {
  const Status status = c->dtype == DType::f64   ? launch_pack<uint64_t>(*c, packed, stream)
                        : c->dtype == DType::f32 ? launch_pack<uint32_t>(*c, packed, stream)
                                                 : launch_pack<uint16_t>(*c, packed, stream);
  c->weight = packed;
  set_dense_weight(c);
  return status;
}

ConvSizes sizes_of(const Conv& c) {
  return {c.dtype,   c.math,  reads_wide(c) || packs_wide(c), c.pixels(), c.group_out_channels(),
          c.depth(), c.groups};
}

ConvPlan plan_of(const Conv& c, const Gpu& gpu, bool may_split) {
  return plan_conv(sizes_of(c), gpu, may_split);
}

int64_t partial_bytes(const Conv& c, const ConvPlan& plan) {
  const int64_t sum_bytes = c.dtype == DType::f64 ? 8 : 4;
  return plan.splits > 1 ? plan.splits * c.pixels() * c.out_channels * sum_bytes : 0;
}

int64_t conv_packed_size(DType, const ConvShape& s) {
  return s.out_channels * s.kernel[0] * s.kernel[1] * (s.in_channels / s.groups);
}

DType conv_packed_dtype(DType dtype) { return dtype; }

Status conv_pack(const ConvPackArgs& args, const Place& place) {
  Conv c;
  if (!describe(args.dtype, false, args.shape, &c)) return Status::unsupported;
  c.weight = args.weight;
  for (int d = 0; d < 4; ++d) c.weight_stride[d] = args.weight_stride[d];
  c.group_stride = args.weight_stride[0] * c.group_out_channels();
  return pack(&c, args.packed, place.stream);
}

}  // namespace fused_resnet::cuda
