"""Fake kernels of the ops that training is made of; :mod:`fused_resnet.native` registers them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _vector(x: Tensor) -> Tensor:
    """One number per channel of x, in the type x is accumulated in."""
    return x.new_empty((x.size(1),), dtype=reference.accumulation_dtype(x.dtype))


def _bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x), _vector(x)


def _bn_finalize(
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
    scale, shift, invstd = (mean.new_empty(mean.shape) for _ in range(3))
    return scale, shift, invstd


def _bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    return _vector(grad), _vector(grad)


def _bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
) -> Tensor:
    return reference.empty_image(grad, grad.shape, grad if x is None else x)


def _bn_act_backward_(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
) -> None:
    return None


def _bn_act_gram(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, center: Tensor, act: str, stride: int
) -> tuple[Tensor, Tensor]:
    channels = x.size(1)
    return (
        x.new_empty((channels, channels), dtype=torch.float64),
        x.new_empty((channels,), dtype=torch.float64),
    )


def _gram_moments(gram: Tensor, sum: Tensor, center: Tensor, count: float) -> tuple[Tensor, Tensor]:
    channels = center.numel()
    return center.new_empty(channels, channels), center.new_empty(channels, channels + 1)


def _gram_stats(
    weight: Tensor, product: Tensor, sum: Tensor, center: Tensor, count: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, about, m2 = (center.new_empty(weight.size(0)) for _ in range(3))
    return mean, about, m2


def _gram_gradients(
    weight: Tensor,
    s: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor | None,
    count: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, channels = weight.shape
    slopes = scale.new_empty(rows, channels + 1)
    return scale.new_empty(rows), s.new_empty(s.shape), slopes, weight.new_empty(weight.shape)


def _relu_backward_reduce(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return reference.empty_image(grad, grad.shape, grad), _vector(grad)


def _bn_act_maxpool_train(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    act: str,
) -> tuple[Tensor, Tensor]:
    y = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    layout = reference.memory_format(x)
    out = torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return out, torch.empty(y.shape, dtype=torch.uint8, device=x.device, memory_format=layout)


def _bn_act_maxpool_backward_reduce(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    act: str,
) -> tuple[Tensor, Tensor]:
    return _vector(x), _vector(x)


def _bn_act_maxpool_backward(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    act: str,
) -> Tensor:
    return reference.empty_image(x, x.shape, x)


def _eltwise_act_backward(
    grad: Tensor,
    inputs: list[Tensor],
    out: Tensor | None,
    op: str,
    coeff: list[float] | None,
    act: str,
) -> list[Tensor]:
    return [torch.empty_like(inputs[0]) for _ in inputs]


def _conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    tf32: bool = False,
) -> Tensor:
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    return reference.empty_image(grad, shape, grad, weight)


def _conv_dgrad_(
    grad: Tensor,
    weight: Tensor,
    added: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    tf32: bool = False,
) -> None:
    return None


def _conv_wgrad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
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


FAKES: dict[str, Callable[..., Any]] = {
    "bn_stats": _bn_stats,
    "bn_finalize": _bn_finalize,
    "bn_act_backward_reduce": _bn_act_backward_reduce,
    "bn_act_backward": _bn_act_backward,
    "bn_act_backward_": _bn_act_backward_,
    "bn_act_gram": _bn_act_gram,
    "gram_moments": _gram_moments,
    "gram_stats": _gram_stats,
    "gram_gradients": _gram_gradients,
    "relu_backward_reduce": _relu_backward_reduce,
    "bn_act_maxpool_train": _bn_act_maxpool_train,
    "bn_act_maxpool_backward_reduce": _bn_act_maxpool_backward_reduce,
    "bn_act_maxpool_backward": _bn_act_maxpool_backward,
    "eltwise_act_backward": _eltwise_act_backward,
    "conv_dgrad": _conv_dgrad,
    "conv_dgrad_": _conv_dgrad_,
    "conv_wgrad": _conv_wgrad,
}
