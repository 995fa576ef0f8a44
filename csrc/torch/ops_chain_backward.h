// The backward of a whole chain in one op, as ops_chain.h has the forward.
#pragma once

#include "ops_chain.h"

namespace fused_resnet::glue {

// training_backward.Backward, method by method.
template <class Device>
struct ChainBackward {
  // Of a step: of its weight, gamma and beta.
  struct Gradients {
    MaybeTensor weight, gamma, beta;
  };
  struct Wanted {
    bool weight, gamma, beta;
    bool any() const { return weight || gamma || beta; }
  };
  // What the input of a step is made of.
  struct Source {
    Tensor x;
    MaybeTensor scale, shift;
  };

  std::vector<ChainStep> steps;
  size_t n;  // the last step but for the shortcut
  Tensor x;
  Tensors weights;
  std::vector<Kept> kept;
  std::vector<Wanted> wanted;
  std::vector<Gradients> gradients;
  bool need_x;

  bool is_shortcut(size_t i) const { return i > n; }

  // Whether the input of step i needs a gradient, or anything before it.
  bool reaches(size_t i) const {
    bool found = need_x;
    for (size_t j = 0; j < i && !is_shortcut(i); ++j) found = found || wanted[j].any();
    return found;
  }

  Source source(size_t i) const {
    if (i == 0 || is_shortcut(i)) return {x, {}, {}};
    return {*kept[i - 1].y, kept[i - 1].scale, kept[i - 1].shift};
  }

  static Tensor input(const Source& s) {
    return s.scale ? bn_act<Device>(s.x, *s.scale, *s.shift, {}, "relu") : s.x;
  }

  Tensor dgrad(const aten::Geometry& g, const Tensor& grad, const Tensor& weight,
               const Tensor& like, const MaybeTensor& added) const {
    const bool channels_last = any_channels_last(grad, weight);
    const Ints sizes{grad.size(0), weight.size(1) * g.groups, like.size(2), like.size(3)};
    const Tensor shaped = new_output(grad, sizes, channels_last);
    return joined(aten::convolution_backward(grad, shaped, weight, g, true, false)[0], grad, weight,
                  added);
  }

  static Tensor joined(const Tensor& dx, const Tensor& grad, const Tensor& weight,
                       const MaybeTensor& added) {
    const Tensor dense = laid_out(dx, grad, weight);
    if (!added) return dense;
    add_into<Device>(*added, dense);
    return *added;
  }

  static Tensor wgrad(const aten::Geometry& g, const Tensor& grad, const Tensor& weight,
                      const Tensor& x, const Tensor& z) {
    const Ints kernel{weight.size(2), weight.size(3)};
    return weight_gradient(grad, z, kernel, g, any_channels_last(x, grad));
  }

  // Through a convolution: the gradient of its input, and the weight's into `gradients`.
  MaybeTensor through(size_t i, const Tensor& dy, bool need_z, const MaybeTensor& added) {
    const aten::Geometry& g = steps[i].geometry;
    const Tensor& weight = weights[i];
    const Source from = source(i);
    if (wanted[i].weight && need_z) {
      const auto [dx, dw, none] =
          aten::convolution_backward(dy, input(from), weight, g, true, true);
      gradients[i].weight =
          aten::to(dw, accumulation_type(dw.scalar_type()), MemoryFormat::ChannelsLast);
      return joined(dx, dy, weight, added);
    }
    if (wanted[i].weight) gradients[i].weight = wgrad(g, dy, weight, from.x, input(from));
    if (!need_z) return std::nullopt;
    return dgrad(g, dy, weight, from.x, added);
  }

  // Through a step whose raw output was kept. `own`: g may be overwritten.
  MaybeTensor raw(size_t i, const Tensor& g, const MaybeTensor& out, const std::string& act,
                  bool own, const MaybeTensor& added = {}) {
    const Kept& k = kept[i];
    const bool batch = steps[i].batch, need_z = reaches(i);
    MaybeTensor sum_g, sum_gx, mean, invstd;
    if (batch || wanted[i].gamma || wanted[i].beta)
      std::tie(sum_g, sum_gx) =
          bn_act_backward_reduce<Device>(g, *k.y, out, *k.scale, *k.shift, *k.mean, *k.invstd, act);
    gradients[i] = {std::nullopt, sum_gx, sum_g};
    if (!need_z && !wanted[i].weight) return std::nullopt;
    if (batch) {
      mean = k.mean;
      invstd = k.invstd;
    } else {
      sum_g = sum_gx = std::nullopt;
    }
    const double count = batch ? values_per_channel(g) : 0.0;
    Tensor dy = g;
    if (own)
      bn_act_backward_<Device>(g, k.y, out, *k.scale, *k.shift, mean, invstd, sum_g, sum_gx, count,
                               act);
    else
      dy = bn_act_backward<Device>(g, k.y, out, *k.scale, *k.shift, mean, invstd, sum_g, sum_gx,
                                   count, act);
    return through(i, dy, need_z, added);
  }

  // What a product whose output was never made adds to its input's gradient: g times `scaled`, and
  // the centred input times `matrix`, plus `offset`.
  struct Product {
    Tensor scaled;
    MaybeTensor matrix, offset;
  };

  Product of_product(size_t i, const Tensor& sum_g, const MaybeTensor& s, double count,
                     bool need_z) {
    const Kept& k = kept[i];
    const Tensor& weight = weights[i];
    const ScalarType type = k.scale->scalar_type();
    Gradients& own = gradients[i];
    own.beta = sum_g;
    if (!steps[i].batch) {
      if (wanted[i].gamma) {
        const Tensor rows = aten::sum(aten::mul(aten::to(weight, type), *s), {1, 2, 3});
        own.gamma = aten::mul(*k.invstd, aten::sub(rows, aten::mul(*k.mean, sum_g)));
      }
      const Tensor scale = aten::spread(*k.scale, 0);
      if (wanted[i].weight) own.weight = aten::mul(scale, *s);
      return {aten::to(aten::mul(scale, weight), weight.scalar_type()), {}, {}};
    }
    const Tensor w = torch::stable::flatten(weight, 1, 3);
    const auto [dgamma, scaled_s, slopes, scaled] =
        gram_gradients<Device>(w, torch::stable::flatten(*s, 1, 3), *k.scale, *k.mean, *k.invstd,
                               sum_g, std::nullopt, count);
    own.gamma = dgamma;
    if (wanted[i].weight) {
      Ints strides(4);
      for (int64_t d = 0; d < 4; ++d) strides[d] = weight.stride(d);
      own.weight = aten::as_strided(by_transpose<Device>(slopes, *k.moments, scaled_s),
                                    sizes_of(weight), strides);
    }
    Product product{aten::as_weight(scaled), {}, {}};
    if (need_z) {
      Tensor rest = by_columns(aten::to(w, type), slopes);
      const int64_t channels = rest.size(0) - 1;
      const Tensor matrix = torch::stable::narrow(rest, 0, 0, channels);
      product.matrix = aten::to(matrix, weight.scalar_type());
      product.offset = torch::stable::select(rest, 0, channels);
    }
    return product;
  }

  // Through a convolution of z, whose output was never made.
  MaybeTensor linear(size_t i, const aten::Geometry& geometry, const Tensor& g, const Tensor& sum_g,
                     Tensor z, bool need_z, const MaybeTensor& added = {}) {
    const Kept& k = kept[i];
    if (k.center) {
      const Tensor one = aten::filled(z.size(1), 1, k.center->scalar_type(), z);
      z = bn_act<Device>(z, one, aten::unary("aten::neg", *k.center), {}, "none");
    }
    MaybeTensor s;
    if (steps[i].batch || wanted[i].weight || wanted[i].gamma)
      s = wgrad(geometry, g, weights[i], z, z);
    const Product p = of_product(i, sum_g, s, values_per_channel(g), need_z);
    if (!need_z) return std::nullopt;
    const Tensor dz = dgrad(geometry, g, p.scaled, z, added);
    if (!p.matrix) return dz;
    const Tensor one = aten::filled(dz.size(1), 1, accumulation_type(dz.scalar_type()), dz);
    return convolved<Device>(z, aten::as_weight(*p.matrix), {}, one, p.offset, dz);
  }

  // Through the shortcut; its gradient of x is added to dx.
  MaybeTensor through_shortcut(const Tensor& g, const Tensor& sum_g, MaybeTensor dx) {
    const size_t i = n + 1;
    const ChainStep& s = steps[i];
    if (kept[i].y) return raw(i, g, std::nullopt, "none", false, dx);
    if (!kept[i].center || s.geometry.stride == Ints{1, 1})
      return linear(i, s.geometry, g, sum_g, x, need_x, dx);
    // Only every stride-th position takes part.
    const Tensor part =
        torch::stable::contiguous(aten::every(x, s.geometry.stride), MemoryFormat::ChannelsLast);
    aten::Geometry dense = s.geometry;
    dense.stride = {1, 1};
    const MaybeTensor d = linear(i, dense, g, sum_g, part, need_x);
    if (!d) return dx;
    if (!dx) {
      dx = torch::stable::empty_like(x);
      torch::stable::zero_(*dx);
    }
    Tensor taking = aten::every(*dx, s.geometry.stride);
    torch::stable::copy_(taking, aten::add(taking, *d));
    return dx;
  }
};

// training_backward.Backward.walk. Returns the gradients of x and of the residual, and of each
// step's weight, gamma and beta; `wanted`: whether each of the latter is needed.
template <class Device>
MaybeTensors chain_backward(Tensor grad, Tensor x, Tensor out, Tensors weights, MaybeTensors kept,
                            Ints packed, Ints wanted, bool need_x, bool need_residual,
                            bool identity, bool shortcut, std::string act) {
  constexpr const char* kOp = "chain_backward";
  const size_t count = weights.size();
  check_count(kOp, "kept", kept.size(), Kept::kWidth * count);
  check_count(kOp, "wanted", wanted.size(), 3 * count);
  check_like_grad(kOp, "out", out, grad);
  check_sizes(kOp, "out", out, sizes_of(grad));
  const bool relu = act_of(kOp, act) == Act::relu;
  ChainBackward<Device> walk{
      chain_steps(kOp, packed, count), count - 1 - shortcut, x, weights, {}, {}, {}, need_x};
  for (size_t i = 0; i < count; ++i) {
    walk.kept.push_back(Kept::at(kept, i));
    walk.wanted.push_back({wanted[3 * i] != 0, wanted[3 * i + 1] != 0, wanted[3 * i + 2] != 0});
  }
  walk.gradients.resize(count);
  const size_t n = walk.n;
  // What an average pooling hands back is contiguous: everything behind it would be, too.
  grad = in_format(grad, suggests_channels_last(out));
  const bool raw_end = walk.kept[n].y.has_value();
  const bool apart = need_residual || identity || shortcut;
  Tensor g = grad, sum_g;
  if (apart || !raw_end) {
    if (relu)
      std::tie(g, sum_g) = relu_backward_reduce<Device>(grad, out);
    else
      sum_g = aten::sum(grad, {0, 2, 3}, walk.kept[0].scale->scalar_type());
  }
  MaybeTensor dz;
  if (!raw_end)
    dz = walk.linear(n, walk.steps[n].geometry, g, sum_g, walk.input(walk.source(n)),
                     walk.reaches(n));
  else if (apart)
    dz = walk.raw(n, g, std::nullopt, "none", false);
  else
    dz = walk.raw(n, grad, out, act, false);
  for (size_t i = n; dz && i-- > 0;) {
    MaybeTensor added;
    if (identity && i == 0) added = relu ? g : torch::stable::clone(g);
    dz = walk.raw(i, *dz, std::nullopt, "relu", true, added);
  }
  MaybeTensor dx = need_x ? dz : std::nullopt;
  if (identity && n == 0 && dx) add_into<Device>(*dx, g);
  if (shortcut && (need_x || walk.wanted[n + 1].any())) dx = walk.through_shortcut(g, sum_g, dx);
  MaybeTensors result{dx, need_residual ? MaybeTensor(g) : std::nullopt};
  for (const auto& own : walk.gradients)
    result.insert(result.end(), {own.weight, own.gamma, own.beta});
  return result;
}

}  // namespace fused_resnet::glue
