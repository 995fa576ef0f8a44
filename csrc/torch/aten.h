// torch's own ops that a chain of ours is made of besides, through the stable ABI: the dispatcher
// takes no Scalar from there, hence no in-place addition and no addition of a number.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace fused_resnet::glue::aten {

template <size_t results, class... Args>
auto call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  static_assert(results <= sizeof...(Args), "results come back in the arguments' place");
  FR_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS,
           "torch could not run ", op);
  std::array<Tensor, results> found;
  for (size_t i = 0; i < results; ++i) found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return found;
}

// Of a convolution, each of its pairs as the ops take them.
struct Geometry {
  Ints stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
};

inline Tensor convolution(const Tensor& x, const Tensor& weight, const Geometry& g) {
  return call<1>("aten::convolution", "", x, weight, std::nullopt, g.stride, g.padding, g.dilation,
                 false, Ints{0, 0}, g.groups)[0];
}

// The gradients of x and of the weight; what is not wanted is undefined.
inline std::array<Tensor, 3> convolution_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& weight, const Geometry& g,
                                                  bool of_x, bool of_weight) {
  const std::array<bool, 3> wanted{of_x, of_weight, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  return call<3>("aten::convolution_backward", "", grad, x, weight, std::nullopt, g.stride,
                 g.padding, g.dilation, false, Ints{0, 0}, g.groups, mask);
}

inline Tensor to(const Tensor& t, ScalarType type,
                 std::optional<MemoryFormat> format = std::nullopt) {
  if (t.scalar_type() == type && !format) return t;
  return call<1>("aten::to", "dtype", t, type, false, false, format)[0];
}

inline Tensor mul(const Tensor& a, const Tensor& b) {
  return call<1>("aten::mul", "Tensor", a, b)[0];
}

inline Tensor div(const Tensor& a, const Tensor& b) {
  return call<1>("aten::div", "Tensor", a, b)[0];
}

inline Tensor sub(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b); }
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// A number that takes the type, and the place, of the tensors it meets.
inline Tensor number(double value) { return torch::stable::full({}, value, ScalarType::Double); }

inline Tensor filled(int64_t n, double value, ScalarType type, const Tensor& like) {
  return torch::stable::full({n}, value, type, std::nullopt, like.device());
}

inline Tensor sum(const Tensor& t, const Ints& dims,
                  std::optional<ScalarType> type = std::nullopt) {
  return call<1>("aten::sum", "dim_IntList", t, std::optional<Ints>(dims), false, type)[0];
}

inline Tensor where(const Tensor& condition, const Tensor& yes, const Tensor& no) {
  return call<1>("aten::where", "self", condition, yes, no)[0];
}

inline Tensor nan_to_zero(const Tensor& t) {
  const std::optional<double> zero = 0.0;
  return call<1>("aten::nan_to_num", "", t, zero, zero, zero)[0];
}

inline Tensor unary(const char* op, const Tensor& t) { return call<1>(op, "", t)[0]; }

// Every stride-th position of an image, as a view.
inline Tensor every(const Tensor& x, const Ints& stride) {
  const std::optional<int64_t> open;
  const Tensor rows = call<1>("aten::slice", "Tensor", x, int64_t{2}, open, open, stride[0])[0];
  return call<1>("aten::slice", "Tensor", rows, int64_t{3}, open, open, stride[1])[0];
}

// A view that begins where t does.
inline Tensor as_strided(const Tensor& t, const Ints& sizes, const Ints& strides) {
  AtenTensorHandle view = nullptr;
  const auto dim = static_cast<int64_t>(sizes.size());
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), dim, sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// A matrix as the weight of a 1x1 convolution.
inline Tensor as_weight(const Tensor& m) {
  return as_strided(m, {m.size(0), m.size(1), 1, 1}, {m.stride(0), m.stride(1), 1, 1});
}

// A vector of one number per channel, to be spread over an image or a weight along `dim`.
inline Tensor spread(const Tensor& v, int64_t dim) {
  Ints sizes{1, 1, 1, 1}, strides(4, 1);
  sizes[dim] = v.size(0);
  strides[dim] = v.stride(0);
  return as_strided(v, sizes, strides);
}

}  // namespace fused_resnet::glue::aten
