"""The vendor engine: torch's own convolution (oneDNN, cuDNN), then one in-place pass of ours over
its output for scale, shift, residual and activation, in the accumulation type."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype, empty_image


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    packed: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight) * scale[c] + shift[c] + residual)``; ``packed`` is not read."""
    y = F.conv2d(x, weight, None, list(stride), list(padding), list(dilation), groups)
    if scale is None and shift is None and residual is None and act == "none":
        return y
    dtype = accumulation_dtype(y.dtype)
    if scale is None:
        scale = torch.ones(y.size(1), dtype=dtype, device=y.device)
    if shift is None:
        shift = torch.zeros(y.size(1), dtype=dtype, device=y.device)
    torch.ops.fused_resnet.bn_act_(y, scale, shift, residual, act)
    return y


def conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, plus ``added``."""
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    x = empty_image(grad, shape, grad, weight)
    dx = _backward(grad, x, weight, (stride, padding, dilation), groups, [True, False])[0]
    return dx if added is None else dx.add_(added)


def conv_dgrad_(grad: Tensor, weight: Tensor, added: Tensor, *args: Any, **kwargs: Any) -> None:
    """:func:`conv_dgrad` in the place of ``added``."""
    added.add_(conv_dgrad(grad, weight, None, *args, **kwargs))


def conv_wgrad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's weight, its input being ``act(x * scale + shift)``."""
    if scale is not None and shift is not None:
        x = torch.ops.fused_resnet.bn_act(x, scale, shift, None, act)
    elif act == "relu":
        x = torch.relu(x)
    weight = empty_image(x, (grad.size(1), x.size(1) // groups, *kernel_size), x, grad)
    dw = _backward(grad, x, weight, (stride, padding, dilation), groups, [False, True])[1]
    return dw.to(accumulation_dtype(grad.dtype), memory_format=torch.channels_last)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients; of what is not differentiated it reads shape and layout alone."""
    stride, padding, dilation = (list(pair) for pair in geometry)
    given = (grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(*given, [*wanted, False])
