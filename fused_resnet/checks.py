"""What the C++ ops check of their arguments, for the engines that are not C++.

The words are the same, so that an error reads alike whichever engine it comes from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import accumulation_dtype


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _device(op: str, argument: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise RuntimeError(
            f"{op}: {argument} must be on the device of x, {x.device}, got {t.device}"
        )


def _like(op: str, argument: str, t: Tensor | None, x: Tensor) -> None:
    if t is None:
        return
    if t.dtype != x.dtype:
        raise RuntimeError(f"{op}: {argument} must be {_name(x)} as x is, got {_name(t)}")
    _device(op, argument, t, x)


def _vector(op: str, argument: str, t: Tensor | None, channels: int, x: Tensor) -> None:
    """A vector of ``channels`` in the type that activations like x are accumulated in."""
    if t is None:
        return
    dtype = accumulation_dtype(x.dtype)
    if t.dtype != dtype:
        want = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: {argument} must be {want}, got {_name(t)}")
    _device(op, argument, t, x)
    if t.shape != (channels,):
        raise RuntimeError(f"{op}: {argument} must have shape [{channels}], got {list(t.shape)}")


def _activations(
    op: str, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> None:
    _vector(op, "scale", scale, x.size(1), x)
    _vector(op, "shift", shift, x.size(1), x)
    _like(op, "residual", residual, x)


def _statistics(op: str, mean: Tensor, *others: Tensor | None) -> None:
    if mean.dim() != 1:
        raise RuntimeError(
            f"{op}: running_mean must have 1 dimensions, got {mean.dim()} in {list(mean.shape)}"
        )
    for argument, t in zip(("running_var", "weight", "bias"), others, strict=False):
        if t is not None and t.shape != mean.shape:
            raise RuntimeError(
                f"{op}: {argument} must have shape {list(mean.shape)}, got {list(t.shape)}"
            )
        _like(op, argument, t, mean)


def _convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if groups < 1 or weight.size(0) % groups:
        raise RuntimeError(
            f"{op}: groups must be positive and divide the output channels {weight.size(0)}, got "
            f"{groups}"
        )
    _like(op, "weight", weight, x)
    if x.size(1) != weight.size(1) * groups:
        raise RuntimeError(
            f"{op}: x must have {weight.size(1) * groups} channels for weight "
            f"{list(weight.shape)} and groups {groups}, got {x.size(1)}"
        )
    for i in (0, 1):
        reach = dilation[i] * (weight.size(i + 2) - 1) + 1
        if reach > x.size(i + 2) + 2 * padding[i]:
            raise RuntimeError(
                f"{op}: kernel {list(weight.shape[2:])} with dilation {list(dilation)} is larger "
                f"than the padded input {list(x.shape)}"
            )
    _vector(op, "scale", scale, weight.size(0), x)
    _vector(op, "shift", shift, weight.size(0), x)
    _like(op, "residual", residual, x)


def _inputs(op: str, inputs: Sequence[Tensor]) -> None:
    for t in inputs:
        _like(op, "every input", t, inputs[0])


def arguments(op: str, *args: Any) -> None:
    """Check the arguments of a call of ``op``, given as its schema has them.

    Raises:
        RuntimeError: one of them has a shape, dtype or device the op does not take.
    """
    if op == "conv_bn_act":
        _convolution(op, *args[:9])
    elif op == "bn_act":
        _activations(op, *args[:4])
    elif op == "bn_act_maxpool":
        _activations(op, *args[:3])
    elif op == "bn_scale_shift":
        _statistics(op, *args[:4])
    elif op == "eltwise_act":
        _inputs(op, args[0])


def residual(op: str, t: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Check that a residual can be added to an output of ``shape``.

    Raises:
        RuntimeError: it does not broadcast with the output, or is on another device.
    """
    _device(op, "residual", t, x)
    try:
        torch.broadcast_shapes(t.shape, shape)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: residual must broadcast with the output {tuple(shape)}, got {tuple(t.shape)}"
        ) from error
