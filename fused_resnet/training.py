"""Fused training: a chain of convolutions, each with its BatchNorm, as one autograd node.

Forward keeps the raw convolution outputs ``y_i`` and the chain's output, nothing between them:
``z_i = relu(bn_i(y_i))`` is made again in backward. Of a 1x1 convolution that ends a chain, and of
a 1x1 shortcut, not even ``y`` is kept: its statistics come from the Gram matrix of its input
(:mod:`fused_resnet.moments`), and so does its part of the backward::

    S = g^T z                                    g: the gradient behind the last ReLU
    dbeta = sum g                                dgamma = invstd * (rowdot(W, S) - mean(y) * dbeta)
    a = gamma * invstd                           b = -a * invstd * dgamma / P
    c = -a * dbeta / P - b * mean(y)
    dW = diag(a) S + diag(b) W (z^T z) + c (sum z)^T
    dz = g (diag(a) W) + z (W^T diag(b) W) + c^T W

with every z taken about a per-channel constant, which changes none of it as dy sums to zero. Where
memory is to be lean, the first of several convolutions is computed again, too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import engines, moments, whole_chain
from .moments import Moments, count_of, run
from .native import below_autograd
from .plan import (
    Kept,
    Params,
    Plan,
    Source,
    Step,
    cast_weight,
    convolve,
    is_pointwise,
    keeps_output,
    positions,
)
from .reference import accumulation_dtype, memory_format, suggests_channels_last
from .training_backward import Backward, composite_backward
from .training_fused import FusedBackward

Values = tuple[Tensor, Tensor, Tensor, Tensor]


@contextlib.contextmanager
def _plainly(x: Tensor) -> Iterator[None]:
    """No autocast, which would cast inside; and, outside a trace, no autograd to ask at each op."""
    device = x.device.type
    cast: Any = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        cast = torch.autocast(device, enabled=False)
    with cast, below_autograd():
        yield


def _fixed(step: Step, p: Params) -> Values:
    """Scale, shift, mean and inverse deviation of running statistics."""
    mean, var = p.running_mean, p.running_var
    dtype = accumulation_dtype(mean.dtype)  # type: ignore[union-attr]
    invstd = torch.rsqrt(var.to(dtype) + step.eps)  # type: ignore[union-attr]
    scale = invstd if p.gamma is None else p.gamma.to(dtype) * invstd
    shift = -mean.to(dtype) * scale  # type: ignore[union-attr]
    shift = shift if p.beta is None else shift + p.beta.to(dtype)
    return scale, shift, mean.to(dtype), invstd  # type: ignore[union-attr]


def _finalize(
    plan: Plan, step: Step, p: Params, own: Moments, like: Tensor, about: Tensor | None = None
) -> tuple[Values, float]:
    """Scale, shift, mean and inverse deviation of the batch; running statistics move.

    ``about``: the mean in ``own``, about another center; the mean that is returned is, too.
    """
    whole = moments.combine(own, plan.group)
    if whole.values <= 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {like.shape}"
        )
    scale, shift, invstd = run(
        "bn_finalize", plan.engine, whole.mean, whole.m2, whole.values, p.gamma, p.beta,
        p.running_mean, p.running_var, step.momentum, step.eps,
    )  # fmt: skip
    if about is None:
        about = whole.mean
    elif whole is not own:
        about = about + (whole.mean - own.mean)
    return (scale, shift, about, invstd), whole.values


def _centre(p: Params | None, z: Tensor, engine: str) -> Tensor:
    """Near the mean of each channel of z; such that z - centre is exact in half types.

    ``p``: the BatchNorm, with ReLU, that z comes from; None: it is not known, and one image tells.
    """
    half = z.dtype in (torch.bfloat16, torch.float16)
    if p is None:
        mean, m2 = run("bn_stats", engine, z[:1])
        deviation = (m2 / max(1, count_of(z[:1]))).sqrt()
    elif p.beta is None:
        return z.new_zeros(z.size(1), dtype=accumulation_dtype(z.dtype))
    else:
        mean = p.beta.detach().clamp_min(0)
        deviation = torch.ones_like(mean) if p.gamma is None else p.gamma.detach().abs()
    if half:
        mean = torch.where(mean > 2 * deviation, mean, 0)
    # A centre that is not finite would spoil what is finite around it.
    return mean.nan_to_num(0, 0, 0).to(torch.bfloat16).to(accumulation_dtype(z.dtype))


def _end(
    plan: Plan, step: Step, p: Params, given: Source, source: tuple[Params, Kept] | None
) -> tuple[Kept, float]:
    """A step that ends a chain, short of its normalisation, of the input ``given``.

    ``source``: the step before it, whose raw output and BatchNorm that came from; None: from x.
    """
    z = given.x
    if keeps_output(plan, step, p, z.shape, z.dtype):
        return _middle(plan, step, p, given)
    cast = cast_weight(p, z)
    weight = p.weight if cast is None else cast
    if not step.batch:
        return Kept(None, *_fixed(step, p), cast), 0.0
    center = _centre(None if source is None else source[0], z, plan.engine)
    raw = (z, None, None) if source is None else (source[1].y, *source[1][1:3])
    act = "none" if source is None else "relu"
    count = positions(z.shape, step)
    gram = moments.gram_of(raw, center, act, step.stride[0], count, plan.engine)
    own, about = moments.of_product(weight, gram, plan.engine)
    values, whole = _finalize(plan, step, p, own, z, about)
    k = Kept(None, *values, cast, center, gram.moments)
    return k, whole


def _middle(plan: Plan, step: Step, p: Params, given: Source) -> tuple[Kept, float]:
    """A step whose raw output is made, of the input ``given``, and kept."""
    cast = cast_weight(p, given.x)
    weight = p.weight if cast is None else cast
    if plan.fused and step.batch:
        y, mean, m2 = run("bn_act_conv_stats", plan.engine, *given, weight, *step.geometry)
        own = Moments(mean, m2, float(count_of(y)))
    elif plan.fused:
        y = _product(plan, step, given, weight, None, None, None, "none")
    else:
        y = convolve(given.x, p, step, weight)
    if not step.batch:
        return Kept(y, *_fixed(step, p), cast), 0.0
    if not plan.fused:
        own = moments.of_tensor(y, plan.engine)
    values, count = _finalize(plan, step, p, own, y)
    return Kept(y, *values, cast), count


def _product(plan: Plan, step: Step, given: Source, weight: Tensor, *epilogue: Any) -> Tensor:
    """conv_bn_act of the input ``given``; ``epilogue``: scale, shift, residual and activation."""
    *rest, act = epilogue
    if plan.fused:
        args = (*given, weight, *rest, *step.geometry, act)
        return run("bn_act_conv_bn_act", plan.engine, *args)
    return run("conv_bn_act", plan.engine, given.x, weight, *rest, *step.geometry, act)


def _normalised(
    plan: Plan, step: Step, p: Params, k: Kept, given: Source, residual: Tensor | None, act: str
) -> Tensor:
    """``act(bn(conv(z)) + residual)`` of the input ``given`` once the statistics are known."""
    if k.y is not None:
        return run("bn_act", plan.engine, k.y, k.scale, k.shift, residual, act)
    weight = p.weight if k.weight is None else k.weight
    return _product(plan, step, given, weight, k.scale, k.shift, residual, act)


def _joins(plan: Plan, p: Params, last: Kept, own: Kept) -> bool:
    """Whether the shortcut's convolution is a second product of the one that ends the chain.

    ``last``, ``own``: of that step, and of the shortcut, whose parameters are ``p``.
    """
    unmade = last.y is None and own.y is None
    return plan.fused and unmade and is_pointwise(plan.shortcut, p.weight)  # type: ignore[arg-type]


def _with_shortcut(
    plan: Plan, params: list[Params], kept: list[Kept], given: Source, x: Tensor
) -> Tensor:
    """``act(bn(conv(z)) + bn(conv(x)))`` of the last step's input ``given`` and the shortcut's."""
    step, k, own = plan.steps[-1], kept[-2], kept[-1]
    last, other = (
        p.weight if each.weight is None else each.weight
        for p, each in zip(params[-2:], kept[-2:], strict=True)
    )
    args = (*given, last, k.scale, k.shift + own.shift, None, *step.geometry, plan.act)
    second = (x, other, own.scale, plan.shortcut.stride)  # type: ignore[union-attr]
    return run("bn_act_conv_bn_act", plan.engine, *args, *second)


def _fuses(plan: Plan, x: Tensor, params: list[Params]) -> bool:
    """Whether the chain is run by ops that do to operands and results all that is around them."""
    return (
        engines.fuses(plan.engine, x.device.type, x.dtype)
        and suggests_channels_last(x)
        and all(p.bias is None for p in params)
    )


def _runs_whole(plan: Plan, x: Tensor, residual: Tensor | None, params: list[Params]) -> bool:
    """Whether the chain may be run by one op each way. Pure but for what watches torch's ops.

    A compiler and a dispatch mode, such as one that counts operations, see every single one.
    """
    return (
        engines.runs_whole(plan.engine, x.device.type, x.dtype)
        and plan.pool is None
        and plan.group is None
        and plan.memory != "lean"
        and (plan.act == "relu" or residual is None)  # whose gradient would be the one given
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and suggests_channels_last(x)
        and all(p.bias is None for p in params)
    )


class Chain(torch.autograd.Function):
    """``out = Chain.apply(plan, x, residual, *tensors)``: six tensors a step, the shortcut last."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, residual: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        params = _params(tensors)
        plan = plan._replace(fused=_fuses(plan, x, params))
        packed, argmax = None, None
        if _runs_whole(plan, x, residual, params):
            packed = whole_chain.pack(plan, x, params)
        with _plainly(x):
            if packed is not None:
                out, flat = whole_chain.forward(plan, packed, x, residual, params)
            else:
                out, argmax, kept, ctx.counts = _op_by_op(plan, x, residual, params)
                flat = [t for k in kept for t in k]
        ctx.plan, ctx.packed, ctx.layout = plan, packed, memory_format(out)
        # Only a ReLU's backward reads what it put out; else it may be written to, as torch's may.
        read = plan.act == "relu" or plan.pool is not None
        ctx.save_for_backward(x, out if read else None, argmax, *tensors, *flat)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, out, argmax, *rest = ctx.saved_tensors
        plan: Plan = ctx.plan
        if out is None:  # of its shape and layout
            out = grad = grad.contiguous(memory_format=ctx.layout)
        size = len(Params._fields) * (len(plan.steps) + (plan.shortcut is not None))
        params, need = _params(rest[:size]), ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (None, *composite_backward(plan, x, out, params, grad, need[1:]))
        width = len(Kept._fields)
        kept = [Kept(*rest[i : i + width]) for i in range(size, len(rest), width)]
        wanted = _params(need[3:])
        with _plainly(x):
            if ctx.packed is not None:
                given = (x, out, params, kept, grad, need[1:3], wanted)
                dx, dresidual, gradients = whole_chain.backward(plan, ctx.packed, *given)
            else:
                kind = FusedBackward if plan.fused else Backward
                kept = _complete(plan, x, params, kept)
                walked = kind(plan, params, kept, ctx.counts, need[1], wanted)
                dx, dresidual, gradients = walked.walk(x, out, argmax, grad, need[2])
        result: list[Any] = []
        for p, asked, d in zip(params, wanted, gradients, strict=True):
            for t, a, value in zip(p[:4], asked[:4], d, strict=True):
                wrong = a and value is not None and value.dtype != t.dtype  # type: ignore[union-attr]
                value = value.to(t.dtype) if wrong else value  # type: ignore[union-attr]
                result.append(value if a else None)
            result += [None, None]
        return (None, dx, dresidual, *result)


def _op_by_op(
    plan: Plan, x: Tensor, residual: Tensor | None, params: list[Params]
) -> tuple[Tensor, Tensor | None, list[Kept], list[float]]:
    """The chain's output, a pooling's argmax, what is kept, and values per channel of each step."""
    given = Source(x)
    kept: list[Kept] = []
    counts: list[float] = []
    for i, (step, p) in enumerate(zip(plan.steps, params, strict=False)):
        if i:
            k = kept[-1]
            given = Source(k.y, k.scale, k.shift, "relu")  # type: ignore[arg-type]
            if not plan.fused:
                given = Source(run("bn_act", plan.engine, *given[:3], None, "relu"))
        if i + 1 < len(plan.steps) or plan.pool is not None:
            k, count = _middle(plan, step, p, given)
        else:
            source = (params[i - 1], kept[-1]) if i else None
            k, count = _end(plan, step, p, given, source)
        kept.append(k)
        counts.append(count)
    n = len(plan.steps) - 1
    argmax, joined = None, False
    if plan.shortcut is not None:
        p = params[-1]
        k, count = _end(plan, plan.shortcut, p, Source(x), None)
        joined = _joins(plan, p, kept[n], k)
        if not joined:
            residual = _normalised(plan, plan.shortcut, p, k, Source(x), None, "none")
        kept.append(k)
        counts.append(count)
    elif plan.identity:
        residual = x
    k = kept[n]
    if joined:
        out = _with_shortcut(plan, params, kept, given, x)
    elif plan.pool is None:
        out = _normalised(plan, plan.steps[n], params[n], k, given, residual, plan.act)
    else:
        raw = (k.y, k.scale, k.shift, *plan.pool, plan.act)
        out, argmax = run("bn_act_maxpool_train", plan.engine, *raw)
    if plan.memory == "lean" and n > 0:
        kept[0] = kept[0]._replace(y=None)
    return out, argmax, kept, counts


def _complete(plan: Plan, x: Tensor, params: list[Params], kept: list[Kept]) -> list[Kept]:
    """``kept`` with what was given up for memory computed again."""
    if plan.memory != "lean" or len(plan.steps) == 1:
        return kept
    y = convolve(x, params[0], plan.steps[0], params[0].weight.to(x.dtype))
    return [kept[0]._replace(y=y), *kept[1:]]


def _params(flat: Sequence[Any]) -> list[Params]:
    width = len(Params._fields)
    return [Params(*flat[i : i + width]) for i in range(0, len(flat), width)]
