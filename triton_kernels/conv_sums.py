"""Puts together what ``conv_gemm`` has reduced of each tile of rows, in order and in float64."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch

#: Tiles and channels that a program loads at once.
_BLOCK = {"TILES": 128, "CHANNELS": 16, "num_warps": 4}


@triton.jit
def _place(start, channel, tiles, channels, TILES: tl.constexpr):
    tile = start + tl.arange(0, TILES)
    mask = (tile < tiles)[:, None] & (channel < channels)[None, :]
    return tile, tile.to(tl.int64)[:, None] * channels + channel[None, :], mask


@triton.jit
def moments_kernel(
    means,
    deviations,
    mean,
    m2,
    tiles,
    channels,
    rows,
    block,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Chan's formula over tiles of ``block`` rows, the last of which may be short."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    whole = tl.zeros((CHANNELS,), dtype=tl.float64)
    for start in range(0, tiles, TILES):
        tile, at, mask = _place(start, channel, tiles, channels, TILES)
        count = tl.minimum(rows - tile.to(tl.int64) * block, block).to(tl.float64)
        value = tl.load(means + at, mask=mask, other=0.0).to(tl.float64)
        whole += tl.sum(tl.where(mask, value * count[:, None], 0.0), axis=0)
    whole = whole / tl.cast(rows, tl.float64)
    total = tl.zeros((CHANNELS,), dtype=tl.float64)
    for start in range(0, tiles, TILES):
        tile, at, mask = _place(start, channel, tiles, channels, TILES)
        count = tl.minimum(rows - tile.to(tl.int64) * block, block).to(tl.float64)
        away = tl.load(means + at, mask=mask, other=0.0).to(tl.float64) - whole[None, :]
        own = tl.load(deviations + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(mask, own + away * away * count[:, None], 0.0), axis=0)
    present = channel < channels
    tl.store(mean + channel, whole.to(mean.dtype.element_ty), mask=present)
    tl.store(m2 + channel, total.to(m2.dtype.element_ty), mask=present)


@triton.jit
def sums_kernel(
    first,
    second,
    factor,
    sum_first,
    sum_second,
    tiles,
    channels,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sums of both over tiles, the second times ``factor``."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    a = tl.zeros((CHANNELS,), dtype=tl.float64)
    b = tl.zeros((CHANNELS,), dtype=tl.float64)
    for start in range(0, tiles, TILES):
        _, at, mask = _place(start, channel, tiles, channels, TILES)
        a += tl.sum(tl.load(first + at, mask=mask, other=0.0).to(tl.float64), axis=0)
        b += tl.sum(tl.load(second + at, mask=mask, other=0.0).to(tl.float64), axis=0)
    present = channel < channels
    b = b * tl.load(factor + channel, mask=present, other=0.0)
    tl.store(sum_first + channel, a.to(sum_first.dtype.element_ty), mask=present)
    tl.store(sum_second + channel, b.to(sum_second.dtype.element_ty), mask=present)


def new_sums(tiles: int, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``conv_gemm`` leaves what it reduces, in the accumulation type that ``like`` has."""
    return like.new_empty((tiles, channels)), like.new_empty((tiles, channels))


def moments(sums: tuple[Tensor, Tensor], rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations of all ``rows``."""
    tiles, channels = sums[0].shape
    results = sums[0].new_empty(channels), sums[0].new_empty(channels)
    grid = (cdiv(channels, _BLOCK["CHANNELS"]),)
    numbers = (tiles, channels, rows, block)
    launch(moments_kernel, grid, sums, results, numbers, finalizes=True, **_BLOCK)
    return results


def total(sums: tuple[Tensor, Tensor], factor: Tensor) -> tuple[Tensor, Tensor]:
    """Their sums over all tiles, the second's times ``factor``."""
    tiles, channels = sums[0].shape
    results = sums[0].new_empty(channels), sums[0].new_empty(channels)
    grid = (cdiv(channels, _BLOCK["CHANNELS"]),)
    launch(sums_kernel, grid, (*sums, factor), results, (tiles, channels), finalizes=True, **_BLOCK)
    return results
