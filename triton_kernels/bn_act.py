"""``act(x * scale[c] + shift[c] + residual)``, and its in-place form."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import empty_image, memory_format

from . import tiles
from .checks import channel_vector, check_act, check_dim, check_dtype, check_like, check_sizes
from .launch import launch


@triton.jit
def bn_act_kernel(
    x,
    scale,
    shift,
    residual,
    out,
    images,
    channels,
    inner,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channels, inner = tiles.aligned(channels, inner, LAST, ALIGN)
    position, channel = tiles.tile_of(channels, BP, BC)
    at = tiles.offsets(position, channel, channels, inner, LAST)
    mask = tiles.inside(position, channel, tl.cast(images, tl.int64) * inner, channels)
    a = tiles.per_channel(scale, channel, channels)
    b = tiles.per_channel(shift, channel, channels)
    y = tiles.scale_shift(tiles.load(x, at, mask), a, b)
    if residual is not None:
        y += tiles.load(residual, at, mask)
    tiles.store(out, at, tiles.activate(y, RELU), mask)


def check_bn_act(
    op: str, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """scale and shift, dense."""
    check_dim(op, "x", x, 4)
    check_dtype(op, "x", x)
    vectors = channel_vector(op, "scale", scale, x), channel_vector(op, "shift", shift, x)
    if residual is not None:
        check_like(op, "residual", residual, x)
        check_sizes(op, "residual", residual, x.shape)
    return vectors


def _run(
    op: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    in_place: bool,
) -> Tensor:
    scale, shift = check_bn_act(op, x, scale, shift, residual)
    check_act(op, act)
    layout = memory_format(x)
    dense = x.contiguous(memory_format=layout)
    out = dense if in_place else empty_image(x, x.shape, x)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    extent = tiles.extent(out)
    config = tiles.config_for(out, out.numel())
    tile = extent.tile(config.elements)
    launch(
        bn_act_kernel,
        (extent.programs(tile),),
        reads=[dense, scale, shift, residual],
        writes=[out],
        numbers=extent.numbers,
        RELU=act == "relu",
        **extent.meta(tile, config),
    )
    return out


def bn_act(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return _run("bn_act", x, scale, shift, residual, act, in_place=False)


def bn_act_(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> None:
    # A tensor that is not dense is worked on in a copy and written back.
    out = _run("bn_act_", x, scale, shift, residual, act, in_place=True)
    if out is not x:
        x.copy_(out)
