// The only list of ops.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fused_resnet::glue {

inline constexpr const char* kOps[] = {
    "eltwise_act(Tensor[] inputs, str op, float[]? coeff, str act) -> Tensor",

    "bn_scale_shift(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float "
    "eps)"
    " -> (Tensor, Tensor)",

    "bn_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str act) -> Tensor",

    "bn_act_(Tensor(a!) x, Tensor scale, Tensor shift, Tensor? residual, str act) -> ()",

    // bn_scale_shift and bn_act_ in one call.
    "batch_norm_act_(Tensor(a!) x, Tensor running_mean, Tensor running_var, Tensor? weight,"
    " Tensor? bias, float eps, Tensor? residual, str act) -> ()",

    "bn_act_maxpool(Tensor x, Tensor scale, Tensor shift, int[] kernel_size, int[] stride,"
    " int[] padding, int[] dilation, bool ceil_mode, str act) -> Tensor",

    "global_avg_pool(Tensor x) -> Tensor",

    "bn_stats(Tensor x) -> (Tensor mean, Tensor m2)",

    "bn_finalize(Tensor mean, Tensor m2, float count, Tensor? weight, Tensor? bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor scale, Tensor shift, Tensor invstd)",

    "bn_act_backward_reduce(Tensor grad, Tensor x, Tensor? out, Tensor scale, Tensor shift,"
    " Tensor mean, Tensor invstd, str act) -> (Tensor sum_g, Tensor sum_gx)",

    "bn_act_backward(Tensor grad, Tensor? x, Tensor? out, Tensor scale, Tensor shift,"
    " Tensor? mean, Tensor? invstd, Tensor? sum_g, Tensor? sum_gx, float count, str act)"
    " -> Tensor",

    "bn_act_backward_(Tensor(a!) grad, Tensor? x, Tensor? out, Tensor scale, Tensor shift,"
    " Tensor? mean, Tensor? invstd, Tensor? sum_g, Tensor? sum_gx, float count, str act) -> ()",

    "bn_act_gram(Tensor x, Tensor? scale, Tensor? shift, Tensor center, str act, int stride)"
    " -> (Tensor gram, Tensor sum)",

    "gram_moments(Tensor gram, Tensor sum, Tensor center, float count)"
    " -> (Tensor covariance, Tensor moments)",

    "gram_stats(Tensor weight, Tensor product, Tensor sum, Tensor center, float count)"
    " -> (Tensor mean, Tensor about, Tensor m2)",

    "gram_gradients(Tensor weight, Tensor s, Tensor scale, Tensor mean, Tensor invstd,"
    " Tensor sum_g, Tensor? sum_gx, float count)"
    " -> (Tensor dgamma, Tensor scaled_s, Tensor slopes, Tensor scaled_weight)",

    "relu_backward_reduce(Tensor grad, Tensor out) -> (Tensor g, Tensor sum_g)",

    "bn_act_maxpool_train(Tensor x, Tensor scale, Tensor shift, int[] kernel_size, int[] stride,"
    " int[] padding, int[] dilation, bool ceil_mode, str act) -> (Tensor out, Tensor argmax)",

    "bn_act_maxpool_backward_reduce(Tensor grad, Tensor out, Tensor argmax, Tensor x, Tensor mean,"
    " Tensor invstd, int[] kernel_size, int[] stride, int[] padding, int[] dilation, str act)"
    " -> (Tensor sum_g, Tensor sum_gx)",

    "bn_act_maxpool_backward(Tensor grad, Tensor out, Tensor argmax, Tensor x, Tensor scale,"
    " Tensor? mean, Tensor? invstd, Tensor? sum_g, Tensor? sum_gx, float count,"
    " int[] kernel_size, int[] stride, int[] padding, int[] dilation, str act) -> Tensor",

    "eltwise_act_backward(Tensor grad, Tensor[] inputs, Tensor? out, str op, float[]? coeff,"
    " str act) -> Tensor[]",

    "conv_dgrad(Tensor grad, Tensor weight, Tensor? added, int[] input_size, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool tf32=False) -> Tensor",

    "conv_dgrad_(Tensor grad, Tensor weight, Tensor(a!) added, int[] input_size, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool tf32=False) -> ()",

    "conv_wgrad(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, str act,"
    " int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " bool tf32=False) -> Tensor",

    "conv_pack(Tensor weight, int groups) -> Tensor",

    // Of 8-bit inference, which CPUs alone have.
    "quantize(Tensor x, float scale, int zero) -> Tensor",

    "conv_int8_pack(Tensor weight, int groups) -> Tensor",

    "conv_int8(Tensor x, int x_zero, Tensor weight, Tensor scale, Tensor shift, Tensor? residual,"
    " float residual_scale, int[] stride, int[] padding, int[] dilation, int groups, str act,"
    " int? out_zero, Tensor? packed=None) -> Tensor",

    "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int[] stride, int[] padding, int[] dilation, int groups, str act, Tensor? packed=None,"
    " bool tf32=False, bool wgmma=False) -> Tensor",

    "conv_winograd_pack(Tensor weight, int tile) -> Tensor",

    // conv_bn_act of a 3x3 kernel with stride 1 by fewer multiplications, which CPUs have.
    "conv_bn_act_winograd(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int[] padding, int tile, str act, Tensor? packed=None) -> Tensor",

    // A convolution and the pooling of its result, which the engines for GPUs have.
    "conv_bn_act_maxpool(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[] stride,"
    " int[] padding, int[] dilation, int[] kernel_size, int[] pool_stride, int[] pool_padding,"
    " int[] pool_dilation, bool ceil_mode, str act, bool tf32=False) -> Tensor",

    "conv_bn_act_avgpool(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int[] stride, int[] padding, int[] dilation, int groups, str act, bool tf32=False)"
    " -> Tensor",

    // A whole chain on torch's convolutions, forward and backward; training.py is what they are to
    // the bit. What is not kept, or not wanted, is None in the lists.
    "chain_forward(Tensor x, Tensor? residual, Tensor?[] parameters, Tensor(a!)?[] running,"
    " int[] steps, float[] eps, float[] momentum, bool identity, bool shortcut, str act)"
    " -> Tensor?[]",

    "chain_backward(Tensor grad, Tensor x, Tensor out, Tensor[] weights, Tensor?[] kept,"
    " int[] steps, int[] wanted, bool need_x, bool need_residual, bool identity, bool shortcut,"
    " str act) -> Tensor?[]",

    // Those of chains, which engines of GPUs have: each is the chain of ops that its name says.
    "bn_act_conv_stats(Tensor x, Tensor? scale, Tensor? shift, str act, Tensor weight,"
    " int[] stride, int[] padding, int[] dilation, int groups, bool tf32=False)"
    " -> (Tensor y, Tensor mean, Tensor m2)",

    "bn_act_conv_bn_act(Tensor x, Tensor? in_scale, Tensor? in_shift, str in_act, Tensor weight,"
    " Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
    " int groups, str act, Tensor? x2=None, Tensor? weight2=None, Tensor? scale2=None,"
    " int[] stride2=[1, 1], bool tf32=False) -> Tensor",

    "bn_backward_conv_dgrad(Tensor grad, Tensor? y, Tensor a, Tensor? b, Tensor? c, Tensor weight,"
    " Tensor? added, Tensor? x, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? invstd,"
    " int[] input_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " int added_stride=1, bool tf32=False) -> (Tensor dx, Tensor sum_g, Tensor sum_gx)",

    "bn_backward_conv_wgrad(Tensor grad, Tensor? y, Tensor? a, Tensor? b, Tensor? c, Tensor x,"
    " Tensor? scale, Tensor? shift, Tensor? center, str act, int[] kernel_size, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool tf32=False) -> Tensor",

    "bn_act_gram_backward(Tensor grad, Tensor weight, Tensor x, Tensor? scale, Tensor? shift,"
    " Tensor center, str act, Tensor matrix, Tensor offset, Tensor? added, Tensor? mean,"
    " Tensor? invstd, int stride=1, bool tf32=False)"
    " -> (Tensor dx, Tensor sum_g, Tensor sum_gx)",

    "relu_backward_conv_wgrad(Tensor grad, Tensor out, Tensor x, Tensor? scale, Tensor? shift,"
    " Tensor? center, str act, bool tf32=False) -> (Tensor g, Tensor sum_g, Tensor dw)",
};

inline void declare(torch::stable::detail::StableLibrary& library) {
  for (const char* op : kOps) library.def(op);
}

}  // namespace fused_resnet::glue
