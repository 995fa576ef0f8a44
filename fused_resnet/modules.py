"""Modules to build networks from, and the two steps every fused forward is made of."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import engines, functional, vendor
from .conditions import (
    needs_grad,
    obstacle,
    params_of,
    recording,
    trains,
    uses_batch_statistics,
)
from .moments import count_batches
from .native import below_autograd
from .plan import Plan, Pool, Step
from .reference import conv_shape, suggests_channels_last
from .sync_batch_norm import group_of
from .training import Chain


def pair_scale_shift(conv: nn.Conv2d, bn: Any) -> tuple[Tensor, Tensor]:
    """A BatchNorm's scale and shift in evaluation, for the output of ``conv`` without its bias."""
    _, bias, gamma, beta, mean, var = params_of(conv, bn)
    scale, shift = functional.bn_scale_shift(mean, var, gamma, beta, bn.eps)  # type: ignore[arg-type]
    if bias is not None:
        shift = torch.addcmul(shift, bias.to(shift.dtype), scale)
    return scale, shift


def conv_bn(
    conv: Any, bn: Any, x: Tensor, act: str = "none", residual: Tensor | None = None
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` in evaluation, from the modules' tensors as they are now."""
    tensors = params_of(conv, bn)
    by_vendor = functional.conv_engine(x, tensors.weight, conv.groups) == "vendor"
    if by_vendor and not needs_grad((x, residual, *tensors)):
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return vendor.conv_batch_norm_act(x, tensors, bn.eps, residual, *geometry, act)
    scale, shift = pair_scale_shift(conv, bn)
    return convolve(conv, x, scale, shift, residual, act)


def in_steps(conv: Any, bn: Any, x: Tensor, act: str, residual: Tensor | None) -> Tensor:
    """``act(bn(conv(x)) + residual)`` as torch computes it."""
    y = bn(conv(x))
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def joins(shortcut: Any, x: Tensor) -> bool:
    """Whether the wish has a kernel of two products, for a shortcut's convolution of x. Pure."""
    wish, kind = engines.wish(), x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    pointwise = shortcut.kernel_size == (1, 1) and shortcut.padding == (0, 0)
    return (
        wish not in ("auto", "reference")
        and engines.why_not(wish, "bn_act_conv_bn_act", kind, dtype) is None
        and pointwise
        and shortcut.groups == 1
        and suggests_channels_last(x)
    )


def conv_bn_joined(
    pair: tuple[Any, Any], shortcut: tuple[Any, Any], y: Tensor, x: Tensor, act: str
) -> Tensor:
    """``act(bn(conv(y)) + bn(conv(x)))`` of both pairs in evaluation, where that :func:`joins`."""
    (conv, own), (scale, shift) = (pair[0], shortcut[0]), pair_scale_shift(*pair)
    scale2, shift2 = pair_scale_shift(*shortcut)
    y, x = as_autocast(y), as_autocast(x)
    first = (None, None, "none", conv.weight.to(y.dtype), scale, shift + shift2, None)
    second = (x, own.weight.to(y.dtype), scale2, list(own.stride))
    args = (y, *first, *geometry_of(conv), act, *second)
    with below_autograd():
        return engines.implementation("bn_act_conv_bn_act", engines.wish())(*args)


def conv_bn_chain(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, act: str = "none", residual: Tensor | None = None
) -> Tensor:
    """The same, in training or evaluation: a :func:`chain` of one where that is needed."""
    if not trains([(conv, bn)], x, residual):
        return conv_bn(conv, bn, x, act, residual)
    if residual is None:
        return chain([(conv, bn)], x, act=act)
    x = as_autocast(x)
    shape = conv_shape(x.shape, conv.weight.shape, *geometry_of(conv)[:3])
    if residual.dtype == x.dtype and residual.shape == shape:
        return chain([(conv, bn)], x, residual, act=act)
    return functional.add_act(chain([(conv, bn)], x, act="none"), residual, act)


def chain(
    pairs: Sequence[tuple[Any, Any]],
    x: Tensor,
    residual: Tensor | None = None,
    *,
    shortcut: tuple[Any, Any] | None = None,
    identity: bool = False,
    act: str = "relu",
    pool: Pool | None = None,
    memory: str = "auto",
) -> Tensor:
    """``act(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + r)`` with all that training asks of it.

    ``r`` is the residual, ``bn(conv(x))`` of the shortcut, or x (``identity``); ``pool`` pools the
    result. Autograd sees one node; running statistics move as BatchNorm2d moves them.
    """
    every = [*pairs, shortcut] if shortcut is not None else pairs
    steps: list[Step] = []
    tensors: list[Tensor | None] = []
    batch = [uses_batch_statistics(bn) for _, bn in every]
    moves = [own and _moves(bn) for (_, bn), own in zip(every, batch, strict=True)]
    shares = iter(count_batches(*(bn for (_, bn), m in zip(every, moves, strict=True) if m)))
    for (conv, bn), of_batch, moved in zip(every, batch, moves, strict=True):
        share = next(shares) if moved else 0.0
        steps.append(Step(*geometry_of(conv), bn.eps, of_batch, share))
        *learned, mean, var = params_of(conv, bn)
        tensors += learned + ([None, None] if of_batch and not moved else [mean, var])
    groups = [group_of(bn) for _, bn in every]
    group = max(groups, key=lambda g: g is not None)
    own = steps.pop() if shortcut is not None else None
    plan = Plan(tuple(steps), own, identity, act, pool, engines.wish(), group, memory)
    return Chain.apply(plan, as_autocast(x), residual, *tensors)


def as_autocast(x: Tensor) -> Tensor:
    """What autocast would have a convolution read."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def geometry_of(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups, as the ops take them."""
    padding: Any = conv.padding
    return list(conv.stride), list(padding), list(conv.dilation), conv.groups


def _moves(bn: Any) -> bool:
    """Whether the statistics of a batch go into a BatchNorm's running ones."""
    return bn.training and bn.track_running_stats


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


def convolve_pooled(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    pool: Pool,
) -> Tensor | None:
    """``maxpool(relu(conv(x) * scale + shift))`` as one op, or None where ``engine`` has none."""
    op = "conv_bn_act_maxpool"
    *pairs, groups = geometry
    if groups != 1 or not engines.pools(op, engine, x.device.type, x.dtype):
        return None
    with below_autograd():
        return engines.implementation(op, engine)(
            x, weight.to(x.dtype), scale, shift, *pairs, *pool, "relu"
        )


def convolve_averaged(
    engine: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    residual: Tensor,
    act: str,
) -> Tensor:
    """The means of the images of ``act(conv(x) * scale + shift + residual)``, by one op."""
    op = engines.implementation("conv_bn_act_avgpool", engine)
    with below_autograd():
        return op(x, weight.to(x.dtype), scale, shift, residual, *geometry, act)


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
        if recording() is not None:
            y = super().forward(input)
            y = y if residual is None else y + residual
            return F.relu(y) if self.act == "relu" else y
        # What torch's own forward does before it calls the function.
        self._check_input_dim(input)
        factor = count_batches(self)[0] if self.training else 0.0
        keeps = not self.training or self.track_running_stats
        return functional.batch_norm_act(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            residual,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
            self.act,
        )

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
            return conv_bn_chain(self.conv, self.bn, x, self.act, residual)
        return in_steps(self.conv, self.bn, x, self.act, residual)

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
