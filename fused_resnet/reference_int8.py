"""The specification of the ops of 8-bit inference, in plain torch.

Sums of bytes are exact and every step after them is one rounding in float32, so that engines give
the same bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import _in_format_of, _per_channel


def _bytes(y: Tensor, zero: int, relu: bool) -> Tensor:
    """``clamp(round(y) + zero, 0, 255)``, halves to even; what is not a number is what is least."""
    least = y.new_tensor(0 if relu else -zero)
    bounded = torch.where(y > least, y, least).clamp(max=255 - zero)
    return (bounded.round() + zero).to(torch.uint8)


def quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """``clamp(round(x / scale) + zero, 0, 255)``: the bytes that stand for x.

    The division is by a multiplication with ``1 / scale``, rounded to float32. NaN becomes 0.
    """
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=x.device)
    return _in_format_of(_bytes(x * inverse, zero, False), x)


def conv_int8(
    x: Tensor,
    x_zero: int,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    out_zero: int | None,
) -> Tensor:
    """``act(conv2d(x, weight) * scale[c] + shift[c] + residual * residual_scale)`` of bytes.

    x is uint8, its padding ``x_zero``; weight is int8; residual uint8 or float32. With ``out_zero``
    the result is ``clamp(round(...) + out_zero, 0, 255)`` in uint8, else float32.
    """
    across, down = padding[1], padding[0]
    padded = F.pad(x.double(), [across, across, down, down], value=float(x_zero))
    sums = F.conv2d(padded, weight.double(), None, list(stride), 0, list(dilation), groups)
    y = sums.float()
    y = y * _per_channel(scale, y) + _per_channel(shift, y)
    if residual is not None:
        y = y + residual.float() * residual.new_tensor(residual_scale, dtype=torch.float32)
    if out_zero is not None:
        return _in_format_of(_bytes(y, out_zero, act == "relu"), x, weight)
    return _in_format_of(torch.relu(y) if act == "relu" else y, x, weight)
