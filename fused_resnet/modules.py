"""Modules to build networks from, and the two steps every fused forward is made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .conditions import norm_takes, obstacle, recording


def scale_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm's per-channel scale and shift in evaluation, from its tensors as they are now."""
    b: Any = bn  # nn.Module's attributes are Tensor | Module to a type checker
    return functional.bn_scale_shift(b.running_mean, b.running_var, b.weight, b.bias, b.eps)


def pair_scale_shift(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """:func:`scale_shift` for the output of ``conv`` without its bias."""
    scale, shift = scale_shift(bn)
    if conv.bias is not None:
        shift = torch.addcmul(shift, conv.bias.to(shift.dtype), scale)
    return scale, shift


def conv_bn(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, act: str = "none", residual: Tensor | None = None
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` in evaluation, from the modules' tensors as they are now."""
    scale, shift = pair_scale_shift(conv, bn)
    return convolve(conv, x, scale, shift, residual, act)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """:func:`fused_resnet.functional.conv_bn_act` with a module's weight and geometry."""
    return functional.conv_bn_act(
        x,
        conv.weight,
        scale,
        shift,
        residual,
        conv.stride,
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,
        conv.groups,
        act,
    )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether a BatchNorm's next forward takes its statistics from the batch."""
    return bn.training or bn.running_mean is None or bn.running_var is None


class BatchNormAct2d(nn.BatchNorm2d):
    """``act(bn(x) + residual)``: :class:`torch.nn.BatchNorm2d` with what follows it in a block.

    Checkpoints are those of BatchNorm2d.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in BatchNorm2d.
        act: ``"none"`` or ``"relu"``.

    Shape:
        input (N, C, H, W), residual broadcastable to it; output as input.
    """

    def __init__(self, num_features: int, *args: Any, act: str = "relu", **kwargs: Any) -> None:
        functional.check_act("BatchNormAct2d", act)
        super().__init__(num_features, *args, **kwargs)
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = (input, self.weight, self.bias, residual)
        # torch decides what eps may be, and reports it.
        if (
            uses_batch_statistics(self)
            or self.eps <= 0
            or not norm_takes(self, input.dtype)
            or self.running_var.shape != input.shape[1:2]  # type: ignore[union-attr]
            or self.running_mean.shape != input.shape[1:2]  # type: ignore[union-attr]
            or recording() is not None
            or functional.needs_grad(tensors)
        ):
            y = super().forward(input)
            y = y if residual is None else y + residual
            return F.relu(y) if self.act == "relu" else y
        self._check_input_dim(input)
        return functional.bn_act(input, *scale_shift(self), residual, self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class ConvBNAct2d(nn.Module):
    """``act(bn(conv(x)) + residual)``.

    The submodules are a real :class:`torch.nn.Conv2d` ``conv`` and :class:`torch.nn.BatchNorm2d`
    ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in Conv2d.
        bias: whether the convolution has one; BatchNorm makes it redundant.
        eps, momentum: of the BatchNorm.
        act: ``"none"`` or ``"relu"``.

    Shape:
        x (N, C, H, W), residual broadcastable to the output (N, K, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
    ) -> None:
        functional.check_act("ConvBNAct2d", act)
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if obstacle([(self.conv, self.bn)], [], x, residual) is None:
            return conv_bn(self.conv, self.bn, x, self.act, residual)
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return F.relu(y) if self.act == "relu" else y

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class AddAct(nn.Module):
    """``act(x1 + x2 + ...)``: the end of a residual block.

    Args:
        act: ``"none"`` or ``"relu"``.
    """

    def __init__(self, act: str = "relu") -> None:
        functional.check_act("AddAct", act)
        super().__init__()
        self.act = act

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional.eltwise_act(inputs, "sum", None, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"
