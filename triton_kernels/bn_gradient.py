"""BatchNorm's gradient behind an activation: what its kernels share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import memory_format

from . import tiles
from .checks import (
    channel_vector,
    check_act,
    check_dim,
    check_dtype,
    check_like,
    check_sizes,
    fail,
)
from .launch import bits


@triton.jit
def masked(grad, x, out, scale, shift, at, mask, channel, channels, RELU: tl.constexpr):
    """A tile of the gradient that the forward pass's relu let through; without ``out`` x makes the
    mask."""
    g = tiles.load(grad, at, mask)
    if RELU:
        if out is not None:
            y = tiles.load(out, at, mask)
        else:
            a = tiles.per_channel(scale, channel, channels)
            b = tiles.per_channel(shift, channel, channels)
            y = tiles.scale_shift(tiles.load(x, at, mask), a, b)
            # As the stored activation was: rounding can make a positive number zero.
            y = tiles.wide(y.to(x.dtype.element_ty))
        g = tiles.relu_backward(y, g)
    return g


@triton.jit
def of_batch_norm(
    g, x, scale, mean, invstd, sum_g, sum_gx, inverse_count, at, mask, channel, channels
):
    """A tile of x's gradient, g being that of BatchNorm's output. Of fixed statistics without
    sums."""
    a = tiles.per_channel(scale, channel, channels)
    dx = g * a
    if sum_g is not None:
        share = -a * tiles.double(inverse_count).to(a.dtype)
        slope = share * tiles.per_channel(invstd, channel, channels)
        slope *= tiles.per_channel(sum_gx, channel, channels)
        offset = share * tiles.per_channel(sum_g, channel, channels)
        centered = tiles.load(x, at, mask) - tiles.per_channel(mean, channel, channels)
        dx += centered * slope + offset
    return dx


class Masked(NamedTuple):
    """The tensors that :func:`masked` reads, checked, dense and in one layout."""

    grad: Tensor
    x: Tensor | None
    out: Tensor | None
    scale: Tensor
    shift: Tensor


def check_masked(
    op: str,
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    layout: torch.memory_format,
) -> Masked:
    check_dim(op, "grad", grad, 4)
    check_dtype(op, "grad", grad)
    check_act(op, act)

    def like_grad(argument: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        check_like(op, argument, t, grad, "grad")
        check_sizes(op, argument, t, grad.shape)
        return t.contiguous(memory_format=layout)

    x, out = like_grad("x", x), like_grad("out", out)
    if x is None and out is None and act == "relu":
        fail(op, 'out must be given with act "relu" and without x, got neither')
    vectors = channel_vector(op, "scale", scale, grad), channel_vector(op, "shift", shift, grad)
    return Masked(grad.contiguous(memory_format=layout), x, out, *vectors)


class Sums(NamedTuple):
    """What :func:`of_batch_norm` takes of batch statistics, or nothing of fixed ones."""

    mean: Tensor | None
    invstd: Tensor | None
    sum_g: Tensor | None
    sum_gx: Tensor | None


def check_sums(
    op: str,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    x: Tensor | None,
    grad: Tensor,
) -> tuple[Sums, int]:
    """Checked, and the bits of 1 / count."""
    given = Sums(mean, invstd, sum_g, sum_gx)
    batch = sum_g is not None
    if any((t is not None) != batch for t in given):
        fail(op, "mean, invstd, sum_g and sum_gx must be given together, got some")
    if x is None and batch:
        fail(op, "x must be given with sum_g, got none")
    if not (count > 0 if batch else count == 0):
        wanted = "more than 0 with" if batch else "0 without"
        fail(op, f"count must be {wanted} sum_g, got {count:g}")
    if not batch:
        return given, bits(0.0)
    vectors = (channel_vector(op, argument, t, grad) for argument, t in given._asdict().items())
    return Sums(*vectors), bits(1 / count)


def layout_of(t: Tensor) -> torch.memory_format:
    """What a gradient shall have; of a tensor that check_masked refuses, anything."""
    return memory_format(t) if t.dim() == 4 else torch.contiguous_format
