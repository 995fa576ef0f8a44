// The CUDA engine emulated on CPU tensors: torch.ops.fused_resnet_simt, registered for the CPU.
// SIMT_SCHEDULE (see simt::set_schedule) and SIMT_SEED are read at every launch.
#include <cstdlib>

#include "../../csrc/torch/cuda_engine.h"
#include "../../csrc/torch/schema.h"

namespace fused_resnet::glue {
namespace {

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// Two multiprocessors keep grids small, so that grid-stride loops go round, and split sums.
class Simt : public CudaEngine {
 public:
  explicit Simt(const Tensor& on) : CudaEngine(on, nullptr, {2, 90}) {
    const std::string schedule = environment("SIMT_SCHEDULE", "round_robin");
    FR_CHECK(simt::set_schedule(schedule, std::stoul(environment("SIMT_SEED", "0"))),
             "SIMT_SCHEDULE must be an order of threads, got ", schedule);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(fused_resnet_simt, library) { declare(library); }
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_simt, CPU, library) { implement_cuda<Simt>(library); }

}  // namespace fused_resnet::glue
