"""BatchNorm's gradient behind a relu, and its in-place form."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import empty_image

from . import bn_gradient, tiles
from .launch import launch


@triton.jit
def bn_act_backward_kernel(
    grad,
    x,
    out,
    scale,
    shift,
    mean,
    invstd,
    sum_g,
    sum_gx,
    dx,
    images,
    channels,
    inner,
    inverse_count,
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
    g = bn_gradient.masked(grad, x, out, scale, shift, at, mask, channel, channels, RELU)
    result = bn_gradient.of_batch_norm(
        g, x, scale, mean, invstd, sum_g, sum_gx, inverse_count, at, mask, channel, channels
    )
    tiles.store(dx, at, result, mask)


def _run(
    op: str,
    like: Tensor,
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
    in_place: bool,
) -> Tensor:
    """In the layout of ``like``."""
    layout = bn_gradient.layout_of(like)
    given = bn_gradient.check_masked(op, grad, x, out, scale, shift, act, layout)
    sums, inverse_count = bn_gradient.check_sums(
        op, mean, invstd, sum_g, sum_gx, count, given.x, given.grad
    )
    dx = given.grad if in_place else empty_image(grad, grad.shape, like)
    extent = tiles.extent(dx)
    config = tiles.config_for(dx, dx.numel())
    tile = extent.tile(config.elements)
    launch(
        bn_act_backward_kernel,
        (extent.programs(tile),),
        reads=[*given, *sums],
        writes=[dx],
        numbers=[*extent.numbers, inverse_count],
        RELU=act == "relu",
        **extent.meta(tile, config),
    )
    return dx


def bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
) -> Tensor:
    like = grad if x is None else x
    rest = (x, out, scale, shift, mean, invstd, sum_g, sum_gx, count, act)
    return _run("bn_act_backward", like, grad, *rest, in_place=False)


def bn_act_backward_(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
) -> None:
    rest = (x, out, scale, shift, mean, invstd, sum_g, sum_gx, count, act)
    # A gradient that is not dense is worked on in a copy and written back.
    dx = _run("bn_act_backward_", grad, grad, *rest, in_place=True)
    if dx is not grad:
        grad.copy_(dx)
