// What is not a tensor op: how this build was made and what the processor offers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "../kernels/api.h"

namespace {

std::map<std::string, std::string> build_facts() {
  return {
      {"torch", FUSED_RESNET_BUILD_TORCH},       {"cuda", FUSED_RESNET_BUILD_CUDA},
      {"cuda_archs", FUSED_RESNET_BUILD_ARCHS},  {"cuda_why_not", FUSED_RESNET_BUILD_CUDA_WHY},
      {"compiler", FUSED_RESNET_BUILD_COMPILER},
  };
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  FEATURE("avx2")
  FEATURE("fma")
  FEATURE("avx512f")
  FEATURE("avx512bw")
  FEATURE("avx512dq")
  FEATURE("avx512vl")
  FEATURE("avx512vnni")
  FEATURE("avx512bf16")
  FEATURE("amx-bf16")
#undef FEATURE
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts and processor features of fused_resnet.";
  module.def(
      "build_facts", &build_facts,
      "How this build was made: torch, cuda (empty: left out, see cuda_why_not), cuda_archs, "
      "compiler.");
  module.def("cpu_features", &cpu_features, "Vector extensions of this processor, by GCC's names.");
  module.def(
      "isa", &fused_resnet::cpu::isa,
      "The instruction set the CPU kernels run with: avx512bf16, avx512vnni, avx512, avx2 or "
      "generic.");
}
