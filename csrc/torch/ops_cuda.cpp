// The CUDA engine's registration: the caller's device and its current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops.h"

namespace fused_resnet::glue {
namespace {

class Cuda {
 public:
  explicit Cuda(const Tensor& on) : guard_(on.get_device()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device(), &stream_));
  }

  Status launch(const EltwiseActArgs& args) { return cuda::eltwise_act(args, stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, library) {
  library.impl("eltwise_act", TORCH_BOX(&eltwise_act<Cuda>));
}

}  // namespace fused_resnet::glue
