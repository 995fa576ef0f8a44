// Argument checks and layouts shared by every op, on every device. A message reads
// "op: argument must be ..., got ...".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels/api.h"

namespace fused_resnet::glue {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

#define FR_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline Ints sizes_of(const Tensor& t) {
  Ints sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

inline std::string text(const Ints& values) {
  std::string s = "[";
  for (size_t i = 0; i < values.size(); ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s + "]";
}

inline const char* name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    default:
      return "a type that is not floating point";
  }
}

inline DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      FR_CHECK(false, op, ": ", argument, " must be float32, float64, bfloat16 or float16, got ",
               name(t.scalar_type()));
  }
  return DType::f32;
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return ScalarType::Double;
    case DType::bf16:
      return ScalarType::BFloat16;
    case DType::f16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

inline Act act_of(const char* op, const std::string& act) {
  FR_CHECK(act == "none" || act == "relu", op, ": act must be \"none\" or \"relu\", got \"", act,
           "\"");
  return act == "relu" ? Act::relu : Act::none;
}

// The type scale and shift have for activations of type t.
inline ScalarType accumulation_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a type that others are accumulated in.
inline void check_accumulation(const char* op, const char* argument, const Tensor& t) {
  FR_CHECK(t.scalar_type() == accumulation_type(t.scalar_type()), op, ": ", argument,
           " must be float32 or float64, got ", name(t.scalar_type()));
}

inline void check_dim(const char* op, const char* argument, const Tensor& t, int64_t dim) {
  FR_CHECK(t.dim() == dim, op, ": ", argument, " must have ", dim, " dimensions, got ", t.dim(),
           " in ", text(sizes_of(t)));
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  FR_CHECK(t.is_cpu() == x.is_cpu() && t.get_device() == x.get_device(), op, ": ", argument,
           " must be on the device of x");
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  FR_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", argument, " must be ",
           name(x.scalar_type()), " as x is, got ", name(t.scalar_type()));
  check_device(op, argument, t, x);
}

inline void check_sizes(const char* op, const char* argument, const Tensor& t, const Ints& sizes) {
  FR_CHECK(sizes_of(t) == sizes, op, ": ", argument, " must have shape ", text(sizes), ", got ",
           text(sizes_of(t)));
}

// Back to an argument that is written goes what was worked on in its place: itself if it is dense,
// else a copy. Torch's own message about elements that share a place is lost before torch 2.15.
inline void write_back(const char* op, const char* argument, Tensor t, const Tensor& dense) {
  if (t.const_data_ptr() == dense.const_data_ptr()) return;
  for (int64_t d = 0; d < t.dim(); ++d)
    FR_CHECK(
        t.numel() == 0 || t.size(d) <= 1 || t.stride(d) != 0, op, ": ", argument,
        " must not have elements that share a single memory location, as an expanded tensor of "
        "shape ",
        text(sizes_of(t)), " has");
  torch::stable::copy_(t, dense);
}

inline void check_type(const char* op, const char* argument, const Tensor& t, ScalarType type) {
  FR_CHECK(t.scalar_type() == type, op, ": ", argument, " must be ", name(type), ", got ",
           name(t.scalar_type()));
}

inline void check_channels(const char* op, const char* argument, const Tensor& t, int64_t channels,
                           ScalarType type, const Tensor& x) {
  check_type(op, argument, t, type);
  check_device(op, argument, t, x);
  check_sizes(op, argument, t, {channels});
}

inline void check_pair(const char* op, const char* argument, const Ints& pair, int64_t least) {
  FR_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", argument,
           " must be two integers of at least ", least, ", got ", text(pair));
}

// Whether torch reads a 4-D tensor's strides as channels_last; contiguous where both would do.
inline bool suggests_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Whether t is dense in the format; asking torch would cost a dispatch.
inline bool is_in_format(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const bool image = channels_last && t.dim() == 4;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    const int64_t d = !image ? i : i == 3 ? 1 : i == 0 ? 0 : i + 1;
    if (t.size(d) == 0) return true;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline Tensor in_format(const Tensor& t, bool channels_last) {
  return is_in_format(t, channels_last) ? t
                                        : torch::stable::contiguous(t, format_of(channels_last));
}

inline Tensor in_order(const Tensor& t) { return in_format(t, false); }

inline MaybeTensor in_format(const MaybeTensor& t, bool channels_last) {
  if (!t) return std::nullopt;
  return in_format(*t, channels_last);
}

inline Tensor new_output(const Tensor& like, const Ints& sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format_of(channels_last));
}

inline const void* pointer(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline void check_status(const char* op, Status status) {
  FR_CHECK(status != Status::out_of_memory, op, ": out of memory for the kernel's workspace");
  FR_CHECK(status == Status::ok, op, ": the kernel did not run (status ", static_cast<int>(status),
           ")");
}

}  // namespace fused_resnet::glue
