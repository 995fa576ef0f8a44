// A whole chain of convolutions and BatchNorms in one op, on torch's convolutions: what training.py
// does op by op, which for small images takes a GPU's host longer than the GPU. The same ops in the
// same order, so that the results are the same to the bit. Here: what both ways share, and forward.
#pragma once

#include "aten.h"
#include "ops_training.h"
#include "ops_training_gram.h"

namespace fused_resnet::glue {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// A step, of the nine integers that native_chain.py's pack() makes of it.
struct ChainStep {
  aten::Geometry geometry;
  bool batch;  // statistics of the batch, else the running ones
  bool keeps;  // keeps its raw output, else takes its statistics from its input's Gram matrix
};

inline std::vector<ChainStep> chain_steps(const char* op, const Ints& packed, size_t weights) {
  constexpr size_t kWidth = 9;
  FR_CHECK(weights > 0 && packed.size() == kWidth * weights, op, ": steps must hold ", kWidth,
           " integers for each of one or more weights, got ", packed.size(), " for ", weights);
  std::vector<ChainStep> steps;
  for (auto p = packed.begin(); p != packed.end(); p += kWidth)
    steps.push_back({{{p[0], p[1]}, {p[2], p[3]}, {p[4], p[5]}, p[6]}, p[7] != 0, p[8] != 0});
  return steps;
}

inline void check_count(const char* op, const char* argument, size_t got, size_t expected) {
  FR_CHECK(got == expected, op, ": ", argument, " must hold ", expected, " values, got ", got);
}

// The tensors of plan.Kept, in its order.
struct Kept {
  static constexpr size_t kWidth = 8;
  MaybeTensor y, scale, shift, mean, invstd, weight, center, moments;

  void append_to(MaybeTensors& list) const {
    list.insert(list.end(), {y, scale, shift, mean, invstd, weight, center, moments});
  }
  static Kept at(const MaybeTensors& list, size_t step) {
    const MaybeTensor* p = list.data() + kWidth * step;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  }
};

inline bool any_channels_last(const Tensor& a, const Tensor& b) {
  return suggests_channels_last(a) || suggests_channels_last(b);
}

// A convolution's result in the format of every engine; torch's of float64 on CUDA has not.
inline Tensor laid_out(const Tensor& y, const Tensor& a, const Tensor& b) {
  return y.scalar_type() == ScalarType::Double ? in_format(y, any_channels_last(a, b)) : y;
}

inline double values_per_channel(const Tensor& y) {
  return y.size(1) ? static_cast<double>(y.numel() / y.size(1)) : 0.0;
}

// t + other, in place; t is dense.
template <class Device>
void add_into(Tensor t, const Tensor& other) {
  const Tensor like = laid_out_as(other, t);
  const void* inputs[] = {t.const_data_ptr(), like.const_data_ptr()};
  EltwiseActArgs args{};
  args.dtype = dtype_of("chain_backward", "grad", t);
  args.op = EltwiseOp::sum;
  args.act = Act::none;
  args.inputs = inputs;
  args.count = 2;
  args.out = t.mutable_data_ptr();
  args.numel = t.numel();
  check_status("chain_backward", Device(t).launch(args));
}

// vendor.conv_bn_act; without scale: the convolution alone.
template <class Device>
Tensor convolved(const Tensor& x, const Tensor& weight, const aten::Geometry& geometry,
                 const MaybeTensor& scale = {}, const MaybeTensor& shift = {},
                 const MaybeTensor& residual = {}, const std::string& act = "none") {
  const Tensor y = laid_out(aten::convolution(x, weight, geometry), x, weight);
  if (scale) bn_act_<Device>(y, *scale, *shift, residual, act);
  return y;
}

// moments.py says of these two why they are convolutions on a CPU.
inline Tensor as_image(const Tensor& matrix) {
  const Tensor m = in_order(matrix);
  const int64_t rows = m.size(0), columns = m.size(1);
  return aten::as_strided(m, {1, columns, 1, rows}, {rows * columns, 1, rows * columns, columns});
}

// a @ b.T + added
template <class Device>
Tensor by_transpose(const Tensor& a, const Tensor& b, const MaybeTensor& added = {}) {
  if (!a.is_cpu()) {
    const Tensor product = torch::stable::matmul(a, torch::stable::transpose(b, 0, 1));
    if (added) add_into<Device>(product, *added);
    return product;
  }
  MaybeTensor one, zero, residual;
  if (added) {
    const ScalarType type = accumulation_type(a.scalar_type());
    one = aten::filled(b.size(0), 1, type, a);
    zero = aten::filled(b.size(0), 0, type, a);
    residual = as_image(*added);
  }
  const Tensor y = convolved<Device>(as_image(a), aten::as_weight(b), {}, one, zero, residual);
  return aten::as_strided(y, {a.size(0), b.size(0)}, {y.stride(3), y.stride(1)});
}

// vendor.conv_wgrad of an input x, given as it is: of the weight, only its shape and layout count.
inline Tensor weight_gradient(const Tensor& grad, const Tensor& x, const Ints& kernel,
                              const aten::Geometry& g, bool channels_last) {
  const Tensor weight =
      new_output(x, {grad.size(1), x.size(1) / g.groups, kernel[0], kernel[1]}, channels_last);
  const Tensor dw = aten::convolution_backward(grad, x, weight, g, false, true)[1];
  return aten::to(dw, accumulation_type(dw.scalar_type()), MemoryFormat::ChannelsLast);
}

// b.T @ a
inline Tensor by_columns(const Tensor& a, const Tensor& b) {
  if (!a.is_cpu()) return torch::stable::matmul(torch::stable::transpose(b, 0, 1), a);
  const Tensor grad = as_image(b), x = as_image(a);
  const Tensor product = weight_gradient(grad, x, {1, 1}, {}, any_channels_last(x, grad));
  return torch::stable::flatten(product, 1, 3);
}

// The tensors of a step's BatchNorm, as plan.Params has them.
struct ChainNorm {
  MaybeTensor gamma, beta, running_mean, running_var;
  double eps, momentum;
};

// training._fixed; the mean is a copy, as no op returns what it was given.
inline void set_fixed(Kept& k, const ChainNorm& n) {
  FR_CHECK(n.running_mean && n.running_var,
           "chain_forward: running must hold mean and variance of a step without batch statistics,"
           " got none");
  const ScalarType type = accumulation_type(n.running_mean->scalar_type());
  const Tensor mean = aten::to(*n.running_mean, type);
  const Tensor invstd =
      aten::unary("aten::rsqrt", aten::sub(aten::to(*n.running_var, type), aten::number(-n.eps)));
  const Tensor scale = n.gamma ? aten::mul(aten::to(*n.gamma, type), invstd) : invstd;
  const Tensor shift = aten::mul(aten::unary("aten::neg", mean), scale);
  k.scale = scale;
  k.shift = n.beta ? aten::add(shift, aten::to(*n.beta, type)) : shift;
  k.mean = torch::stable::clone(mean);
  k.invstd = invstd;
}

// training._finalize
template <class Device>
void set_of_batch(Kept& k, const ChainNorm& n, const Tensor& mean, const Tensor& m2, double count,
                  const Tensor& about) {
  std::tie(k.scale, k.shift, k.invstd) = bn_finalize<Device>(
      mean, m2, count, n.gamma, n.beta, n.running_mean, n.running_var, n.momentum, n.eps);
  k.mean = about;
}

// training._centre; `before`: the BatchNorm, with ReLU, that z comes from, if it does.
template <class Device>
Tensor gram_centre(const ChainNorm* before, Tensor z) {
  const ScalarType type = accumulation_type(z.scalar_type());
  const bool half = type != z.scalar_type();
  if (before && !before->beta) return aten::filled(z.size(1), 0, type, z);
  Tensor mean;
  MaybeTensor deviation;
  if (before) {
    mean = aten::unary("aten::relu", *before->beta);
    if (half)
      deviation = before->gamma ? aten::unary("aten::abs", *before->gamma)
                                : aten::filled(z.size(1), 1, mean.scalar_type(), z);
  } else {
    const Tensor image = torch::stable::narrow(z, 0, 0, z.size(0) ? 1 : 0);
    Tensor m2;
    std::tie(mean, m2) = bn_stats<Device>(image);
    const double count = std::max(1.0, values_per_channel(image));
    if (half) deviation = aten::unary("aten::sqrt", aten::div(m2, aten::number(count)));
  }
  if (half) {
    const Tensor twice = aten::add(*deviation, *deviation);
    const auto far = aten::call<1>("aten::gt", "Tensor", mean, twice)[0];
    const Tensor zero = torch::stable::full({}, 0, mean.scalar_type(), std::nullopt, z.device());
    mean = aten::where(far, mean, zero);
  }
  return aten::to(aten::to(aten::nan_to_zero(mean), ScalarType::BFloat16), type);
}

// training._end where no raw output is kept, but for the product itself.
template <class Device>
void set_of_product(Kept& k, const ChainStep& s, const ChainNorm& n, const Tensor& weight,
                    const Tensor& z, const MaybeTensor& scale, const MaybeTensor& shift,
                    const Tensor& centre, const std::string& act) {
  const int64_t stride = s.geometry.stride[0];
  auto every = [&](int64_t size) { return (size + stride - 1) / stride; };
  const double count = static_cast<double>(z.size(0) * every(z.size(2)) * every(z.size(3)));
  const auto [gram, sum] = bn_act_gram<Device>(z, scale, shift, centre, act, stride);
  const auto [covariance, moments] = gram_moments<Device>(gram, sum, centre, count);
  const Tensor w = torch::stable::flatten(weight, 1, 3);
  const Tensor product = by_transpose<Device>(aten::to(w, centre.scalar_type()), covariance);
  const auto [mean, about, m2] = gram_stats<Device>(w, product, sum, centre, count);
  set_of_batch<Device>(k, n, mean, m2, count, about);
  k.center = centre;
  k.moments = moments;
}

// training.Chain.forward. Returns the chain's output and what is kept of each step.
template <class Device>
MaybeTensors chain_forward(Tensor x, MaybeTensor residual, MaybeTensors parameters,
                           MaybeTensors running, Ints packed, std::vector<double> eps,
                           std::vector<double> momentum, bool identity, bool shortcut,
                           std::string act) {
  constexpr const char* kOp = "chain_forward";
  check_dim(kOp, "x", x, 4);
  act_of(kOp, act);
  const size_t count = eps.size();
  const std::vector<ChainStep> steps = chain_steps(kOp, packed, count);
  check_count(kOp, "parameters", parameters.size(), 3 * count);
  check_count(kOp, "running", running.size(), 2 * count);
  check_count(kOp, "momentum", momentum.size(), count);
  FR_CHECK(!shortcut || (count > 1 && !identity && !residual), kOp,
           ": shortcut must be the last of several steps, in place of a residual");
  std::vector<ChainNorm> norms;
  std::vector<Kept> kept(count);
  Tensors weights;
  for (size_t i = 0; i < count; ++i) {
    const MaybeTensor& weight = parameters[3 * i];
    FR_CHECK(weight, kOp, ": parameters must hold a weight for every step, got none");
    check_dim(kOp, "weight", *weight, 4);
    norms.push_back({parameters[3 * i + 1], parameters[3 * i + 2], running[2 * i],
                     running[2 * i + 1], eps[i], momentum[i]});
    weights.push_back(aten::to(*weight, x.scalar_type()));
    if (weight->scalar_type() != x.scalar_type()) kept[i].weight = weights[i];
  }
  // The result of a step before its normalisation, where that is made.
  auto measure = [&](size_t i, const Tensor& z, const ChainNorm* before, const Kept* raw) {
    const ChainStep& s = steps[i];
    Kept& k = kept[i];
    if (s.keeps) k.y = aten::convolution(z, weights[i], s.geometry);
    if (!s.batch) {
      set_fixed(k, norms[i]);
    } else if (s.keeps) {
      const auto [mean, m2] = bn_stats<Device>(*k.y);
      set_of_batch<Device>(k, norms[i], mean, m2, values_per_channel(*k.y), mean);
    } else {
      const Tensor centre = gram_centre<Device>(before, z);
      if (raw)
        set_of_product<Device>(k, s, norms[i], weights[i], *raw->y, raw->scale, raw->shift, centre,
                               "relu");
      else
        set_of_product<Device>(k, s, norms[i], weights[i], z, {}, {}, centre, "none");
    }
  };
  auto normalised = [&](size_t i, const Tensor& z, const MaybeTensor& added,
                        const std::string& last) {
    const Kept& k = kept[i];
    if (k.y) return bn_act<Device>(*k.y, *k.scale, *k.shift, added, last);
    return convolved<Device>(z, weights[i], steps[i].geometry, k.scale, k.shift, added, last);
  };
  const size_t n = count - 1 - shortcut;
  Tensor z = x;
  for (size_t i = 0; i <= n; ++i) {
    FR_CHECK(steps[i].keeps || i == n, kOp, ": only a step that ends the chain keeps no output");
    if (i) z = normalised(i - 1, z, {}, "relu");
    measure(i, z, i ? &norms[i - 1] : nullptr, i ? &kept[i - 1] : nullptr);
  }
  if (shortcut) {
    measure(count - 1, x, nullptr, nullptr);
    residual = normalised(count - 1, x, {}, "none");
  } else if (identity) {
    residual = x;
  }
  MaybeTensors result{normalised(n, z, residual, act)};
  for (const Kept& k : kept) k.append_to(result);
  return result;
}

}  // namespace fused_resnet::glue
