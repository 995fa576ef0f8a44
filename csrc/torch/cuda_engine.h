// The CUDA engine wherever it runs: on a GPU (ops_cuda.cpp), or emulated in the tests.
#pragma once

#include "../kernels/cuda/workspace.h"
#include "ops.h"
#include "ops_chain_backward.h"
#include "ops_conv_chain_backward.h"
#include "ops_pooled.h"
#include "ops_training.h"
#include "ops_training_conv.h"
#include "ops_training_gram.h"
#include "ops_training_pool.h"

namespace fused_resnet::glue {

#define FR_LAUNCH(op, Args)                                               \
  inline Status launch_cuda(const Args& args, const cuda::Place& place) { \
    return cuda::op(args, place);                                         \
  }
FUSED_RESNET_OPS(FR_LAUNCH)
FUSED_RESNET_POOL_OPS(FR_LAUNCH)
FUSED_RESNET_CHAIN_OPS(FR_LAUNCH)
#undef FR_LAUNCH

// Launches on one stream, each op with a workspace of its own from torch's allocator, which may
// hand it out again at once: what is queued on the stream later runs later.
class CudaEngine {
 public:
  CudaEngine(const Tensor& on, void* stream, cuda::Gpu gpu)
      : device_(on.device()), place_{stream, gpu, nullptr} {}

  template <class Args>
  Status launch(const Args& args) {
    cuda::Place place = place_;
    MaybeTensor workspace;
    if (const int64_t bytes = cuda::workspace_bytes(args, place.gpu)) {
      workspace = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device_);
      place.workspace = workspace->mutable_data_ptr();
    }
    return launch_cuda(args, place);
  }

  static int64_t packed_size(DType dtype, const ConvShape& shape) {
    return cuda::conv_packed_size(dtype, shape);
  }
  static DType packed_dtype(DType dtype) { return cuda::conv_packed_dtype(dtype); }

 private:
  torch::stable::Device device_;
  cuda::Place place_;
};

// Registers every op that has a CUDA kernel, for a Device that is a CudaEngine.
template <class Device>
void implement_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("eltwise_act", TORCH_BOX(&eltwise_act<Device>));
  library.impl("eltwise_act_backward", TORCH_BOX(&eltwise_act_backward<Device>));
  library.impl("bn_scale_shift", TORCH_BOX(&bn_scale_shift<Device>));
  library.impl("bn_act", TORCH_BOX(&bn_act<Device>));
  library.impl("bn_act_", TORCH_BOX(&bn_act_<Device>));
  library.impl("bn_stats", TORCH_BOX(&bn_stats<Device>));
  library.impl("bn_finalize", TORCH_BOX(&bn_finalize<Device>));
  library.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce<Device>));
  library.impl("bn_act_backward", TORCH_BOX(&bn_act_backward<Device>));
  library.impl("bn_act_backward_", TORCH_BOX(&bn_act_backward_<Device>));
  library.impl("gram_moments", TORCH_BOX(&gram_moments<Device>));
  library.impl("gram_stats", TORCH_BOX(&gram_stats<Device>));
  library.impl("gram_gradients", TORCH_BOX(&gram_gradients<Device>));
  library.impl("relu_backward_reduce", TORCH_BOX(&relu_backward_reduce<Device>));
  library.impl("bn_act_gram", TORCH_BOX(&bn_act_gram<Device>));
  library.impl("conv_pack", TORCH_BOX(&conv_pack<Device>));
  library.impl("conv_bn_act", TORCH_BOX(&conv_bn_act<Device>));
  library.impl("conv_dgrad", TORCH_BOX(&conv_dgrad<Device>));
  library.impl("conv_wgrad", TORCH_BOX(&conv_wgrad<Device>));
  library.impl("conv_dgrad_", TORCH_BOX(&conv_dgrad_<Device>));
  library.impl("batch_norm_act_", TORCH_BOX(&batch_norm_act_<Device>));
  library.impl("conv_bn_act_maxpool", TORCH_BOX(&conv_bn_act_maxpool<Device>));
  library.impl("conv_bn_act_avgpool", TORCH_BOX(&conv_bn_act_avgpool<Device>));
  library.impl("bn_act_maxpool", TORCH_BOX(&bn_act_maxpool<Device>));
  library.impl("global_avg_pool", TORCH_BOX(&global_avg_pool<Device>));
  library.impl("bn_act_maxpool_train", TORCH_BOX(&bn_act_maxpool_train<Device>));
  library.impl("bn_act_maxpool_backward_reduce",
               TORCH_BOX(&bn_act_maxpool_backward_reduce<Device>));
  library.impl("bn_act_maxpool_backward", TORCH_BOX(&bn_act_maxpool_backward<Device>));
  library.impl("bn_act_conv_stats", TORCH_BOX(&bn_act_conv_stats<Device>));
  library.impl("bn_act_conv_bn_act", TORCH_BOX(&bn_act_conv_bn_act<Device>));
  library.impl("bn_backward_conv_dgrad", TORCH_BOX(&bn_backward_conv_dgrad<Device>));
  library.impl("bn_backward_conv_wgrad", TORCH_BOX(&bn_backward_conv_wgrad<Device>));
  library.impl("relu_backward_conv_wgrad", TORCH_BOX(&relu_backward_conv_wgrad<Device>));
  library.impl("bn_act_gram_backward", TORCH_BOX(&bn_act_gram_backward<Device>));
  library.impl("chain_forward", TORCH_BOX(&chain_forward<Device>));
  library.impl("chain_backward", TORCH_BOX(&chain_backward<Device>));
}

}  // namespace fused_resnet::glue
