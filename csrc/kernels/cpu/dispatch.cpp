// Picks, once a process, the instruction set whose build of the kernels runs.
#include <cstdlib>
#include <cstring>

#include "../api_int8.h"
#include "../api_winograd.h"

namespace fused_resnet::cpu {

#define DECLARE_ISA(name)                                        \
  namespace name {                                               \
  FUSED_RESNET_OPS(FUSED_RESNET_ON_POOL)                         \
  FUSED_RESNET_INT8_OPS(FUSED_RESNET_ON_POOL)                    \
  FUSED_RESNET_WINOGRAD_OPS(FUSED_RESNET_ON_POOL)                \
  int64_t conv_packed_size(DType dtype, const ConvShape& shape); \
  DType conv_packed_dtype(DType dtype);                          \
  int64_t conv_int8_packed_size(const ConvShape& shape);         \
  }

DECLARE_ISA(generic)
#if defined(FUSED_RESNET_HAVE_X86)
DECLARE_ISA(avx2)
DECLARE_ISA(avx512)
DECLARE_ISA(avx512vnni)  // has the ops of bytes alone
DECLARE_ISA(avx512bf16)
#endif

namespace {

enum class Isa { generic, avx2, avx512, avx512vnni, avx512bf16 };
constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512vnni", "avx512bf16"};

Isa choose() {
  Isa best = Isa::generic;
#if defined(FUSED_RESNET_HAVE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512vnni")) best = Isa::avx512vnni;
  if (best == Isa::avx512vnni && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512bf16;
#endif
  // A wish above what the processor has is not granted: it would crash.
  if (const char* wish = std::getenv("FUSED_RESNET_ISA"))
    for (int i = 0; i < static_cast<int>(best); ++i)
      if (std::strcmp(wish, kNames[i]) == 0) return static_cast<Isa>(i);
  return best;
}

Isa active() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa() { return kNames[static_cast<int>(active())]; }

#if defined(FUSED_RESNET_HAVE_X86)
#define CALL_WITH(vnni, ...)          \
  switch (active()) {                 \
    case Isa::avx512bf16:             \
      return avx512bf16::__VA_ARGS__; \
    case Isa::avx512vnni:             \
      return vnni::__VA_ARGS__;       \
    case Isa::avx512:                 \
      return avx512::__VA_ARGS__;     \
    case Isa::avx2:                   \
      return avx2::__VA_ARGS__;       \
    default:                          \
      return generic::__VA_ARGS__;    \
  }
#else
#define CALL_WITH(vnni, ...) return generic::__VA_ARGS__;
#endif
#define CALL(...) CALL_WITH(avx512, __VA_ARGS__)

#define FORWARD(op, Args) \
  Status op(const Args& args, const Pool& pool) { CALL(op(args, pool)) }
#define FORWARD_BYTES(op, Args) \
  Status op(const Args& args, const Pool& pool) { CALL_WITH(avx512vnni, op(args, pool)) }

FUSED_RESNET_OPS(FORWARD)
FORWARD(quantize, QuantizeArgs)
FUSED_RESNET_BYTE_OPS(FORWARD_BYTES)
FUSED_RESNET_WINOGRAD_OPS(FORWARD)

int64_t conv_packed_size(DType dtype,
                         const ConvShape& shape){CALL(conv_packed_size(dtype, shape))} DType
    conv_packed_dtype(DType dtype){CALL(conv_packed_dtype(dtype))} int64_t
    conv_int8_packed_size(const ConvShape& shape) {
  CALL_WITH(avx512vnni, conv_int8_packed_size(shape))
}

}  // namespace fused_resnet::cpu
