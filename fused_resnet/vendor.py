"""The vendor engine: torch's own convolution (oneDNN, cuDNN), then one in-place pass of ours over
its output for scale, shift, residual and activation, in the accumulation type."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype


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
