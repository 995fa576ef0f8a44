"""``max_pool2d(act(conv2d(x, weight) * scale[c] + shift[c]))`` without an image in between.

A program has a tile of one image's pooled pixels. The positions that their windows read are the
rows of one implicit matrix product; activated and rounded, they stay on the chip, where maxima are
taken down the windows and then across. What two tiles' windows share is computed in both: of a
ResNet's stem, 256 rows of a half type have 8x7 pooled pixels, 4.6 rows each where 4 are needed (a
product for each position of a window would be 9).
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image

from . import conv_configs, tiles
from .bn_act_maxpool import bn_act_maxpool
from .conv_bn_act import checked, conv_bn_act
from .conv_shapes import channels_last, for_writing, precision
from .launch import cdiv, launch, next_power_of_2
from .pooling import Pooling


@triton.jit
def maxima(y, first, step, place, length, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """Over the rows ``first + k * step`` of y, of each k whose ``place + k * DILATION`` lies inside
    a dimension of that length."""
    best = tl.full([first.shape[0], y.shape[1]], float("-inf"), y.dtype)
    for k in tl.static_range(KERNEL):
        at = place + k * DILATION
        inside = ((at >= 0) & (at < length))[:, None]
        # Rows of a tile that is not full go nowhere.
        row = tl.minimum(first + k * step, y.shape[0] - 1)
        value = tl.gather(y, tl.broadcast_to(row[:, None], best.shape), 0)
        best = tl.where(inside, tiles.maximum(best, value), best)
    return best


@triton.jit
def conv_bn_act_maxpool_kernel(
    x,  # [batch, height, width, CHANNELS]
    weight,  # [channels, KERNEL_H, KERNEL_W, CHANNELS]
    scale,  # of a channel; or None
    shift,
    out,  # [batch, out_height, out_width, channels]
    height,
    width,
    conv_height,
    conv_width,
    out_height,
    out_width,
    channels,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POOL_KERNEL_H: tl.constexpr,
    POOL_KERNEL_W: tl.constexpr,
    POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr,
    POOL_PADDING_H: tl.constexpr,
    POOL_PADDING_W: tl.constexpr,
    POOL_DILATION_H: tl.constexpr,
    POOL_DILATION_W: tl.constexpr,
    TILE_H: tl.constexpr,  # pooled pixels
    TILE_W: tl.constexpr,
    READ_W: tl.constexpr,  # columns that a tile's windows read
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,  # the type that counts elements of an image of x
    BLOCK_M: tl.constexpr,  # positions read
    BLOCK_D: tl.constexpr,  # maxima taken down
    BLOCK_P: tl.constexpr,  # and across
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(channels, BLOCK_N)
    tiles_w = tl.cdiv(out_width, TILE_W)
    tiles_h = tl.cdiv(out_height, TILE_H)
    program = tl.program_id(0)
    column = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < channels
    tile = program // column_tiles
    out_w = tile % tiles_w * TILE_W
    out_h = tile // tiles_w % tiles_h * TILE_H
    image = (tile // (tiles_w * tiles_h)).to(tl.int64)

    # Where the tile's windows begin, and what its positions read by the first tap.
    top = out_h * POOL_STRIDE_H - POOL_PADDING_H
    left = out_w * POOL_STRIDE_W - POOL_PADDING_W
    row = tl.arange(0, BLOCK_M)
    h = (top + row // READ_W) * STRIDE_H - PADDING_H
    w = (left + row % READ_W) * STRIDE_W - PADDING_W
    x += image * height * width * CHANNELS
    x_row = (h.to(INDEX) * width + w) * CHANNELS

    DEPTH: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    weight_column = weight + column.to(tl.int64) * DEPTH
    for step in range(tl.cdiv(DEPTH, BLOCK_K)):
        place = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = place // CHANNELS
        step_h = tap // KERNEL_W * DILATION_H
        step_w = tap % KERNEL_W * DILATION_W
        at_h = h[:, None] + step_h[None, :]
        at_w = w[:, None] + step_w[None, :]
        mask = (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
        mask = mask & (place < DEPTH)[None, :]
        moved = (step_h.to(INDEX) * width + step_w) * CHANNELS + place % CHANNELS
        a = tl.load(x + (x_row[:, None] + moved[None, :]), mask=mask, other=0.0)
        mask = (place < DEPTH)[:, None] & is_column[None, :]
        b = tl.load(weight_column[None, :] + place[:, None], mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if scale is not None:
        acc = acc * tl.load(scale + column, mask=is_column, other=0.0)[None, :]
    if shift is not None:
        acc = acc + tl.load(shift + column, mask=is_column, other=0.0)[None, :]
    y = tiles.activate(acc, RELU).to(out.dtype.element_ty)

    down = tl.arange(0, BLOCK_D)
    i = down // READ_W * POOL_STRIDE_H
    y = maxima(
        y,
        i * READ_W + down % READ_W,
        POOL_DILATION_H * READ_W,
        top + i,
        conv_height,
        POOL_KERNEL_H,
        POOL_DILATION_H,
    )
    pixel = tl.arange(0, BLOCK_P)
    j = pixel % TILE_W * POOL_STRIDE_W
    y = maxima(
        y,
        pixel // TILE_W * READ_W + j,
        POOL_DILATION_W,
        left + j,
        conv_width,
        POOL_KERNEL_W,
        POOL_DILATION_W,
    )
    out_h += pixel // TILE_W
    out_w += pixel % TILE_W
    is_pixel = (pixel < TILE_H * TILE_W) & (out_h < out_height) & (out_w < out_width)
    at = ((image * out_height + out_h) * out_width + out_w) * channels
    tl.store(out + (at[:, None] + column[None, :]), y, mask=is_pixel[:, None] & is_column[None, :])


def reads(count: int, pool: Pooling, i: int) -> int:
    """Positions along dimension i that so many adjacent windows read."""
    return (count - 1) * pool.stride[i] + pool.dilation[i] * (pool.kernel_size[i] - 1) + 1


@functools.lru_cache(maxsize=1024)
def tile_of(rows: int, height: int, width: int, pool: Pooling) -> tuple[int, int] | None:
    """The pooled pixels of a tile, such that its windows read at most so many positions and tiles
    are few; None where a single window reads more."""
    best = None
    for w in range(1, width + 1):
        lines = rows // reads(w, pool, 1)
        if lines < reads(1, pool, 0):
            break
        h = min(height, (lines - reads(1, pool, 0)) // pool.stride[0] + 1)
        count = cdiv(height, h) * cdiv(width, w)
        if best is None or count < best[0]:
            best = count, (h, w)
    return None if best is None else best[1]


def conv_bn_act_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    ceil_mode: bool,
    act: str,
) -> Tensor:
    """See :func:`fused_resnet.reference.conv_bn_act_maxpool`."""
    op = "conv_bn_act_maxpool"
    geometry = (stride, padding, dilation, 1)
    shape, epilogue = checked(op, x, weight, scale, shift, None, *geometry, act)
    pool = Pooling(*map(tuple, (kernel_size, pool_stride, pool_padding, pool_dilation)))
    pool.check(op)
    height, width = pool.output_size(op, shape.out_sizes, ceil_mode)
    config = conv_configs.pooled(x.dtype)
    tile = tile_of(config.m, height, width, pool)
    if tile is None:  # a window for which the image has to be there
        y = conv_bn_act(x, weight, scale, shift, None, *geometry, act)
        ones = y.new_ones(shape.out_channels, dtype=accumulation_dtype(y.dtype))
        return bn_act_maxpool(y, ones, torch.zeros_like(ones), *pool, ceil_mode, "none")
    result = empty_image(x, (shape.batch, shape.out_channels, height, width), x, weight)
    out = for_writing(result)
    pairs = {
        "KERNEL": shape.kernel,
        "STRIDE": shape.stride,
        "PADDING": shape.padding,
        "DILATION": shape.dilation,
        **{f"POOL_{name.upper().removesuffix('_SIZE')}": p for name, p in pool._asdict().items()},
        "TILE": tile,
    }
    read_w = reads(tile[1], pool, 1)
    elements = (shape.size[0] + 2 * shape.padding[0]) * (shape.size[1] + 2 * shape.padding[1])
    programs = shape.batch * cdiv(height, tile[0]) * cdiv(width, tile[1])
    launch(
        conv_bn_act_maxpool_kernel,
        (programs * cdiv(shape.out_channels, config.n),),
        reads=[channels_last(x), channels_last(weight), epilogue.scale, epilogue.shift],
        writes=[out],
        numbers=[*shape.size, *shape.out_size, height, width, shape.out_channels],
        CHANNELS=shape.in_channels,
        **{f"{k}_{axis}": pair[i] for k, pair in pairs.items() for i, axis in enumerate("HW")},
        READ_W=read_w,
        RELU=act == "relu",
        PRECISION=precision(x.dtype),
        INDEX=tl.int32 if elements * shape.in_channels < 2**30 else tl.int64,
        BLOCK_D=next_power_of_2(tile[0] * read_w),
        BLOCK_P=next_power_of_2(tile[0] * tile[1]),
        **config.meta,
    )
    return result if out is result else result.copy_(out)
