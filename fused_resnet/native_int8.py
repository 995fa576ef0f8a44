"""The fake kernels of the ops of 8-bit inference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference


def _fake_quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    layout = reference.memory_format(x)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=layout)


def _fake_conv_int8(
    x: Tensor,
    x_zero: int,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    out_zero: int | None,
    packed: Tensor | None = None,
) -> Tensor:
    shape = reference.conv_shape(x.shape, weight.shape, stride, padding, dilation)
    layout = reference.memory_format(x, weight)
    dtype = torch.float32 if out_zero is None else torch.uint8
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "conv_int8": _fake_conv_int8,
}
