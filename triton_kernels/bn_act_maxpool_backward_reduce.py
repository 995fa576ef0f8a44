"""As bn_act_backward_reduce, over the pooled positions and the x they come from."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import bn_gradient, pooling, reductions, tiles
from .checks import channel_vector, check_act, check_dtype
from .launch import launch
from .pooling import Pooling


@triton.jit
def bn_act_maxpool_backward_reduce_kernel(
    grad,
    out,
    argmax,
    x,
    mean,
    invstd,
    sums_g,
    sums_gx,
    positions,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_a_run,
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
    run, channel = reductions.run_of(channels, BC)
    begin = run.to(tl.int64) * tiles_a_run * BP
    center = tiles.per_channel(mean, channel, channels)
    sum_g = tl.zeros([BP, BC], center.dtype)
    sum_gx = tl.zeros([BP, BC], center.dtype)
    for i in range(tiles_a_run):
        position = begin + i * BP + tl.arange(0, BP)
        image, row, column = pooling.split(position, out_height, out_width, SMALL)
        mask = tiles.inside(position, channel, positions, channels)
        pixel = (row * out_width + column)[:, None]
        at = pooling.offsets(image, pixel, channel, channels, out_height * out_width, LAST)
        g = tiles.load(grad, at, mask)
        if RELU:
            g = tiles.relu_backward(tiles.load(out, at, mask), g)
        g = tl.where(mask, g, 0.0)
        place = tl.load(argmax + at, mask=mask, other=0).to(tl.int32)
        h = (row * SH - PH)[:, None] + place // KW * DH
        w = (column * SW - PW)[:, None] + place % KW * DW
        here = mask & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = pooling.offsets(image, h * width + w, channel, channels, height * width, LAST)
        sum_g += g
        sum_gx += tl.where(here, g * (tiles.load(x, at, here) - center), 0.0)
    factor = tl.load(invstd + channel, mask=channel < channels, other=0).to(tl.float64)
    reductions.put(sums_g, run, channel, channels, reductions.total(sum_g))
    reductions.put(sums_gx, run, channel, channels, reductions.total(sum_gx) * factor)


def bn_act_maxpool_backward_reduce(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor]:
    op = "bn_act_maxpool_backward_reduce"
    check_dtype(op, "x", x)
    check_act(op, act)
    pool = Pooling(kernel_size, stride, padding, dilation)
    layout = bn_gradient.layout_of(x)
    pooled = pool.check_pooled(op, x, grad, out, argmax, layout)
    mean = channel_vector(op, "mean", mean, x)
    invstd = channel_vector(op, "invstd", invstd, x)
    plan = reductions.plan(x, pooling.pixels(pooled[0]), pooling.MOST_ELEMENTS)
    partials = plan.partials(x, 2)
    sizes = (*x.shape[1:], *grad.shape[2:])
    launch(
        bn_act_maxpool_backward_reduce_kernel,
        plan.grid,
        reads=[*pooled, x.contiguous(memory_format=layout), mean, invstd],
        writes=partials,
        numbers=[plan.extent.positions, *sizes, plan.tiles_a_run],
        RELU=act == "relu",
        **pool.meta(x),
        **plan.meta,
    )
    sums = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    reductions.finish(partials, sums)
    return sums
