"""Argument checks and layouts, as csrc/torch/checks.h has them, with the same messages: "op:
argument must be ..., got ...". All raise RuntimeError."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fused_resnet.reference import accumulation_dtype

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


def name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "a type that is not floating point")


def check_dtype(op: str, argument: str, t: Tensor) -> None:
    if t.dtype not in _NAMES:
        fail(
            op,
            f"{argument} must be {', '.join(list(_NAMES.values())[:-1])} or float16, "
            f"got {name(t.dtype)}",
        )


def check_act(op: str, act: str) -> None:
    if act not in ("none", "relu"):
        fail(op, f'act must be "none" or "relu", got "{act}"')


def check_dim(op: str, argument: str, t: Tensor, dim: int) -> None:
    if t.dim() != dim:
        fail(op, f"{argument} must have {dim} dimensions, got {t.dim()} in {list(t.shape)}")


def check_like(op: str, argument: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """``t`` must have the dtype and device of ``x``, an argument called ``of``."""
    if t.dtype != x.dtype:
        fail(op, f"{argument} must be {name(x.dtype)} as {of} is, got {name(t.dtype)}")
    if t.device != x.device:
        fail(op, f"{argument} must be on the device of {of}")


def check_sizes(op: str, argument: str, t: Tensor, sizes: Sequence[int]) -> None:
    if t.shape != tuple(sizes):
        fail(op, f"{argument} must have shape {list(sizes)}, got {list(t.shape)}")


def vector(
    op: str, argument: str, t: Tensor, channels: int, dtype: torch.dtype, x: Tensor
) -> Tensor:
    """``t``, dense, checked to hold a number of ``dtype`` per channel on the device of x."""
    if t.dtype != dtype:
        fail(op, f"{argument} must be {name(dtype)}, got {name(t.dtype)}")
    if t.device != x.device:
        fail(op, f"{argument} must be on the device of x")
    check_sizes(op, argument, t, (channels,))
    return t.contiguous()


def channel_vector(op: str, argument: str, t: Tensor, x: Tensor) -> Tensor:
    """A :func:`vector` of x's channels in the type x is accumulated in."""
    return vector(op, argument, t, x.size(1), accumulation_dtype(x.dtype), x)


def check_accumulation(op: str, argument: str, t: Tensor) -> None:
    """``t`` must be of a type that others are accumulated in."""
    check_dtype(op, argument, t)
    if t.dtype != accumulation_dtype(t.dtype):
        fail(op, f"{argument} must be float32 or float64, got {name(t.dtype)}")


def beside_weight(op: str, argument: str, t: Tensor, weight: Tensor) -> Tensor:
    """``t``, dense, of weight's sizes and in the type it is accumulated in."""
    dtype = accumulation_dtype(weight.dtype)
    if t.dtype != dtype:
        fail(op, f"{argument} must be {name(dtype)}, got {name(t.dtype)}")
    if t.device != weight.device:
        fail(op, f"{argument} must be on the device of weight")
    check_sizes(op, argument, t, weight.shape)
    return t.contiguous()


def check_pair(op: str, argument: str, pair: Sequence[int], least: int) -> None:
    if len(pair) != 2 or min(pair) < least:
        fail(op, f"{argument} must be two integers of at least {least}, got {list(pair)}")


def laid_out_as(t: Tensor, layout: Tensor) -> Tensor:
    """``t`` itself, or a copy with the strides ``layout`` has."""
    same = all(
        n <= 1 or a == b for n, a, b in zip(t.shape, t.stride(), layout.stride(), strict=True)
    )
    return t if same else torch.empty_like(layout).copy_(t)
