"""``max_pool2d(act(x * scale[c] + shift[c]))``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import empty_image, memory_format

from . import pooling, tiles
from .bn_act import check_bn_act
from .checks import check_act
from .launch import launch
from .pooling import Pooling


@triton.jit
def bn_act_maxpool_kernel(
    x,
    scale,
    shift,
    out,
    argmax,
    positions,
    channels,
    height,
    width,
    out_height,
    out_width,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    SMALL: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channels, _ = tiles.aligned(channels, 1, LAST, ALIGN)
    position, channel = tiles.tile_of(channels, BP, BC)
    image, row, column = pooling.split(position, out_height, out_width, SMALL)
    mask = tiles.inside(position, channel, positions, channels)
    a = tiles.per_channel(scale, channel, channels)
    b = tiles.per_channel(shift, channel, channels)
    best = tl.full([BP, BC], float("-inf"), a.dtype)
    place = tl.full([BP, BC], -1, tl.int32)
    for i in tl.static_range(KH):
        h = row * SH - PH + i * DH
        for j in tl.static_range(KW):
            w = column * SW - PW + j * DW
            valid = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            pixel = (h * width + w)[:, None]
            at = pooling.offsets(image, pixel, channel, channels, height * width, LAST)
            here = mask & valid[:, None]
            y = tiles.activate(tiles.scale_shift(tiles.load(x, at, here), a, b), RELU)
            # The first of equal ones, and NaN before all: what compares with none.
            taken = here & ((y > best) | (y != y) | (place < 0))
            best = tl.where(taken, y, best)
            place = tl.where(taken, i * KW + j, place)
    pixel = (row * out_width + column)[:, None]
    at = pooling.offsets(image, pixel, channel, channels, out_height * out_width, LAST)
    tiles.store(out, at, best, mask)
    if argmax is not None:
        tl.store(argmax + at, place.to(tl.uint8), mask=mask)


def run(
    op: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: Pooling,
    ceil_mode: bool,
    act: str,
    with_argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The pooled tensor, and where in its window each maximum is."""
    scale, shift = check_bn_act(op, x, scale, shift)
    check_act(op, act)
    pool.check(op)
    if with_argmax:
        pool.check_positions(op)
    height, width = pool.output_size(op, x.shape, ceil_mode)
    shape = (*x.shape[:2], height, width)
    out = empty_image(x, shape, x)
    argmax = torch.empty_like(out, dtype=torch.uint8) if with_argmax else None
    extent = pooling.pixels(out)
    config = tiles.config_for(out, out.numel())
    tile = extent.tile(min(config.elements, pooling.MOST_ELEMENTS))
    launch(
        bn_act_maxpool_kernel,
        (extent.programs(tile),),
        reads=[x.contiguous(memory_format=memory_format(x)), scale, shift],
        writes=[out, argmax],
        numbers=[extent.positions, x.size(1), *x.shape[2:], height, width],
        RELU=act == "relu",
        **pool.meta(x),
        **extent.meta(tile, config),
    )
    return out, argmax


def bn_act_maxpool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    act: str,
) -> Tensor:
    pool = Pooling(kernel_size, stride, padding, dilation)
    return run("bn_act_maxpool", x, scale, shift, pool, ceil_mode, act)[0]
