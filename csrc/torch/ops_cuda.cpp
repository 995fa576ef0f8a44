// The CUDA engine's registration: the caller's device and its current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "cuda_engine.h"

namespace fused_resnet::glue {
namespace {

void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Of every device: asked once, and not at each launch.
const cuda::Gpu& gpu(int device) {
  static const std::vector<cuda::Gpu> all = [] {
    auto check = [](cudaError_t error) {
      FR_CHECK(error == cudaSuccess,
               "cannot ask CUDA devices what they are: ", cudaGetErrorString(error));
    };
    int count = 0;
    check(cudaGetDeviceCount(&count));
    std::vector<cuda::Gpu> found;
    for (int each = 0; each < count; ++each) {
      auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, each));
        return value;
      };
      found.push_back({attribute(cudaDevAttrMultiProcessorCount),
                       10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                           attribute(cudaDevAttrComputeCapabilityMinor)});
    }
    return found;
  }();
  return all.at(device);
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
