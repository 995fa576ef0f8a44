// Declares every op in two namespaces: fused_resnet, implemented by the C++ engine (ops_cpu.cpp,
// ops_cuda.cpp), and fused_resnet_triton, implemented by the Triton package. Both share the fake
// kernels of fused_resnet/native.py, so shapes and strides are a contract of every engine.
#include "schema.h"

STABLE_TORCH_LIBRARY(fused_resnet, library) { fused_resnet::glue::declare(library); }
STABLE_TORCH_LIBRARY(fused_resnet_triton, library) { fused_resnet::glue::declare(library); }
