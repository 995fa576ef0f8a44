"""As bn_act_backward, g being summed up over the windows whose maximum x is.

A program has a tile of x and looks at every window over it, in one order: nothing is scattered.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import empty_image

from . import bn_gradient, pooling, tiles
from .checks import channel_vector, check_act, check_dtype
from .launch import launch
from .pooling import Pooling


@triton.jit
def bn_act_maxpool_backward_kernel(
    grad,
    out,
    argmax,
    x,
    scale,
    mean,
    invstd,
    sum_g,
    sum_gx,
    dx,
    positions,
    channels,
    height,
    width,
    out_height,
    out_width,
    inverse_count,
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
    image, row, column = pooling.split(position, height, width, SMALL)
    mask = tiles.inside(position, channel, positions, channels)
    a = tiles.per_channel(scale, channel, channels)
    g = tl.zeros([BP, BC], a.dtype)
    for i in range(KH):
        h = row + PH - i * DH
        for j in tl.static_range(KW):
            w = column + PW - j * DW
            valid = (h >= 0) & (h % SH == 0) & (h < out_height * SH)
            valid &= (w >= 0) & (w % SW == 0) & (w < out_width * SW)
            pixel = (h // SH * out_width + w // SW)[:, None]
            at = pooling.offsets(image, pixel, channel, channels, out_height * out_width, LAST)
            here = mask & valid[:, None]
            place = tl.load(argmax + at, mask=here, other=255).to(tl.int32)
            here &= place == i * KW + j
            passed = tiles.load(grad, at, here)
            if RELU:
                passed = tiles.relu_backward(tiles.load(out, at, here), passed)
            g += tl.where(here, passed, 0.0)
    pixel = (row * width + column)[:, None]
    at = pooling.offsets(image, pixel, channel, channels, height * width, LAST)
    result = bn_gradient.of_batch_norm(
        g, x, scale, mean, invstd, sum_g, sum_gx, inverse_count, at, mask, channel, channels
    )
    tiles.store(dx, at, result, mask)


def bn_act_maxpool_backward(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> Tensor:
    op = "bn_act_maxpool_backward"
    check_dtype(op, "x", x)
    check_act(op, act)
    pool = Pooling(kernel_size, stride, padding, dilation)
    layout = bn_gradient.layout_of(x)
    pooled = pool.check_pooled(op, x, grad, out, argmax, layout)
    scale = channel_vector(op, "scale", scale, x)
    sums, inverse_count = bn_gradient.check_sums(op, mean, invstd, sum_g, sum_gx, count, x, x)
    dx = empty_image(x, x.shape, x)
    extent = pooling.pixels(dx)
    config = tiles.config_for(dx, dx.numel())
    tile = extent.tile(min(config.elements, pooling.MOST_ELEMENTS))
    launch(
        bn_act_maxpool_backward_kernel,
        (extent.programs(tile),),
        reads=[*pooled, x.contiguous(memory_format=layout), scale, *sums],
        writes=[dx],
        numbers=[extent.positions, *x.shape[1:], *grad.shape[2:], inverse_count],
        RELU=act == "relu",
        **pool.meta(x),
        **extent.meta(tile, config),
    )
    return dx
