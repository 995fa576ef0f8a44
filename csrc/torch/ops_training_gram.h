// The ops between bn_act_gram and the statistics, or the gradients, of a product with its input.
#pragma once

#include <tuple>

#include "ops_training.h"

namespace fused_resnet::glue {

template <class Device>
std::tuple<Tensor, Tensor> gram_moments(Tensor gram, Tensor sum, Tensor center, double count) {
  constexpr const char* kOp = "gram_moments";
  check_dim(kOp, "center", center, 1);
  GramMomentsArgs args{};
  args.dtype = dtype_of(kOp, "center", center);
  const ScalarType type = center.scalar_type();
  check_accumulation(kOp, "center", center);
  const int64_t channels = center.size(0);
  check_type(kOp, "gram", gram, ScalarType::Double);
  check_sizes(kOp, "gram", gram, {channels, channels});
  check_channels(kOp, "sum", sum, channels, ScalarType::Double, gram);
  gram = in_order(gram);
  sum = in_order(sum);
  Tensor covariance = torch::stable::empty({channels, channels}, type, std::nullopt, gram.device());
  Tensor moments =
      torch::stable::empty({channels, channels + 1}, type, std::nullopt, gram.device());
  args.gram = static_cast<const double*>(gram.const_data_ptr());
  args.sum = static_cast<const double*>(sum.const_data_ptr());
  args.covariance = covariance.mutable_data_ptr();
  args.moments = moments.mutable_data_ptr();
  args.channels = channels;
  args.count = count;
  check_status(kOp, Device(gram).launch(args));
  return {covariance, moments};
}

// A matrix of weight's sizes in the type weight is accumulated in, in order.
inline Tensor beside_weight(const char* op, const char* argument, const Tensor& t,
                            const Tensor& weight) {
  check_type(op, argument, t, accumulation_type(weight.scalar_type()));
  FR_CHECK(t.is_cpu() == weight.is_cpu() && t.get_device() == weight.get_device(), op, ": ",
           argument, " must be on the device of weight");
  check_sizes(op, argument, t, sizes_of(weight));
  return in_order(t);
}

// What the ops of a product say of its weight. Returns the type it is accumulated in.
template <class Args>
ScalarType set_weight(const char* op, const Tensor& weight, double count, Args& args) {
  check_dim(op, "weight", weight, 2);
  args.dtype = dtype_of(op, "weight", weight);
  args.rows = weight.size(0);
  args.channels = weight.size(1);
  args.count = count;
  return accumulation_type(weight.scalar_type());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gram_stats(Tensor weight, Tensor product, Tensor sum,
                                              Tensor center, double count) {
  constexpr const char* kOp = "gram_stats";
  GramStatsArgs args{};
  const ScalarType type = set_weight(kOp, weight, count, args);
  product = beside_weight(kOp, "product", product, weight);
  check_channels(kOp, "sum", sum, args.channels, ScalarType::Double, weight);
  check_channels(kOp, "center", center, args.channels, type, weight);
  weight = in_order(weight);
  sum = in_order(sum);
  center = in_order(center);
  Tensor mean = new_vector(weight, args.rows, type), about = new_vector(weight, args.rows, type),
         m2 = new_vector(weight, args.rows, type);
  args.weight = weight.const_data_ptr();
  args.product = product.const_data_ptr();
  args.sum = static_cast<const double*>(sum.const_data_ptr());
  args.center = center.const_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.about = about.mutable_data_ptr();
  args.m2 = m2.mutable_data_ptr();
  check_status(kOp, Device(weight).launch(args));
  return {mean, about, m2};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> gram_gradients(Tensor weight, Tensor s, Tensor scale,
                                                          Tensor mean, Tensor invstd, Tensor sum_g,
                                                          MaybeTensor sum_gx, double count) {
  constexpr const char* kOp = "gram_gradients";
  GramGradientsArgs args{};
  const ScalarType type = set_weight(kOp, weight, count, args);
  FR_CHECK(count > 0, kOp, ": count must be more than 0, got ", count);
  s = beside_weight(kOp, "s", s, weight);
  auto vector = [&](const char* argument, const Tensor& t) {
    check_channels(kOp, argument, t, args.rows, type, weight);
    return in_order(t);
  };
  scale = vector("scale", scale);
  mean = vector("mean", mean);
  invstd = vector("invstd", invstd);
  sum_g = vector("sum_g", sum_g);
  if (sum_gx) sum_gx = vector("sum_gx", *sum_gx);
  weight = in_order(weight);
  Tensor dgamma = new_vector(weight, args.rows, type);
  Tensor scaled_s = torch::stable::empty_like(s);
  Tensor slopes =
      torch::stable::empty({args.rows, args.channels + 1}, type, std::nullopt, weight.device());
  Tensor scaled_weight = torch::stable::empty_like(weight);
  args.weight = weight.const_data_ptr();
  args.s = s.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.invstd = invstd.const_data_ptr();
  args.sum_g = sum_g.const_data_ptr();
  args.sum_gx = pointer(sum_gx);
  args.dgamma = dgamma.mutable_data_ptr();
  args.scaled_s = scaled_s.mutable_data_ptr();
  args.slopes = slopes.mutable_data_ptr();
  args.scaled_weight = scaled_weight.mutable_data_ptr();
  check_status(kOp, Device(weight).launch(args));
  return {dgamma, scaled_s, slopes, scaled_weight};
}

}  // namespace fused_resnet::glue
