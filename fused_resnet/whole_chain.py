"""A whole chain in one op, forward and backward: its arguments, and its fake kernels.

What the ops compute is :class:`fused_resnet.training.Chain` to the bit, by the same ops in the same
order; called one by one from Python, they take longer than a GPU takes for a small image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Gradients, Kept, Params, Plan, Step, keeps_output
from .reference import accumulation_dtype, conv_shape, empty_image

#: Integers a step in what :func:`pack` returns, as csrc/torch/ops_chain.h reads them.
_WIDTH = 9


def pack(plan: Plan, x: Tensor, params: Sequence[Params]) -> list[int] | None:
    """What the ops are told of each step; None: run one by one, torch's ops say what does not fit.

    Stride, padding and dilation, groups, whether its statistics are the batch's, and whether its
    raw output is kept.
    """
    packed: list[int] = []
    shape: Sequence[int] = x.shape
    last = len(plan.steps) - 1
    for i, (step, p) in enumerate(zip(_steps(plan), params, strict=True)):
        given = x.shape if i > last else shape
        weight = p.weight.shape
        shape = conv_shape(given, weight, step.stride, step.padding, step.dilation)
        fits = given[1] == weight[1] * step.groups and min(shape[2:]) > 0
        if not fits or (step.batch and shape[0] * math.prod(shape[2:]) <= 1):
            return None
        keeps = i < last or keeps_output(plan, step, p, given, x.dtype)
        packed += step.stride + step.padding + step.dilation
        packed += (step.groups, int(step.batch), int(keeps))
    return packed


def _steps(plan: Plan) -> tuple[Step, ...]:
    return plan.steps if plan.shortcut is None else (*plan.steps, plan.shortcut)


def forward(
    plan: Plan, packed: list[int], x: Tensor, residual: Tensor | None, params: Sequence[Params]
) -> tuple[Tensor, list[Tensor | None]]:
    """The chain's output, and the tensors of each step's :class:`Kept`, one after the other."""
    steps = _steps(plan)
    out, *kept = torch.ops.fused_resnet.chain_forward.default(
        x,
        residual,
        [t for p in params for t in (p.weight, p.gamma, p.beta)],
        [t for p in params for t in (p.running_mean, p.running_var)],
        packed,
        [s.eps for s in steps],
        [s.momentum for s in steps],
        plan.identity,
        plan.shortcut is not None,
        plan.act,
    )
    return out, kept


def backward(
    plan: Plan,
    packed: list[int],
    x: Tensor,
    out: Tensor,
    params: Sequence[Params],
    kept: Sequence[Kept],
    grad: Tensor,
    need: Sequence[bool],
    wanted: Sequence[Any],
) -> tuple[Tensor | None, Tensor | None, list[Gradients]]:
    """The gradients of x, of the residual, and of each step's weight, bias, gamma and beta.

    ``need``: whether x and the residual need theirs; ``wanted``: a step's, Params of bools.
    """
    dx, dresidual, *flat = torch.ops.fused_resnet.chain_backward.default(
        grad,
        x,
        out,
        [p.weight if k.weight is None else k.weight for p, k in zip(params, kept, strict=True)],
        [t for k in kept for t in k],
        packed,
        [int(w) for step in wanted for w in (step.weight, step.gamma, step.beta)],
        need[0],
        need[1],
        plan.identity,
        plan.shortcut is not None,
        plan.act,
    )
    steps = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
    return dx, dresidual, [(weight, None, gamma, beta) for weight, gamma, beta in steps]


def _unpacked(packed: list[int]) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """Of each step: geometry, batch and keeps."""
    for i in range(0, len(packed), _WIDTH):
        s = packed[i : i + _WIDTH]
        yield (s[:2], s[2:4], s[4:6], s[6]), s[7], s[8]


def _chain_forward(
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor | None],
    running: list[Tensor | None],
    steps: list[int],
    eps: list[float],
    momentum: list[float],
    identity: bool,
    shortcut: bool,
    act: str,
) -> list[Tensor | None]:
    kept: list[Tensor | None] = []
    z = out = x
    for i, (geometry, batch, keeps) in enumerate(_unpacked(steps)):
        beside = shortcut and i == len(eps) - 1
        given: Any = x if beside else z
        weight: Any = parameters[3 * i]
        cast = None if weight.dtype == x.dtype else weight.to(x.dtype)
        weight = weight if cast is None else cast
        y = empty_image(x, F.conv2d(given, weight, None, *geometry).shape, given, weight)
        z = y if not beside else z
        out = z
        dtype = accumulation_dtype(x.dtype)
        center = moments = None
        if batch and not keeps:
            channels = given.size(1)
            center = x.new_empty(channels, dtype=dtype)
            moments = x.new_empty((channels, channels + 1), dtype=dtype)
        vectors = (x.new_empty(y.size(1), dtype=dtype) for _ in range(4))
        kept += [y if keeps else None, *vectors, cast, center, moments]
    return [torch.empty_like(out), *kept]


def _chain_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: list[Tensor],
    kept: list[Tensor | None],
    steps: list[int],
    wanted: list[int],
    need_x: bool,
    need_residual: bool,
    identity: bool,
    shortcut: bool,
    act: str,
) -> list[Tensor | None]:
    dtype = accumulation_dtype(x.dtype)
    image = empty_image(out, out.shape, out) if need_residual else None
    found: list[Tensor | None] = [empty_image(x, x.shape, x) if need_x else None, image]
    for i, weight in enumerate(weights):
        like = {"dtype": dtype, "device": x.device}
        if kept[len(Kept._fields) * i + Kept._fields.index("center")] is None:
            whole = torch.empty(weight.shape, **like, memory_format=torch.channels_last)  # type: ignore
        else:
            whole = torch.empty_strided(weight.shape, weight.stride(), **like)  # type: ignore
        vectors = (weight.new_empty(weight.size(0), dtype=dtype) for _ in range(2))
        asked = wanted[3 * i : 3 * i + 3]
        found += [t if w else None for t, w in zip((whole, *vectors), asked, strict=True)]
    return found


FAKES: dict[str, Callable[..., Any]] = {
    "chain_forward": _chain_forward,
    "chain_backward": _chain_backward,
}
