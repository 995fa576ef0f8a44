"""The mean of each image's channel."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import empty_image, memory_format, suggests_channels_last

from . import tiles
from .checks import check_dim, check_dtype
from .launch import cdiv, launch
from .reductions import MOST_ELEMENTS


@triton.jit
def global_avg_pool_kernel(
    x,
    out,
    rows,
    channels,
    inner,
    steps,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Of each image, of ``rows`` times ``inner`` positions, which a program goes over in steps."""
    channels, inner = tiles.aligned(channels, inner, LAST, ALIGN)
    positions = tl.cast(rows, tl.int64) * inner
    across = tl.cdiv(channels, BC)
    image = (tl.program_id(0) // across).to(tl.int64)
    channel = tl.program_id(0) % across * BC + tl.arange(0, BC)
    x += image * positions * channels
    total = tl.zeros([BP, BC], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for i in range(steps):
        position = tl.cast(i, tl.int64) * BP + tl.arange(0, BP)
        at = tiles.offsets(position, channel, channels, inner, LAST)
        total += tiles.load(x, at, tiles.inside(position, channel, positions, channels))
    mean = tl.sum(total.to(tl.float64), 0) / tl.cast(positions, tl.float64)
    tiles.store(out, image * channels + channel, mean.to(total.dtype), channel < channels)


def global_avg_pool(x: Tensor) -> Tensor:
    op = "global_avg_pool"
    check_dim(op, "x", x, 4)
    check_dtype(op, "x", x)
    batch, channels, height, width = x.shape
    result = empty_image(x, (batch, channels, 1, 1), x)
    pixels = height * width
    if suggests_channels_last(x):
        images, extent = batch, tiles.Extent(pixels, channels, 1, True)
    else:  # every channel of every image is one by itself
        images, extent = 1, tiles.Extent(1, batch * channels, pixels, False)
    config = tiles.config_for(x, x.numel())
    tile = extent.tile(min(config.elements, MOST_ELEMENTS), most_channels=64)
    launch(
        global_avg_pool_kernel,
        (images * cdiv(extent.channels, tile[1]),),
        reads=[x.contiguous(memory_format=memory_format(x))],
        writes=[result],
        numbers=[*extent.numbers, cdiv(pixels, tile[0])],
        **extent.meta(tile, config),
    )
    return result
