"""``sum g`` and ``sum g * (x - mean) * invstd``, g being what relu let through of grad."""

import triton
import triton.language as tl
from torch import Tensor

from . import bn_gradient, reductions, tiles
from .checks import channel_vector
from .launch import launch


@triton.jit
def bn_act_backward_reduce_kernel(
    grad,
    x,
    out,
    scale,
    shift,
    mean,
    invstd,
    sums_g,
    sums_gx,
    images,
    channels,
    inner,
    tiles_a_run,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channels, inner = tiles.aligned(channels, inner, LAST, ALIGN)
    positions = tl.cast(images, tl.int64) * inner
    run, channel = reductions.run_of(channels, BC)
    begin = run.to(tl.int64) * tiles_a_run * BP
    center = tiles.per_channel(mean, channel, channels)
    sum_g = tl.zeros([BP, BC], center.dtype)
    sum_gx = tl.zeros([BP, BC], center.dtype)
    for i in range(tiles_a_run):
        position = begin + i * BP + tl.arange(0, BP)
        at = tiles.offsets(position, channel, channels, inner, LAST)
        mask = tiles.inside(position, channel, positions, channels)
        g = bn_gradient.masked(grad, x, out, scale, shift, at, mask, channel, channels, RELU)
        g = tl.where(mask, g, 0.0)
        sum_g += g
        sum_gx += tl.where(mask, g * (tiles.load(x, at, mask) - center), 0.0)
    factor = tl.load(invstd + channel, mask=channel < channels, other=0).to(tl.float64)
    reductions.put(sums_g, run, channel, channels, reductions.total(sum_g))
    reductions.put(sums_gx, run, channel, channels, reductions.total(sum_gx) * factor)


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    op = "bn_act_backward_reduce"
    layout = bn_gradient.layout_of(x)
    given = bn_gradient.check_masked(op, grad, x, out, scale, shift, act, layout)
    mean = channel_vector(op, "mean", mean, grad)
    invstd = channel_vector(op, "invstd", invstd, grad)
    plan = reductions.plan(given.grad)
    partials = plan.partials(grad, 2)
    launch(
        bn_act_backward_reduce_kernel,
        plan.grid,
        reads=[*given, mean, invstd],
        writes=partials,
        numbers=plan.numbers,
        RELU=act == "relu",
        **plan.meta,
    )
    sums = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    reductions.finish(partials, sums)
    return sums
