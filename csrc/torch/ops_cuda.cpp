// The CUDA engine's registration: the caller's device and its current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_engine.h"

namespace fused_resnet::glue {
namespace {

void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

cuda::Gpu gpu(int device) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    FR_CHECK(error == cudaSuccess, "cannot ask CUDA device ", device,
             " what it is: ", cudaGetErrorString(error));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor)};
}

class Cuda : public CudaEngine {
 public:
  explicit Cuda(const Tensor& on)
      : CudaEngine(on, current_stream(on.get_device()), gpu(on.get_device())),
        guard_(on.get_device()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, library) { implement_cuda<Cuda>(library); }

}  // namespace fused_resnet::glue
