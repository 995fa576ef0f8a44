// Every kernel file is compiled once per instruction set, into a namespace of that name. Everything
// a kernel needs is inline and inside that namespace, so that the linker cannot hand one
// instruction set's code to another. For the same reason the kernels use no templates of the
// standard library.
#pragma once

#include "../api_int8.h"
#include "../api_winograd.h"

#define FR_NAMESPACE_BEGIN namespace fused_resnet::cpu::FUSED_RESNET_ISA {
#define FR_NAMESPACE_END }

#define FR_AS_STRING(x) #x
#define FR_STRING(x) FR_AS_STRING(x)

FR_NAMESPACE_BEGIN
FUSED_RESNET_OPS(FUSED_RESNET_ON_POOL)
FUSED_RESNET_INT8_OPS(FUSED_RESNET_ON_POOL)
FUSED_RESNET_WINOGRAD_OPS(FUSED_RESNET_ON_POOL)
int64_t conv_packed_size(DType dtype, const ConvShape& shape);
DType conv_packed_dtype(DType dtype);
int64_t conv_int8_packed_size(const ConvShape& shape);
FR_NAMESPACE_END
