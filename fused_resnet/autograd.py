"""The differentiable form of the ops: one :class:`torch.autograd.Function` for each function of
:mod:`fused_resnet.functional` that has a fused backward.

A backward runs on the engine its forward ran on. Where it is itself differentiated (double
backward, a gradient penalty), the specification's formulas run in its place: they are plain torch.
Under torch.func's transforms and forward-mode AD none of this is used, see :func:`transformed`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import engines, reference_training
from .moments import count_of
from .native import below_autograd
from .reference import _per_channel, accumulation_dtype
from .reference_training import _PIXELS, relu_backward

#: What bn_act_backward takes as mean, invstd, sum_g, sum_gx and count of fixed statistics.
_FIXED = (None, None, None, None, 0.0)


def transformed() -> bool:
    """Whether more than reverse-mode autograd is at work: then torch's own functions have to run,
    which every transform knows."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _call(op: str, engine: str, *args: Any) -> Any:
    """An op inside a Function, where nothing is recorded."""
    implementation = engines.implementation(op, engine)
    if engine == "reference":
        return implementation(*args)
    with below_autograd():
        return implementation(*args)


class EltwiseAct(torch.autograd.Function):
    """``apply(op, coeff, act, engine, *inputs)``."""

    @staticmethod
    def forward(
        ctx: Any, op: str, coeff: list[float] | None, act: str, engine: str, *inputs: Tensor
    ) -> Tensor:
        out = _call("eltwise_act", engine, list(inputs), op, coeff, act)
        ctx.settings = op, coeff, act, engine
        ctx.count = len(inputs)
        kept = list(inputs) if op != "sum" else []
        ctx.save_for_backward(out if act == "relu" else None, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        op, coeff, act, engine = ctx.settings
        out, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            engine = "reference"
        if op == "sum" and coeff is None and act == "none":
            results = [grad if need else None for need in needed]
        elif op == "sum":
            # Not of the inputs: one gradient for each factor there is.
            factors = [1.0] * ctx.count if coeff is None else coeff
            wanted = sorted({f for f, need in zip(factors, needed, strict=True) if need})
            of = _call(
                "eltwise_act_backward", engine, grad, [grad] * len(wanted), out, op, wanted, act
            )
            results = [
                of[wanted.index(f)] if n else None for f, n in zip(factors, needed, strict=True)
            ]
        else:
            of = _call("eltwise_act_backward", engine, grad, inputs, out, op, coeff, act)
            results = [g if need else None for g, need in zip(of, needed, strict=True)]
        return None, None, None, None, *results


class BnAct(torch.autograd.Function):
    """``apply(x, scale, shift, residual, act, engine)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        act: str,
        engine: str,
    ) -> Tensor:
        out = _call("bn_act", engine, x, scale, shift, residual, act)
        need_x, need_scale, _, _, *_ = ctx.needs_input_grad
        ctx.settings = act, engine
        ctx.save_for_backward(
            x if need_scale else None,
            out if act == "relu" else None,
            scale if need_x or need_scale else None,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        act, engine = ctx.settings
        x, out, scale = ctx.saved_tensors
        need_x, need_scale, need_shift, need_residual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            g = grad.to(accumulation_dtype(grad.dtype))
            g = relu_backward(g, out) if act == "relu" else g
            return (
                (g * _per_channel(scale, g)).to(grad.dtype) if need_x else None,
                (g * x.to(g.dtype)).sum(_PIXELS) if need_scale else None,
                g.sum(_PIXELS) if need_shift else None,
                g.to(grad.dtype) if need_residual else None,
                None,
                None,
            )
        g, sum_g, sum_gx, dx = grad, None, None, None
        if act == "relu" and (need_residual or (need_shift and not need_scale)):
            g, sum_g = _call("relu_backward_reduce", engine, grad, out)
            act, out = "none", None
        if need_scale:
            zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
            sum_g, sum_gx = _call(
                "bn_act_backward_reduce", engine, g, x, out, scale, scale, zeros, ones, act
            )
        elif need_shift and sum_g is None:
            sum_g = g.sum(_PIXELS, dtype=accumulation_dtype(g.dtype))
        if need_x:
            dx = _call("bn_act_backward", engine, g, None, out, scale, scale, *_FIXED, act)
        return (
            dx,
            sum_gx,
            sum_g if need_shift else None,
            g if need_residual else None,
            None,
            None,
        )


class BatchNormAct(torch.autograd.Function):
    """``apply(x, weight, bias, residual, running_mean, running_var, training, momentum, eps, act,
    engine)``; updates the running statistics in training."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        act: str,
        engine: str,
    ) -> Tensor:
        if training:
            mean, invstd, scale, shift = _batch_statistics(
                x, weight, bias, running_mean, running_var, momentum, eps, engine
            )
        else:
            dtype = accumulation_dtype(x.dtype)
            vectors: Any = (running_mean, running_var)
            mean, var = (v.to(dtype) for v in vectors)
            invstd = torch.rsqrt(var + eps)
            scale, shift = _call("bn_scale_shift", engine, *vectors, weight, bias, eps)
        out = _call("bn_act", engine, x, scale, shift, residual, act)
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.settings = training, eps, act, engine
        # The mask comes from x where x is kept and nothing was added.
        reads_x = need_weight or (need_x and training)
        of_x = reads_x and residual is None
        ctx.save_for_backward(
            x if reads_x else None,
            weight,
            out if act == "relu" and not of_x else None,
            *(mean, invstd, scale, shift),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        training, eps, act, engine = ctx.settings
        x, weight, out, mean, invstd, scale, shift = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            results = _differentiable(
                grad, x, weight, out, mean, invstd, scale, shift, training, eps, act, need_x
            )
            needed = ctx.needs_input_grad[:4]
            results = [r if n else None for r, n in zip(results, needed, strict=True)]
            return (*results, *[None] * 7)
        g, dx = grad, None
        sum_g: Any = None
        sum_gx: Any = None
        if act == "relu" and (need_residual or (need_bias and x is None)):
            g, sum_g = _call("relu_backward_reduce", engine, grad, out)
            act, out = "none", None
        if need_weight or (need_x and training):
            sum_g, sum_gx = _call(
                "bn_act_backward_reduce", engine, g, x, out, scale, shift, mean, invstd, act
            )
        elif need_bias and sum_g is None:
            sum_g = g.sum(_PIXELS, dtype=accumulation_dtype(g.dtype))
        if need_x:
            batch = (mean, invstd, sum_g, sum_gx, float(count_of(x))) if training else _FIXED
            dx = _call("bn_act_backward", engine, g, x, out, scale, shift, *batch, act)
        return (
            dx,
            sum_gx if need_weight else None,  # autograd casts to the parameter's dtype
            sum_g if need_bias else None,
            g if need_residual else None,
            *[None] * 7,
        )


def _differentiable(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    shift: Tensor,
    training: bool,
    eps: float,
    act: str,
    need_x: bool,
) -> list[Tensor | None]:
    """The gradients of x, weight, bias and residual, as functions of grad, x and weight."""
    g = reference_training._masked(grad, x, out, scale, shift, act)
    sum_g = g.sum(_PIXELS)
    normal: Any = None
    sum_gx: Any = None
    dx = None
    if x is not None:
        wide = x.to(g.dtype)
        if training:
            # From x again: the saved ones are constants to autograd.
            mean = wide.mean(_PIXELS)
            variance = (wide - _per_channel(mean, wide)).square().mean(_PIXELS)
            invstd = torch.rsqrt(variance + eps)
        normal = (wide - _per_channel(mean, wide)) * _per_channel(invstd, wide)
        sum_gx = (g * normal).sum(_PIXELS)
    if need_x:
        factor = invstd if weight is None else weight.to(g.dtype) * invstd
        inner = g
        if training:
            count = g.numel() // g.size(1)
            inner = g - _per_channel(sum_g / count, g)
            inner = inner - normal * _per_channel(sum_gx / count, g)
        dx = (inner * _per_channel(factor, g)).to(grad.dtype)
    return [dx, sum_gx, sum_g, g.to(grad.dtype)]


def batch_norm_act_of_torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    """The same of torch's functions: what cannot be fused, with torch's errors."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def batch_norm_obstacle(
    x: Tensor, vectors: Sequence[Tensor | None], training: bool, eps: float
) -> str | None:
    """Why a BatchNorm is left to torch, or None; torch reports what is wrong.

    Args:
        vectors: running_mean, running_var, weight, bias.
    """
    running_mean, running_var, *_ = vectors
    given = [v for v in vectors if v is not None]
    half = x.dtype in (torch.float16, torch.bfloat16)
    kinds = {v.dtype for v in given}
    if x.dim() != 4 or x.is_meta or not x.numel():
        return "x is not an image with pixels"
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        return "running statistics are missing"
    if eps <= 0 or (training and x.numel() == x.size(1)):
        return "torch refuses it"
    if any(v.shape != x.shape[1:2] or v.device != x.device for v in given):
        return "vectors do not fit"
    if kinds and kinds != {x.dtype} and not (half and kinds == {torch.float32}):
        return "dtypes do not fit"
    if any(v is not None and v.requires_grad for v in (running_mean, running_var)):
        return "running statistics require grad"
    if not torch.compiler.is_compiling() and (torch.jit.is_tracing() or transformed()):
        return "a transform is active"
    return None


class BatchNormActMaxpool(torch.autograd.Function):
    """``apply(x, weight, bias, running_mean, running_var, momentum, eps, pooling, act, engine)``,
    with batch statistics; pooling is kernel_size, stride, padding, dilation and ceil_mode.

    The gradients of weight and bias are sums over the pooled positions, and x's comes back through
    pooling, relu and BatchNorm in one pass; of the activation before pooling nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        pooling: Sequence[Any],
        act: str,
        engine: str,
    ) -> Tensor:
        mean, invstd, scale, shift = _batch_statistics(
            x, weight, bias, running_mean, running_var, momentum, eps, engine
        )
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        ctx.settings = eps, pooling, act, engine
        if not (need_x or need_weight or need_bias):
            return _call("bn_act_maxpool", engine, x, scale, shift, *pooling, act)
        out, argmax = _call("bn_act_maxpool_train", engine, x, scale, shift, *pooling, act)
        ctx.save_for_backward(x, weight, out, argmax, mean, invstd, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        eps, pooling, act, engine = ctx.settings
        x, weight, out, argmax, mean, invstd, scale = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        geometry = pooling[:4]
        if torch.is_grad_enabled():
            results = _differentiable_through_pooling(
                grad, x, weight, out, argmax, eps, geometry, act
            )
        else:
            sum_g, sum_gx = _call(
                *("bn_act_maxpool_backward_reduce", engine, grad, out, argmax, x, mean, invstd),
                *(*geometry, act),
            )
            dx = None
            if need_x:
                dx = _call(
                    *("bn_act_maxpool_backward", engine, grad, out, argmax, x, scale),
                    *(mean, invstd, sum_g, sum_gx, float(count_of(x)), *geometry, act),
                )
            results = [dx, sum_gx, sum_g]
        needed = (need_x, need_weight, need_bias)
        results = [r if n else None for r, n in zip(results, needed, strict=True)]
        return (*results, *[None] * 7)


def _batch_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, invstd, scale and shift of x; updates the running statistics."""
    mean, m2 = _call("bn_stats", engine, x)
    vectors = (weight, bias, running_mean, running_var)
    given = (m2, float(count_of(x)), *vectors, momentum, eps)
    scale, shift, invstd = _call("bn_finalize", engine, mean, *given)
    return mean, invstd, scale, shift


def _differentiable_through_pooling(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    out: Tensor,
    argmax: Tensor,
    eps: float,
    geometry: Sequence[Sequence[int]],
    act: str,
) -> list[Tensor | None]:
    """The gradients of x, weight and bias, as functions of grad, x and weight."""
    ones = torch.ones(x.size(1), dtype=accumulation_dtype(x.dtype), device=x.device)
    zeros = torch.zeros_like(ones)
    wide = grad.to(ones.dtype)
    kernel, stride, padding, dilation = geometry
    spread = reference_training.bn_act_maxpool_backward(
        *(wide, out, argmax, x.detach().to(ones.dtype), ones, *_FIXED),
        *(kernel, stride, padding, dilation),
        act,
    )
    dx, sum_gx, sum_g, _ = _differentiable(
        spread, x, weight, None, zeros, ones, ones, zeros, True, eps, "none", True
    )
    return [None if dx is None else dx.to(x.dtype), sum_gx, sum_g]
