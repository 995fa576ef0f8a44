// The ops that training is made of, as ops.h has those of inference.
#pragma once

#include <tuple>

#include "checks.h"
#include "ops.h"

namespace fused_resnet::glue {

inline Tensor new_vector(const Tensor& like, int64_t n, ScalarType type) {
  return torch::stable::empty({n}, type, std::nullopt, like.device());
}

// Dense, of the given type.
inline Tensor converted(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return in_order(t);
  Tensor copy = torch::stable::empty(sizes_of(t), type, std::nullopt, t.device());
  torch::stable::copy_(copy, t);
  return copy;
}

// Checks a vector of one number per channel of x, in the type x is accumulated in.
inline Tensor channel_vector(const char* op, const char* argument, const Tensor& t,
                             const Tensor& x) {
  check_channels(op, argument, t, x.size(1), accumulation_type(x.scalar_type()), x);
  return in_order(t);
}

inline void check_like_grad(const char* op, const char* argument, const Tensor& t,
                            const Tensor& grad) {
  FR_CHECK(t.scalar_type() == grad.scalar_type(), op, ": ", argument, " must be ",
           name(grad.scalar_type()), " as grad is, got ", name(t.scalar_type()));
  FR_CHECK(t.is_cpu() == grad.is_cpu() && t.get_device() == grad.get_device(), op, ": ", argument,
           " must be on the device of grad");
}

template <class Args>
void set_extent(Args& args, const Tensor& x, bool channels_last) {
  const int64_t pixels = x.size(2) * x.size(3);
  args.channels = x.size(1);
  args.outer = channels_last ? x.size(0) * pixels : x.size(0);
  args.inner = channels_last ? 1 : pixels;
}

template <class Device>
std::tuple<Tensor, Tensor> bn_stats(Tensor x) {
  constexpr const char* kOp = "bn_stats";
  check_dim(kOp, "x", x, 4);
  BnStatsArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  const bool channels_last = suggests_channels_last(x);
  x = in_format(x, channels_last);
  Tensor mean = new_vector(x, x.size(1), accumulation_type(x.scalar_type()));
  Tensor m2 = torch::stable::empty_like(mean);
  set_extent(args, x, channels_last);
  args.x = x.const_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.m2 = m2.mutable_data_ptr();
  check_status(kOp, Device(x).launch(args));
  return {mean, m2};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bn_finalize(Tensor mean, Tensor m2, double count,
                                               MaybeTensor weight, MaybeTensor bias,
                                               MaybeTensor running_mean, MaybeTensor running_var,
                                               double momentum, double eps) {
  constexpr const char* kOp = "bn_finalize";
  check_dim(kOp, "mean", mean, 1);
  BnFinalizeArgs args{};
  args.dtype = dtype_of(kOp, "mean", mean);
  const ScalarType type = mean.scalar_type();
  check_accumulation(kOp, "mean", mean);
  FR_CHECK(count >= 0, kOp, ": count must be at least 0, got ", count);
  FR_CHECK(running_mean.has_value() == running_var.has_value(), kOp,
           ": running_mean and running_var must be given together, got one");
  const int64_t channels = mean.size(0);
  check_channels(kOp, "m2", m2, channels, type, mean);
  auto parameter = [&](const char* argument, MaybeTensor& t) {
    if (!t) return;
    dtype_of(kOp, argument, *t);
    check_channels(kOp, argument, *t, channels, t->scalar_type(), mean);
    t = converted(*t, type);
  };
  parameter("weight", weight);
  parameter("bias", bias);
  // Statistics that are not dense are updated in a copy and written back.
  MaybeTensor dense_mean, dense_var;
  if (running_mean) {
    args.running_dtype = dtype_of(kOp, "running_mean", *running_mean);
    check_channels(kOp, "running_mean", *running_mean, channels, running_mean->scalar_type(), mean);
    check_channels(kOp, "running_var", *running_var, channels, running_mean->scalar_type(), mean);
    dense_mean = in_order(*running_mean);
    dense_var = in_order(*running_var);
    args.running_mean = dense_mean->mutable_data_ptr();
    args.running_var = dense_var->mutable_data_ptr();
  }
  mean = in_order(mean);
  m2 = in_order(m2);
  Tensor scale = new_vector(mean, channels, type), shift = new_vector(mean, channels, type),
         invstd = new_vector(mean, channels, type);
  args.mean = mean.const_data_ptr();
  args.m2 = m2.const_data_ptr();
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  args.scale = scale.mutable_data_ptr();
  args.shift = shift.mutable_data_ptr();
  args.invstd = invstd.mutable_data_ptr();
  args.channels = channels;
  args.count = count;
  args.momentum = momentum;
  args.eps = eps;
  check_status(kOp, Device(mean).launch(args));
  if (running_mean) write_back(kOp, "running_mean", *running_mean, *dense_mean);
  if (running_var) write_back(kOp, "running_var", *running_var, *dense_var);
  return {scale, shift, invstd};
}

// The tensors of a MaskedGrad, checked and in one format.
struct MaskedGradTensors {
  Tensor grad;
  MaybeTensor x, out;
  Tensor scale, shift;

  MaskedGrad describe(const char* op, const std::string& act, bool channels_last) {
    check_dim(op, "grad", grad, 4);
    MaskedGrad args{};
    args.dtype = dtype_of(op, "grad", grad);
    args.act = act_of(op, act);
    auto like_grad = [&](const char* argument, MaybeTensor& t) {
      if (!t) return;
      check_like_grad(op, argument, *t, grad);
      check_sizes(op, argument, *t, sizes_of(grad));
      t = in_format(*t, channels_last);
    };
    like_grad("x", x);
    like_grad("out", out);
    FR_CHECK(x || out || args.act == Act::none, op,
             ": out must be given with act \"relu\" and without x, got neither");
    grad = in_format(grad, channels_last);
    scale = channel_vector(op, "scale", scale, grad);
    shift = channel_vector(op, "shift", shift, grad);
    args.grad = grad.const_data_ptr();
    args.x = pointer(x);
    args.out = pointer(out);
    args.scale = scale.const_data_ptr();
    args.shift = shift.const_data_ptr();
    set_extent(args, grad, channels_last);
    return args;
  }
};

template <class Device>
std::tuple<Tensor, Tensor> bn_act_backward_reduce(Tensor grad, Tensor x, MaybeTensor out,
                                                  Tensor scale, Tensor shift, Tensor mean,
                                                  Tensor invstd, std::string act) {
  constexpr const char* kOp = "bn_act_backward_reduce";
  MaskedGradTensors in{grad, x, out, scale, shift};
  BnActBackwardReduceArgs args{};
  args.in = in.describe(kOp, act, suggests_channels_last(x));
  mean = channel_vector(kOp, "mean", mean, in.grad);
  invstd = channel_vector(kOp, "invstd", invstd, in.grad);
  Tensor sum_g = torch::stable::empty_like(mean), sum_gx = torch::stable::empty_like(mean);
  args.mean = mean.const_data_ptr();
  args.invstd = invstd.const_data_ptr();
  args.sum_g = sum_g.mutable_data_ptr();
  args.sum_gx = sum_gx.mutable_data_ptr();
  check_status(kOp, Device(grad).launch(args));
  return {sum_g, sum_gx};
}

// The tensors of a BatchSums, checked.
struct BatchSumsTensors {
  MaybeTensor mean, invstd, sum_g, sum_gx;
  double count;

  BatchSums describe(const char* op, const MaybeTensor& x, const Tensor& grad) {
    const bool batch = sum_g.has_value();
    FR_CHECK(
        mean.has_value() == batch && invstd.has_value() == batch && sum_gx.has_value() == batch, op,
        ": mean, invstd, sum_g and sum_gx must be given together, got some");
    FR_CHECK(x || !batch, op, ": x must be given with sum_g, got none");
    FR_CHECK(batch ? count > 0 : count == 0, op, ": count must be ",
             batch ? "more than 0 with" : "0 without", " sum_g, got ", count);
    if (!batch) return {};
    mean = channel_vector(op, "mean", *mean, grad);
    invstd = channel_vector(op, "invstd", *invstd, grad);
    sum_g = channel_vector(op, "sum_g", *sum_g, grad);
    sum_gx = channel_vector(op, "sum_gx", *sum_gx, grad);
    return {pointer(mean), pointer(invstd), pointer(sum_g), pointer(sum_gx), count};
  }
};

template <class Device>
Tensor bn_act_backward(Tensor grad, MaybeTensor x, MaybeTensor out, Tensor scale, Tensor shift,
                       MaybeTensor mean, MaybeTensor invstd, MaybeTensor sum_g, MaybeTensor sum_gx,
                       double count, std::string act) {
  constexpr const char* kOp = "bn_act_backward";
  const bool channels_last = suggests_channels_last(x ? *x : grad);
  MaskedGradTensors in{grad, x, out, scale, shift};
  BatchSumsTensors batch{mean, invstd, sum_g, sum_gx, count};
  BnActBackwardArgs args{};
  args.in = in.describe(kOp, act, channels_last);
  args.batch = batch.describe(kOp, in.x, in.grad);
  Tensor dx = new_output(grad, sizes_of(grad), channels_last);
  args.dx = dx.mutable_data_ptr();
  check_status(kOp, Device(dx).launch(args));
  return dx;
}

template <class Device>
void bn_act_backward_(Tensor grad, MaybeTensor x, MaybeTensor out, Tensor scale, Tensor shift,
                      MaybeTensor mean, MaybeTensor invstd, MaybeTensor sum_g, MaybeTensor sum_gx,
                      double count, std::string act) {
  constexpr const char* kOp = "bn_act_backward_";
  MaskedGradTensors in{grad, x, out, scale, shift};
  BatchSumsTensors batch{mean, invstd, sum_g, sum_gx, count};
  BnActBackwardArgs args{};
  args.in = in.describe(kOp, act, suggests_channels_last(grad));
  args.batch = batch.describe(kOp, in.x, in.grad);
  // A gradient that is not dense is worked on in a copy and written back.
  args.dx = in.grad.mutable_data_ptr();
  check_status(kOp, Device(grad).launch(args));
  write_back(kOp, "grad", grad, in.grad);
}

template <class Device>
std::tuple<Tensor, Tensor> relu_backward_reduce(Tensor grad, Tensor out) {
  constexpr const char* kOp = "relu_backward_reduce";
  check_dim(kOp, "grad", grad, 4);
  ReluBackwardReduceArgs args{};
  args.in.dtype = dtype_of(kOp, "grad", grad);
  args.in.act = Act::relu;
  check_like_grad(kOp, "out", out, grad);
  check_sizes(kOp, "out", out, sizes_of(grad));
  const bool channels_last = suggests_channels_last(grad);
  grad = in_format(grad, channels_last);
  out = in_format(out, channels_last);
  Tensor g = new_output(grad, sizes_of(grad), channels_last);
  Tensor sum_g = new_vector(grad, grad.size(1), accumulation_type(grad.scalar_type()));
  set_extent(args.in, grad, channels_last);
  args.in.grad = grad.const_data_ptr();
  args.in.out = out.const_data_ptr();
  args.g = g.mutable_data_ptr();
  args.sum_g = sum_g.mutable_data_ptr();
  check_status(kOp, Device(g).launch(args));
  return {g, sum_g};
}

template <class Device>
std::tuple<Tensor, Tensor> bn_act_gram(Tensor x, MaybeTensor scale, MaybeTensor shift,
                                       Tensor center, std::string act, int64_t stride) {
  constexpr const char* kOp = "bn_act_gram";
  check_dim(kOp, "x", x, 4);
  BnActGramArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  FR_CHECK(stride >= 1, kOp, ": stride must be at least 1, got ", stride);
  FR_CHECK(scale.has_value() == shift.has_value(), kOp,
           ": scale and shift must be given together, got one");
  if (scale) {
    scale = channel_vector(kOp, "scale", *scale, x);
    shift = channel_vector(kOp, "shift", *shift, x);
  }
  center = channel_vector(kOp, "center", center, x);
  x = in_format(x, true);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.stride = stride;
  Tensor gram = torch::stable::empty({args.channels, args.channels}, ScalarType::Double,
                                     std::nullopt, x.device());
  Tensor sum = new_vector(x, args.channels, ScalarType::Double);
  args.x = x.const_data_ptr();
  args.scale = pointer(scale);
  args.shift = pointer(shift);
  args.center = center.const_data_ptr();
  args.gram = gram.mutable_data_ptr();
  args.sum = sum.mutable_data_ptr();
  check_status(kOp, Device(x).launch(args));
  return {gram, sum};
}

template <class Device>
std::vector<Tensor> eltwise_act_backward(Tensor grad, std::vector<Tensor> inputs, MaybeTensor out,
                                         std::string op, std::optional<std::vector<double>> coeff,
                                         std::string act) {
  constexpr const char* kOp = "eltwise_act_backward";
  EltwiseActBackwardArgs args{};
  args.dtype = dtype_of(kOp, "grad", grad);
  args.act = act_of(kOp, act);
  args.op = eltwise_op_of(kOp, inputs.size(), op, coeff);
  FR_CHECK(out || args.act == Act::none, kOp, ": out must be given with act \"relu\", got none");
  for (const Tensor& t : inputs) {
    check_like_grad(kOp, "every input", t, grad);
    check_sizes(kOp, "every input", t, sizes_of(grad));
  }
  // All in the layout the forward's output has.
  const Tensor layout = torch::stable::empty_like(inputs[0]);
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<Tensor> grads;
  for (Tensor& t : inputs) {
    t = laid_out_as(t, layout);
    grads.push_back(torch::stable::empty_like(layout));
    from.push_back(t.const_data_ptr());
    to.push_back(grads.back().mutable_data_ptr());
  }
  grad = laid_out_as(grad, layout);
  if (out) {
    check_like_grad(kOp, "out", *out, grad);
    check_sizes(kOp, "out", *out, sizes_of(grad));
    out = laid_out_as(*out, layout);
  }
  args.count = static_cast<int>(inputs.size());
  args.grad = grad.const_data_ptr();
  args.out = pointer(out);
  args.inputs = from.data();
  args.coeff = coeff ? coeff->data() : nullptr;
  args.grads = to.data();
  args.numel = grad.numel();
  check_status(kOp, Device(grad).launch(args));
  return grads;
}

}  // namespace fused_resnet::glue
