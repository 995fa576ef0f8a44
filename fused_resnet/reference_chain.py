"""The specification of the ops of chains, as :mod:`fused_resnet.reference` has that of others.

They are what training is made of where all that is around a convolution is done to its operands as
they are read, and to its result before it is written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import (
    _act,
    _per_channel,
    accumulation_dtype,
    bn_act,
    conv_bn_act,
    empty_image,
)
from .reference_training import (
    bn_act_backward_reduce,
    bn_stats,
    conv_dgrad,
    conv_wgrad,
    relu_backward,
    relu_backward_reduce,
)


def _input(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    return _act(x, act) if scale is None or shift is None else bn_act(x, scale, shift, None, act)


def _of_batch_norm(
    grad: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, c: Tensor | None
) -> Tensor:
    """``a * grad + b * y + c`` by channels, rounded to grad's dtype."""
    g = grad.to(accumulation_dtype(grad.dtype))
    if a is not None:
        g = g * _per_channel(a, g)
    if y is not None and b is not None:
        g = g + y.to(g.dtype) * _per_channel(b, g)
    if c is not None:
        g = g + _per_channel(c, g)
    return g.to(grad.dtype)


def _masked(
    dx: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the ReLU behind x's BatchNorm lets through, and its sums; everything, without sums."""
    if x is None or scale is None or shift is None or mean is None or invstd is None:
        nothing = dx.new_empty((0,), dtype=accumulation_dtype(dx.dtype))
        return dx, nothing, nothing.clone()
    g = relu_backward(dx, bn_act(x, scale, shift, None, "none"))
    return g, *bn_act_backward_reduce(g, x, None, scale, shift, mean, invstd, "none")


def bn_act_conv_stats(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = conv2d(act(x * scale + shift), weight)`` and :func:`bn_stats` of y."""
    z = _input(x, scale, shift, act)
    geometry = (stride, padding, dilation, groups)
    y = conv_bn_act(z, weight, None, None, None, *geometry, "none")
    return y, *bn_stats(y)


def bn_act_conv_bn_act(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: str,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    stride2: Sequence[int] = (1, 1),
) -> Tensor:
    """:func:`conv_bn_act` of ``in_act(x * in_scale + in_shift)``. With x2 and weight2, which is
    1x1, ``conv2d(x2, weight2) * scale2`` is added to the residual: the block's projection, whose
    shift is in ``shift``. Engines keep it in the accumulation type."""
    z = _input(x, in_scale, in_shift, in_act)
    if x2 is not None and weight2 is not None:
        geometry2 = (stride2, (0, 0), (1, 1), 1)
        residual = conv_bn_act(x2, weight2, scale2, None, residual, *geometry2, "none")
    geometry = (stride, padding, dilation, groups)
    return conv_bn_act(z, weight, scale, shift, residual, *geometry, act)


def bn_backward_conv_dgrad(
    grad: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    weight: Tensor,
    added: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    added_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv_dgrad` of ``a * grad + b * y + c``, where ``added`` comes to every
    ``added_stride``-th position. Where the convolution's input came from a BatchNorm of x and a
    ReLU: what that lets through, with :func:`bn_act_backward_reduce` of it."""
    dy = _of_batch_norm(grad, y, a, b, c)
    if added is not None and added_stride > 1:
        spread = added.new_zeros((*added.shape[:2], *input_size))
        spread[:, :, ::added_stride, ::added_stride] = added
        added = spread
    dx = conv_dgrad(dy, weight, added, input_size, stride, padding, dilation, groups)
    return _masked(dx, x, scale, shift, mean, invstd)


def bn_backward_conv_wgrad(
    grad: Tensor,
    y: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """:func:`conv_wgrad` of ``a * grad + b * y + c`` and ``act(x * scale + shift) - center``."""
    dy = _of_batch_norm(grad, y, a, b, c)
    z = _input(x, scale, shift, act)
    if center is not None:
        z = z - _per_channel(center, z)
    geometry = (kernel_size, stride, padding, dilation, groups)
    return conv_wgrad(dy, z, None, None, "none", *geometry)


def bn_act_gram_backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor,
    act: str,
    matrix: Tensor,
    offset: Tensor,
    added: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad weight + zc matrix + offset + added``, by pixels, for the
    ``zc = act(x * scale + shift) - center`` of :func:`bn_act_gram`, center rounded to x's dtype;
    of every ``stride``-th row and column of x. With mean and invstd, for a stride of 1: what the
    ReLU lets through, with :func:`bn_act_backward_reduce` of it."""
    layout = x
    x = x[:, :, ::stride, ::stride]
    z = _input(x, scale, shift, act)
    z = (z - _per_channel(center, z)).to(accumulation_dtype(z.dtype))
    wide = z.dtype
    product = torch.einsum("nkhw,kc->nchw", grad.to(wide), weight.flatten(1).to(wide))
    product = product + torch.einsum("nihw,ic->nchw", z, matrix.to(wide))
    product = product + _per_channel(offset, product)
    if added is not None:
        product = product + added.to(wide)
    dx = empty_image(x, x.shape, layout).copy_(product)
    return _masked(dx, x, scale, shift, mean, invstd)


def relu_backward_conv_wgrad(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`relu_backward_reduce` of grad and out, and :func:`conv_wgrad` of what it lets through
    and ``act(x * scale + shift) - center``, of a 1x1 convolution."""
    g, sum_g = relu_backward_reduce(grad, out)
    geometry: Any = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    nothing = (None, None, None, None)
    dw = bn_backward_conv_wgrad(g, *nothing, x, scale, shift, center, act, *geometry)
    return g, sum_g, dw
