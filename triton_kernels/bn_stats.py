"""Each channel's mean and sum of squared deviations.

A program shifts what it reads by the mean of its first tile, so that squares are small whatever the
mean is; programs are joined in fp64 as Chan, Golub and LeVeque join them.
"""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype, memory_format

from . import reductions, tiles
from .checks import check_dim, check_dtype
from .launch import cdiv, launch


@triton.jit
def finite(x):
    """x, or zero: what is infinite has no deviations."""
    return tl.where(x - x == 0, x, 0.0)


@triton.jit
def bn_stats_kernel(
    x,
    means,
    m2s,
    images,
    channels,
    inner,
    tiles_a_run,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channels, inner = tiles.aligned(channels, inner, LAST, ALIGN)
    positions = tl.cast(images, tl.int64) * inner
    run, channel = reductions.run_of(channels, BC)
    begin = run.to(tl.int64) * tiles_a_run * BP
    n = tl.minimum(positions - begin, tiles_a_run * BP)

    row = tl.arange(0, BP)
    position = begin + row
    at = tiles.offsets(position, channel, channels, inner, LAST)
    mask = tiles.inside(position, channel, positions, channels)
    value = tiles.load(x, at, mask)
    first = finite(tl.sum(tl.where((row == 0)[:, None], value, 0.0), 0)[None, :])
    rest = tl.where(mask, value - first, 0.0)
    count = tl.minimum(n, BP).to(rest.dtype)
    # Of equal values exactly that value.
    center = finite(first + tl.sum(rest, 0)[None, :] / count)

    sum_d = tl.zeros_like(rest)
    sum_dd = tl.zeros_like(rest)
    for i in range(tiles_a_run):
        position = begin + i * BP + row
        at = tiles.offsets(position, channel, channels, inner, LAST)
        mask = tiles.inside(position, channel, positions, channels)
        d = tl.where(mask, tiles.load(x, at, mask) - center, 0.0)
        sum_d += d
        sum_dd += d * d
    total = reductions.total(sum_d)
    mean = total / n
    m2 = reductions.total(sum_dd) - total * mean
    reductions.put(means, run, channel, channels, tl.sum(center, 0).to(tl.float64) + mean)
    reductions.put(m2s, run, channel, channels, tl.where(m2 < 0, 0.0, m2))


@triton.jit
def bn_stats_finish_kernel(
    means,
    m2s,
    mean,
    m2,
    positions,
    a_run,
    runs,
    channels,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
):
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    has = channel < channels * tl.minimum(runs, 1)
    first = finite(tl.load(means + channel, mask=has, other=0))[None, :]
    total = tl.zeros([ROWS, BC], tl.float64)
    for row in range(0, runs, ROWS):
        at = row + tl.arange(0, ROWS)
        mask = tiles.inside(at, channel, runs, channels)
        offsets = at.to(tl.int64)[:, None] * channels + channel[None, :]
        n = tl.minimum(positions - at.to(tl.int64) * a_run, a_run)[:, None]
        other = tl.load(means + offsets, mask=mask, other=0) - first
        total += tl.where(mask, n * other, 0.0)
    joined = first + tl.sum(total, 0)[None, :] / tl.cast(positions, tl.float64)
    squares = tl.zeros([ROWS, BC], tl.float64)
    for row in range(0, runs, ROWS):
        at = row + tl.arange(0, ROWS)
        mask = tiles.inside(at, channel, runs, channels)
        offsets = at.to(tl.int64)[:, None] * channels + channel[None, :]
        n = tl.minimum(positions - at.to(tl.int64) * a_run, a_run)[:, None]
        d = tl.load(means + offsets, mask=mask, other=0) - joined
        squares += tl.load(m2s + offsets, mask=mask, other=0) + tl.where(mask, n * d * d, 0.0)
    tiles.store(mean, channel, tl.sum(joined, 0), channel < channels)
    tiles.store(m2, channel, tl.sum(squares, 0), channel < channels)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    op = "bn_stats"
    check_dim(op, "x", x, 4)
    check_dtype(op, "x", x)
    x = x.contiguous(memory_format=memory_format(x))
    plan = reductions.plan(x)
    partials = plan.partials(x, 2)
    launch(
        bn_stats_kernel,
        plan.grid,
        reads=[x],
        writes=partials,
        numbers=plan.numbers,
        **plan.meta,
    )
    channels = x.size(1)
    mean, m2 = (x.new_empty(channels, dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    launch(
        bn_stats_finish_kernel,
        (cdiv(channels, reductions.CHANNELS),),
        reads=partials,
        writes=[mean, m2],
        numbers=[plan.extent.positions, plan.positions_a_run, plan.runs, channels],
        finalizes=True,
        ROWS=reductions.ROWS,
        BC=reductions.CHANNELS,
    )
    return mean, m2
