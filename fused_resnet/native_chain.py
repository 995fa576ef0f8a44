"""Fake kernels of the ops of chains; :mod:`fused_resnet.native` registers them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _vector(x: Tensor, n: int) -> Tensor:
    return x.new_empty((n,), dtype=reference.accumulation_dtype(x.dtype))


def _convolved(x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    y = F.conv2d(x, weight, None, *geometry)
    return reference.empty_image(x, y.shape, x, weight)


def _sums(dx: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    n = 0 if mean is None else dx.size(1)
    return _vector(dx, n), _vector(dx, n)


def _bn_act_conv_stats(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _convolved(x, weight, (stride, padding, dilation, groups))
    return y, _vector(y, y.size(1)), _vector(y, y.size(1))


def _bn_act_conv_bn_act(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: str,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    stride2: Sequence[int] = (1, 1),
    tf32: bool = False,
) -> Tensor:
    return _convolved(x, weight, (stride, padding, dilation, groups))


def _bn_backward_conv_dgrad(
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
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    added_stride: int = 1,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    dx = reference.empty_image(grad, shape, grad, weight)
    return dx, *_sums(dx, mean)


def _bn_backward_conv_wgrad(
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
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    tf32: bool = False,
) -> Tensor:
    return torch.empty(
        (grad.size(1), x.size(1) // groups, *kernel_size),
        dtype=reference.accumulation_dtype(grad.dtype),
        device=grad.device,
        memory_format=torch.channels_last,
    )


def _bn_act_gram_backward(
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
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = reference.empty_image(x, (*x.shape[:2], *grad.shape[2:]), x)
    return dx, *_sums(dx, mean)


def _relu_backward_conv_wgrad(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    act: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    g = reference.empty_image(grad, grad.shape, grad)
    geometry: Any = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    nothing = (None, None, None, None)
    dw = _bn_backward_conv_wgrad(g, *nothing, x, scale, shift, center, act, *geometry)
    return g, _vector(g, g.size(1)), dw


FAKES: dict[str, Callable[..., Any]] = {
    "bn_act_conv_stats": _bn_act_conv_stats,
    "bn_act_conv_bn_act": _bn_act_conv_bn_act,
    "bn_backward_conv_dgrad": _bn_backward_conv_dgrad,
    "bn_backward_conv_wgrad": _bn_backward_conv_wgrad,
    "bn_act_gram_backward": _bn_act_gram_backward,
    "relu_backward_conv_wgrad": _relu_backward_conv_wgrad,
}
