// The CPU engine's registration.
#include "ops.h"
#include "ops_chain_backward.h"
#include "ops_int8.h"
#include "ops_training.h"
#include "ops_training_conv.h"
#include "ops_training_gram.h"
#include "ops_training_pool.h"
#include "ops_winograd.h"

namespace fused_resnet::glue {
namespace {

// torch's own thread pool, as the kernels see it.
const cpu::Pool& pool() {
  thread_local cpu::Pool pool{
      1, [](int64_t n, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
        torch::stable::parallel_for(0, n, grain,
                                    [&](int64_t begin, int64_t end) { body(context, begin, end); });
      }};
  pool.threads = static_cast<int>(torch::stable::get_num_threads());
  return pool;
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

#define FR_LAUNCH(op, Args) \
  Status launch(const Args& args) { return cpu::op(args, pool()); }
  FUSED_RESNET_OPS(FR_LAUNCH)
  FUSED_RESNET_INT8_OPS(FR_LAUNCH)
  FUSED_RESNET_WINOGRAD_OPS(FR_LAUNCH)
#undef FR_LAUNCH

  static int64_t packed_size(DType dtype, const ConvShape& shape) {
    return cpu::conv_packed_size(dtype, shape);
  }
  static DType packed_dtype(DType dtype) { return cpu::conv_packed_dtype(dtype); }
  static int64_t int8_packed_size(const ConvShape& shape) {
    return cpu::conv_int8_packed_size(shape);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, library) {
  library.impl("eltwise_act", TORCH_BOX(&eltwise_act<Cpu>));
  library.impl("bn_act", TORCH_BOX(&bn_act<Cpu>));
  library.impl("bn_act_", TORCH_BOX(&bn_act_<Cpu>));
  library.impl("batch_norm_act_", TORCH_BOX(&batch_norm_act_<Cpu>));
  library.impl("bn_act_maxpool", TORCH_BOX(&bn_act_maxpool<Cpu>));
  library.impl("global_avg_pool", TORCH_BOX(&global_avg_pool<Cpu>));
  library.impl("bn_scale_shift", TORCH_BOX(&bn_scale_shift<Cpu>));
  library.impl("conv_pack", TORCH_BOX(&conv_pack<Cpu>));
  library.impl("conv_bn_act", TORCH_BOX(&conv_bn_act<Cpu>));
  library.impl("quantize", TORCH_BOX(&quantize<Cpu>));
  library.impl("conv_int8_pack", TORCH_BOX(&conv_int8_pack<Cpu>));
  library.impl("conv_int8", TORCH_BOX(&conv_int8<Cpu>));
  library.impl("conv_winograd_pack", TORCH_BOX(&conv_winograd_pack<Cpu>));
  library.impl("conv_bn_act_winograd", TORCH_BOX(&conv_bn_act_winograd<Cpu>));
  library.impl("bn_stats", TORCH_BOX(&bn_stats<Cpu>));
  library.impl("bn_finalize", TORCH_BOX(&bn_finalize<Cpu>));
  library.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce<Cpu>));
  library.impl("bn_act_backward", TORCH_BOX(&bn_act_backward<Cpu>));
  library.impl("bn_act_backward_", TORCH_BOX(&bn_act_backward_<Cpu>));
  library.impl("bn_act_gram", TORCH_BOX(&bn_act_gram<Cpu>));
  library.impl("gram_moments", TORCH_BOX(&gram_moments<Cpu>));
  library.impl("gram_stats", TORCH_BOX(&gram_stats<Cpu>));
  library.impl("gram_gradients", TORCH_BOX(&gram_gradients<Cpu>));
  library.impl("relu_backward_reduce", TORCH_BOX(&relu_backward_reduce<Cpu>));
  library.impl("conv_dgrad", TORCH_BOX(&conv_dgrad<Cpu>));
  library.impl("conv_dgrad_", TORCH_BOX(&conv_dgrad_<Cpu>));
  library.impl("conv_wgrad", TORCH_BOX(&conv_wgrad<Cpu>));
  library.impl("bn_act_maxpool_train", TORCH_BOX(&bn_act_maxpool_train<Cpu>));
  library.impl("bn_act_maxpool_backward_reduce", TORCH_BOX(&bn_act_maxpool_backward_reduce<Cpu>));
  library.impl("bn_act_maxpool_backward", TORCH_BOX(&bn_act_maxpool_backward<Cpu>));
  library.impl("eltwise_act_backward", TORCH_BOX(&eltwise_act_backward<Cpu>));
  library.impl("chain_forward", TORCH_BOX(&chain_forward<Cpu>));
  library.impl("chain_backward", TORCH_BOX(&chain_backward<Cpu>));
}

}  // namespace fused_resnet::glue
