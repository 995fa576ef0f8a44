// The ops, once for all devices: check the arguments, describe them to the kernel, launch. Device
// gives the launchers of one place (launch(args)), for tensors that are all on it.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <tuple>

#include "checks.h"

namespace fused_resnet::glue {

inline EltwiseOp eltwise_op_of(const char* name, size_t inputs, const std::string& op,
                               const std::optional<std::vector<double>>& coeff) {
  FR_CHECK(inputs > 0, name, ": inputs must hold at least one tensor, got none");
  FR_CHECK(op == "sum" || op == "prod" || op == "max", name,
           ": op must be \"sum\", \"prod\" or \"max\", got \"", op, "\"");
  FR_CHECK(!coeff || op == "sum", name, ": coeff is for op \"sum\" only, got op \"", op, "\"");
  FR_CHECK(!coeff || coeff->size() == inputs, name, ": coeff must hold ", inputs,
           " numbers, one per input, got ", coeff->size());
  return op == "sum" ? EltwiseOp::sum : op == "prod" ? EltwiseOp::prod : EltwiseOp::max;
}

// t itself, or a copy with the strides `layout` has.
inline Tensor laid_out_as(const Tensor& t, const Tensor& layout) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d)
    same = same && (t.size(d) <= 1 || t.stride(d) == layout.stride(d));
  if (same) return t;
  Tensor dense = torch::stable::empty_like(layout);
  torch::stable::copy_(dense, t);
  return dense;
}

template <class Device>
Tensor eltwise_act(std::vector<Tensor> inputs, std::string op,
                   std::optional<std::vector<double>> coeff, std::string act) {
  constexpr const char* kOp = "eltwise_act";
  EltwiseActArgs args{};
  args.op = eltwise_op_of(kOp, inputs.size(), op, coeff);
  args.dtype = dtype_of(kOp, "inputs[0]", inputs[0]);
  args.act = act_of(kOp, act);
  const Ints sizes = sizes_of(inputs[0]);
  for (const Tensor& t : inputs) {
    check_like(kOp, "every input", t, inputs[0]);
    check_sizes(kOp, "every input", t, sizes);
  }
  // The first input's layout, made dense; the others are copied where theirs differs.
  Tensor out = torch::stable::empty_like(inputs[0]);
  std::vector<const void*> pointers;
  for (Tensor& t : inputs) {
    t = laid_out_as(t, out);
    pointers.push_back(t.const_data_ptr());
  }
  args.count = static_cast<int>(inputs.size());
  args.inputs = pointers.data();
  args.coeff = coeff ? coeff->data() : nullptr;
  args.out = out.mutable_data_ptr();
  args.numel = out.numel();
  check_status(kOp, Device(out).launch(args));
  return out;
}

inline BnActArgs bn_act_args(const char* op, const Tensor& x, const Tensor& scale,
                             const Tensor& shift, const MaybeTensor& residual,
                             const std::string& act, bool channels_last) {
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  BnActArgs args{};
  args.dtype = dtype_of(op, "x", x);
  args.act = act_of(op, act);
  args.x = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.residual = pointer(residual);
  args.channels = channels;
  args.outer = channels_last ? x.size(0) * pixels : x.size(0);
  args.inner = channels_last ? 1 : pixels;
  return args;
}

inline void check_bn_act(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                         const MaybeTensor& residual) {
  check_dim(op, "x", x, 4);
  dtype_of(op, "x", x);
  const ScalarType type = accumulation_type(x.scalar_type());
  check_channels(op, "scale", scale, x.size(1), type, x);
  check_channels(op, "shift", shift, x.size(1), type, x);
  if (residual) {
    check_like(op, "residual", *residual, x);
    check_sizes(op, "residual", *residual, sizes_of(x));
  }
}

template <class Device>
Tensor bn_act(Tensor x, Tensor scale, Tensor shift, MaybeTensor residual, std::string act) {
  constexpr const char* kOp = "bn_act";
  check_bn_act(kOp, x, scale, shift, residual);
  const bool channels_last = suggests_channels_last(x);
  x = in_format(x, channels_last);
  scale = in_order(scale);
  shift = in_order(shift);
  residual = in_format(residual, channels_last);
  Tensor out = new_output(x, sizes_of(x), channels_last);
  BnActArgs args = bn_act_args(kOp, x, scale, shift, residual, act, channels_last);
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return out;
}

template <class Device>
void bn_act_(Tensor x, Tensor scale, Tensor shift, MaybeTensor residual, std::string act) {
  constexpr const char* kOp = "bn_act_";
  check_bn_act(kOp, x, scale, shift, residual);
  const bool channels_last = suggests_channels_last(x);
  // A tensor that is not dense is worked on in a copy and written back.
  Tensor dense = in_format(x, channels_last);
  scale = in_order(scale);
  shift = in_order(shift);
  residual = in_format(residual, channels_last);
  BnActArgs args = bn_act_args(kOp, dense, scale, shift, residual, act, channels_last);
  args.out = dense.mutable_data_ptr();
  check_status(kOp, Device(dense).launch(args));
  write_back(kOp, "x", x, dense);
}

template <class Device>
std::tuple<Tensor, Tensor> bn_scale_shift(Tensor running_mean, Tensor running_var,
                                          MaybeTensor weight, MaybeTensor bias, double eps) {
  constexpr const char* kOp = "bn_scale_shift";
  check_dim(kOp, "running_mean", running_mean, 1);
  BnScaleShiftArgs args{};
  args.dtype = dtype_of(kOp, "running_mean", running_mean);
  const int64_t channels = running_mean.size(0);
  auto vector = [&](const char* argument, const Tensor& t) {
    check_channels(kOp, argument, t, channels, running_mean.scalar_type(), running_mean);
    return in_order(t);
  };
  running_mean = vector("running_mean", running_mean);
  running_var = vector("running_var", running_var);
  if (weight) weight = vector("weight", *weight);
  if (bias) bias = vector("bias", *bias);
  const ScalarType type = accumulation_type(running_mean.scalar_type());
  Tensor scale = torch::stable::empty({channels}, type, std::nullopt, running_mean.device());
  Tensor shift = torch::stable::empty({channels}, type, std::nullopt, running_mean.device());
  args.mean = running_mean.const_data_ptr();
  args.var = running_var.const_data_ptr();
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  args.scale = scale.mutable_data_ptr();
  args.shift = shift.mutable_data_ptr();
  args.channels = channels;
  args.eps = eps;
  check_status(kOp, Device(scale).launch(args));
  return {scale, shift};
}

template <class Device>
void batch_norm_act_(Tensor x, Tensor running_mean, Tensor running_var, MaybeTensor weight,
                     MaybeTensor bias, double eps, MaybeTensor residual, std::string act) {
  check_device("batch_norm_act_", "running_mean", running_mean, x);
  const auto [scale, shift] = bn_scale_shift<Device>(running_mean, running_var, weight, bias, eps);
  bn_act_<Device>(x, scale, shift, residual, act);
}

// The arguments of a pooling.
struct Pooling {
  Ints kernel_size, stride, padding, dilation;

  void check(const char* op) const {
    check_pair(op, "kernel_size", kernel_size, 1);
    check_pair(op, "stride", stride, 1);
    check_pair(op, "padding", padding, 0);
    check_pair(op, "dilation", dilation, 1);
    FR_CHECK(padding[0] * 2 <= kernel_size[0] && padding[1] * 2 <= kernel_size[1], op,
             ": padding must be at most half of kernel_size ", text(kernel_size), ", got ",
             text(padding));
  }

  // Output length of dimension 2 + i of an input, as torch.nn.functional.max_pool2d counts it.
  int64_t length(const Ints& sizes, int i, bool ceil_mode) const {
    const int64_t size = sizes[2 + i];
    const int64_t reach = size + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1 +
                          (ceil_mode ? stride[i] - 1 : 0);
    int64_t out = (reach >= 0 ? reach / stride[i] : (reach - stride[i] + 1) / stride[i]) + 1;
    // The last window has to begin inside the input or its left padding.
    if (ceil_mode && (out - 1) * stride[i] >= size + padding[i]) --out;
    return out;
  }

  // An input of sizes [N, C, H, W] pooled to out_height by out_width.
  PoolShape shape(const Ints& sizes, int64_t out_height, int64_t out_width) const {
    PoolShape s{};
    s.batch = sizes[0];
    s.channels = sizes[1];
    s.height = sizes[2];
    s.width = sizes[3];
    s.out_height = out_height;
    s.out_width = out_width;
    for (int i = 0; i < 2; ++i) {
      s.kernel[i] = kernel_size[i];
      s.stride[i] = stride[i];
      s.padding[i] = padding[i];
      s.dilation[i] = dilation[i];
    }
    return s;
  }

  PoolShape forward_shape(const char* op, const Ints& sizes, bool ceil_mode) const {
    const PoolShape s = shape(sizes, length(sizes, 0, ceil_mode), length(sizes, 1, ceil_mode));
    FR_CHECK(s.out_height > 0 && s.out_width > 0, op, ": kernel_size ", text(kernel_size),
             " is larger than the padded input ", text(sizes));
    return s;
  }
};

inline Ints out_sizes(const PoolShape& s) {
  return {s.batch, s.channels, s.out_height, s.out_width};
}

template <class Device>
Tensor bn_act_maxpool(Tensor x, Tensor scale, Tensor shift, Ints kernel_size, Ints stride,
                      Ints padding, Ints dilation, bool ceil_mode, std::string act) {
  constexpr const char* kOp = "bn_act_maxpool";
  check_bn_act(kOp, x, scale, shift, std::nullopt);
  const Pooling pooling{kernel_size, stride, padding, dilation};
  pooling.check(kOp);
  const bool channels_last = suggests_channels_last(x);
  x = in_format(x, channels_last);
  scale = in_order(scale);
  shift = in_order(shift);
  BnActMaxpoolArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.act = act_of(kOp, act);
  args.channels_last = channels_last;
  args.shape = pooling.forward_shape(kOp, sizes_of(x), ceil_mode);
  Tensor out = new_output(x, out_sizes(args.shape), channels_last);
  args.x = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return out;
}

template <class Device>
Tensor global_avg_pool(Tensor x) {
  constexpr const char* kOp = "global_avg_pool";
  check_dim(kOp, "x", x, 4);
  GlobalAvgPoolArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.channels_last = suggests_channels_last(x);
  x = in_format(x, args.channels_last);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.pixels = x.size(2) * x.size(3);
  Tensor out = new_output(x, {args.batch, args.channels, 1, 1}, args.channels_last);
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  check_status(kOp, Device(out).launch(args));
  return out;
}

inline ConvShape conv_shape(const char* op, const Tensor& weight, int64_t groups) {
  check_dim(op, "weight", weight, 4);
  const Ints sizes = sizes_of(weight);
  FR_CHECK(groups >= 1 && sizes[0] % groups == 0, op,
           ": groups must be positive and divide the output channels ", sizes[0], ", got ", groups);
  FR_CHECK(sizes[1] >= 1 && sizes[2] >= 1 && sizes[3] >= 1 && sizes[0] >= 1, op,
           ": weight must have no dimension of size zero, got ", text(sizes));
  ConvShape s{};
  s.in_channels = sizes[1] * groups;
  s.out_channels = sizes[0];
  s.kernel[0] = sizes[2];
  s.kernel[1] = sizes[3];
  s.groups = groups;
  return s;
}

// Completes a convolution's shape for an input of `sizes`.
inline void set_geometry(const char* op, ConvShape& s, const Ints& sizes, const Ints& stride,
                         const Ints& padding, const Ints& dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  s.batch = sizes[0];
  s.height = sizes[2];
  s.width = sizes[3];
  auto length = [&](int i) {
    s.stride[i] = stride[i];
    s.padding[i] = padding[i];
    s.dilation[i] = dilation[i];
    const int64_t reach = sizes[2 + i] + 2 * padding[i] - dilation[i] * (s.kernel[i] - 1) - 1;
    FR_CHECK(reach >= 0, op, ": kernel ", text({s.kernel[0], s.kernel[1]}), " with dilation ",
             text(dilation), " is larger than the padded input ", text(sizes));
    return reach / stride[i] + 1;
  };
  s.out_height = length(0);
  s.out_width = length(1);
}

// The same for an input that is there, of the channels that weight reads.
inline void set_input(const char* op, ConvShape& s, const Tensor& x, const Tensor& weight,
                      const Ints& stride, const Ints& padding, const Ints& dilation) {
  FR_CHECK(x.size(1) == s.in_channels, op, ": x must have ", s.in_channels, " channels for weight ",
           text(sizes_of(weight)), " and groups ", s.groups, ", got ", x.size(1));
  set_geometry(op, s, sizes_of(x), stride, padding, dilation);
}

// For a packed weight. It is read straight through, from more pages of the usual size than a
// processor knows the places of.
inline Tensor new_packed(int64_t size, ScalarType type, const Tensor& weight) {
  Tensor packed = torch::stable::empty({size}, type, std::nullopt, weight.device());
#if defined(__linux__)
  if (packed.is_cpu()) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page;
    const uintptr_t last = (begin + size * packed.element_size()) / page * page;
    // A wish: where it is not met, the pages are those of before.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return packed;
}

template <class Device>
Tensor conv_pack(Tensor weight, int64_t groups) {
  constexpr const char* kOp = "conv_pack";
  ConvPackArgs args{};
  args.shape = conv_shape(kOp, weight, groups);
  args.dtype = dtype_of(kOp, "weight", weight);
  args.weight = weight.const_data_ptr();
  for (int d = 0; d < 4; ++d) args.weight_stride[d] = weight.stride(d);
  Tensor packed = new_packed(Device::packed_size(args.dtype, args.shape),
                             scalar_type_of(Device::packed_dtype(args.dtype)), weight);
  args.packed = packed.mutable_data_ptr();
  check_status(kOp, Device(packed).launch(args));
  return packed;
}

// The tensors of a ConvBnActArgs but for a packed weight, checked and channels_last.
struct ConvBnActTensors {
  Tensor x, weight;
  MaybeTensor scale, shift, residual;
  bool channels_last = false, converts = false;

  ConvBnActArgs describe(const char* op, const Ints& stride, const Ints& padding,
                         const Ints& dilation, int64_t groups, const std::string& act) {
    check_dim(op, "x", x, 4);
    ConvBnActArgs args{};
    args.dtype = dtype_of(op, "x", x);
    args.act = act_of(op, act);
    ConvShape& s = args.shape;
    s = conv_shape(op, weight, groups);
    check_like(op, "weight", weight, x);
    set_input(op, s, x, weight, stride, padding, dilation);
    auto vector = [&](const char* argument, MaybeTensor& t) {
      if (!t) return;
      check_channels(op, argument, *t, s.out_channels, accumulation_type(x.scalar_type()), x);
      t = in_order(*t);
    };
    vector("scale", scale);
    vector("shift", shift);
    if (residual) {
      check_like(op, "residual", *residual, x);
      check_sizes(op, "residual", *residual, out_sizes(s));
    }
    // The kernel works in channels_last; a contiguous caller gets its layout back at the end. One
    // pixel, one channel or nothing lies in memory alike in both formats: only its strides differ.
    const bool alike = s.batch == 0 || s.out_height * s.out_width <= 1 || s.out_channels == 1;
    channels_last = suggests_channels_last(x) || suggests_channels_last(weight);
    converts = !channels_last && !alike;
    x = in_format(x, true);
    residual = in_format(residual, true);
    args.x = x.const_data_ptr();
    args.weight = weight.const_data_ptr();
    for (int d = 0; d < 4; ++d) args.weight_stride[d] = weight.stride(d);
    args.scale = pointer(scale);
    args.shift = pointer(shift);
    args.residual = pointer(residual);
    return args;
  }

  // What the kernel writes to, and what the caller gets of it.
  Tensor output(ConvBnActArgs& args) const {
    Tensor out = new_output(x, out_sizes(args.shape), channels_last || converts);
    args.out = out.mutable_data_ptr();
    return out;
  }
  Tensor returned(const Tensor& out) const { return converts ? in_format(out, false) : out; }

  static Ints out_sizes(const ConvShape& s) {
    return {s.batch, s.out_channels, s.out_height, s.out_width};
  }
};

template <class Device>
Tensor conv_bn_act(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor shift,
                   MaybeTensor residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                   std::string act, MaybeTensor packed, bool tf32, bool wgmma) {
  constexpr const char* kOp = "conv_bn_act";
  ConvBnActTensors in{x, weight, scale, shift, residual};
  ConvBnActArgs args = in.describe(kOp, stride, padding, dilation, groups, act);
  args.tf32 = tf32;
  args.wgmma = wgmma;
  if (packed) {
    check_channels(kOp, "packed", *packed, Device::packed_size(args.dtype, args.shape),
                   scalar_type_of(Device::packed_dtype(args.dtype)), x);
    packed = in_order(*packed);
    args.weight = nullptr;
    args.packed = packed->const_data_ptr();
  }
  Tensor out = in.output(args);
  const Status status = Device(out).launch(args);
  FR_CHECK(!wgmma || status != Status::unsupported, kOp,
           ": wgmma must be False unless on a GPU of compute capability 9.0, of aligned tensors of "
           "bfloat16 or float16, a kernel 1x1 has stride 1, no padding, one group and channels in "
           "multiples of 8; got x ",
           text(sizes_of(x)), ", weight ", text(sizes_of(weight)), ", stride ", text(stride),
           ", padding ", text(padding), ", groups ", groups);
  check_status(kOp, status);
  return in.returned(out);
}

}  // namespace fused_resnet::glue
