"""The specification of the ops that training is made of, as :mod:`fused_resnet.reference` has those
of inference: plain torch, any dtype, half types computed in float32 and rounded once."""

import torch
from torch import Tensor

from .reference import (
    _in_format_of,
    _per_channel,
    accumulation_dtype,
    bn_act,
)

_PIXELS = (0, 2, 3)


def relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient relu's output ``out`` lets through: selected, and all of it where out is NaN."""
    return torch.where(out <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def _masked(
    grad: Tensor, x: Tensor | None, out: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """The gradient behind the activation, in the accumulation dtype."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    if act == "none":
        return wide
    if out is None:
        if x is None:
            raise RuntimeError('out must be given with act "relu" and without x, got neither')
        out = bn_act(x, scale, shift, None, "none")
    return relu_backward(wide, out)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and sum of squared deviations from it, in the accumulation dtype."""
    y = x.to(accumulation_dtype(x.dtype))
    mean = y.mean(_PIXELS)
    count = y.size(0) * y.size(2) * y.size(3)
    return mean, y.var(_PIXELS, correction=0) * count if y.numel() else torch.zeros_like(mean)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, shift and invstd of batch statistics; updates the running ones unless count is 0."""
    wide = mean.double()
    # Divided by a tensor: by a number, 0 / 0 would raise.
    invstd = (1 / torch.sqrt(m2.double() / m2.new_tensor(count).double() + eps)).to(mean.dtype)
    scale = invstd if weight is None else weight.to(mean.dtype) * invstd
    shift = -wide * scale.double()
    if bias is not None:
        shift = shift + bias.double()
    if running_mean is not None and running_var is not None and count > 0:
        unbiased = m2.double() / m2.new_tensor(count - 1).double()
        for running, value in ((running_mean, wide), (running_var, unbiased)):
            running.copy_((1 - momentum) * running.double() + momentum * value)
    return scale.clone(), shift.to(mean.dtype), invstd


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    """``sum g`` and ``sum g * (x - mean) * invstd``, g being what relu let through of grad."""
    g = _masked(grad, x, out, scale, shift, act)
    centered = x.to(g.dtype) - _per_channel(mean, g)
    return g.sum(_PIXELS), (g * centered).sum(_PIXELS) * invstd


def bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    act: str,
) -> Tensor:
    """``a[c] * g + b[c] * x + c[c]``, without the second term where x is None."""
    g = _masked(grad, x, out, scale, shift, act)
    dx = g * _per_channel(a, g) + _per_channel(c, g)
    if x is not None:
        dx = dx + x.to(g.dtype) * _per_channel(b, g)
    return _in_format_of(dx.to(grad.dtype), grad if x is None else x)
