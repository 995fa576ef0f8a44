"""``conv_wgrad``: the gradient of a convolution's weight, its input normalised on the way.

A matrix product whose rows are output channels, whose columns are the taps of the kernel times
input channels, as they lie in the weight, and whose sum runs over the pixels of the output. Where
that makes few tiles, each range of pixels makes its own, and they are added up in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype

from . import checks, conv_configs, reductions
from .conv_gemm import operand
from .conv_launch import Operand
from .conv_shapes import ConvShape, channels_last, conv_shape, index_type, precision
from .launch import arch, cdiv, launch
from .tiles import alignment, relu_backward, wide


@triton.jit
def conv_wgrad_partial(
    grad,  # images, [batch, out_h, out_w, groups * rows]
    grad_other,  # its prologue, by output channel, see operand; grad_other as grad
    grad_scale,
    grad_slope,
    grad_shift,
    mask_out,  # as grad, which passes only where this is positive; or None
    x,  # images, [batch, x_h, x_w, groups * channels]
    x_scale,  # its prologue, by input channel
    x_shift,
    x_center,
    out,  # [ranges, groups * rows, KERNEL_H * KERNEL_W * channels]
    passed,  # as grad: what the mask lets through of it; or None
    sums,  # [ranges, groups * rows], of that by channel; or None
    batch,
    x_h,
    x_w,
    out_h,
    out_w,
    padding_h,
    padding_w,
    groups,
    row_units,  # output channels of a group, in units of ROW_UNIT
    channel_units,  # input channels of a group, in units of CHANNEL_UNIT
    steps,  # of BLOCK_K pixels, a range
    ROW_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PACKED: tl.constexpr,  # a tile goes over several taps; CHANNEL_UNIT is a group's channels
    PLAIN: tl.constexpr,  # one tap, and the pixels of x are those of grad
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,  # the type that counts pixels
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    rows = row_units * ROW_UNIT
    channels = CHANNEL_UNIT if PACKED else channel_units * CHANNEL_UNIT

    row_tiles = tl.cdiv(rows, BLOCK_M)
    blocks = tl.cdiv(channels * TAPS, BLOCK_N) if PACKED else tl.cdiv(channels, BLOCK_N)
    tiles = row_tiles * blocks * (1 if PACKED else TAPS)
    program = tl.program_id(0)
    group = program // tiles
    tile = program % tiles
    row = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    if PACKED:
        column = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        channel = column % CHANNEL_UNIT
        tap = column // CHANNEL_UNIT
        is_column = tap < TAPS
    else:
        channel = tile // row_tiles % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = tile // row_tiles // blocks
        column = tap * channels + channel
        is_column = channel < channels
    moved_h = tap // KERNEL_W * DILATION_H
    moved_w = tap % KERNEL_W * DILATION_W

    all_pixels = tl.cast(batch, INDEX) * out_h * out_w
    grad_channels = groups * rows
    x_channels = groups * channels
    out_channel = group * rows + row
    in_channel = group * channels + channel
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    sum_g = tl.zeros((BLOCK_M,), dtype=ACC)
    first = tl.program_id(1).to(INDEX) * steps
    for step in range(steps):
        pixel = (first + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        is_pixel = pixel < all_pixels
        g_mask = is_pixel[:, None] & is_row[None, :]
        at = (pixel.to(tl.int64) * grad_channels)[:, None] + out_channel[None, :]
        g = tl.load(grad + at, mask=g_mask, other=0.0)
        if mask_out is not None:
            g = relu_backward(tl.load(mask_out + at, mask=g_mask, other=0.0), g)
            if tile < row_tiles:  # of all that read these, one writes them
                tl.store(passed + at, g, mask=g_mask)
                sum_g += tl.sum(wide(g), axis=0)
        if grad_scale is not None:
            other = None
            if grad_other is not None:
                other = tl.load(grad_other + at, mask=g_mask, other=0.0)
            g = operand(
                g, other, grad_scale, grad_slope, grad_shift, None, out_channel, is_row, False
            )
            g = tl.where(g_mask, g, 0.0)
        mask = is_pixel[:, None] & is_column[None, :]
        if PLAIN:
            base = pixel.to(tl.int64) * x_channels
        else:
            image = (pixel // (out_h * out_w)).to(tl.int64)
            h = (pixel // out_w % out_h).to(tl.int32) * STRIDE_H - padding_h
            w = (pixel % out_w).to(tl.int32) * STRIDE_W - padding_w
            if PACKED:
                at_h = h[:, None] + moved_h[None, :]
                at_w = w[:, None] + moved_w[None, :]
                mask = mask & (at_h >= 0) & (at_h < x_h) & (at_w >= 0) & (at_w < x_w)
                base = ((image * x_h + h) * x_w + w) * x_channels
                moved = (moved_h.to(tl.int64) * x_w + moved_w) * x_channels
                at = base[:, None] + (moved + in_channel)[None, :]
            else:
                at_h = h + moved_h
                at_w = w + moved_w
                inside = (at_h >= 0) & (at_h < x_h) & (at_w >= 0) & (at_w < x_w)
                mask = mask & inside[:, None]
                base = ((image * x_h + at_h) * x_w + at_w) * x_channels
        if not PACKED:
            at = base[:, None] + in_channel[None, :]
        z = tl.load(x + at, mask=mask, other=0.0)
        if RELU or x_scale is not None or x_center is not None:
            z = operand(z, None, x_scale, None, x_shift, x_center, in_channel, is_column, RELU)
            z = tl.where(mask, z, 0.0)  # padding comes after the activation
        acc = tl.dot(tl.trans(g), z, acc, input_precision=PRECISION, out_dtype=ACC)

    out += tl.program_id(1).to(tl.int64) * grad_channels * (TAPS * channels)
    out_row = out + (out_channel.to(tl.int64) * (TAPS * channels))[:, None]
    tl.store(out_row + column[None, :], acc, mask=is_row[:, None] & is_column[None, :])
    if mask_out is not None:  # noqa: SIM102, known when compiling
        if tile < row_tiles:
            reductions.put(sums, tl.program_id(1), row, rows, sum_g)


@triton.jit
def add_ranges(partial, out, numel, ranges, BLOCK: tl.constexpr):
    """``out = partial.sum(0)`` of [ranges, numel], in order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numel
    total = tl.load(partial + place, mask=mask, other=0.0)
    for i in range(1, ranges):
        total += tl.load(partial + tl.cast(numel, tl.int64) * i + place, mask=mask, other=0.0)
    tl.store(out + place, total, mask=mask)


def conv_wgrad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See :func:`fused_resnet.reference_training.conv_wgrad`."""
    op = "conv_wgrad"
    checks.check_dim(op, "grad", grad, 4)
    checks.check_dim(op, "x", x, 4)
    checks.check_dtype(op, "grad", grad)
    checks.check_act(op, act)
    checks.check_like(op, "x", x, grad, "grad")
    checks.check_pair(op, "kernel_size", kernel_size, 1)
    if groups < 1 or x.size(1) % groups or grad.size(1) % groups:
        checks.fail(
            op,
            f"groups must be positive and divide the channels {x.size(1)} and {grad.size(1)}, "
            f"got {groups}",
        )
    if (scale is None) != (shift is None):
        checks.fail(op, "scale and shift must be given together, got one")
    scale = None if scale is None else checks.channel_vector(op, "scale", scale, x)
    shift = None if shift is None else checks.channel_vector(op, "shift", shift, x)
    shape = conv_shape(op, x.shape, grad.size(1), kernel_size, stride, padding, dilation, groups)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    z = Operand(channels_last(x), scale, shift, act)
    return weight_gradient(shape, Operand(channels_last(grad)), z)


class Mask(NamedTuple):
    """``passed`` becomes what of a gradient passes where ``out`` is positive, ``total`` its sum."""

    out: Tensor
    passed: Tensor
    total: Tensor


def weight_gradient(
    shape: ConvShape, grad: Operand, z: Operand, mask: Mask | None = None
) -> Tensor:
    """The gradient for ``z``, in the accumulation type; all are channels_last."""
    rows, channels = shape.out_channels // shape.groups, shape.in_channels // shape.groups
    dw = torch.empty(
        (shape.out_channels, channels, *shape.kernel),
        dtype=accumulation_dtype(grad.x.dtype),
        device=z.x.device,
        memory_format=torch.channels_last,
    )
    if dw.numel() == 0:
        return dw
    taps = shape.kernel[0] * shape.kernel[1]
    # Of few channels, a tile goes over several taps.
    packed = channels < 16 and taps > 1
    masked = mask is not None
    config = conv_configs.wgrad(rows, channels * taps, z.x.dtype, arch(dw), packed, masked)
    across = cdiv(channels * (taps if packed else 1), config.n) * (1 if packed else taps)
    tiles = shape.groups * cdiv(rows, config.m) * across
    ranges, steps = conv_configs.ranges(tiles, cdiv(shape.pixels, config.k), config)
    partial = dw if ranges == 1 else dw.new_empty((ranges, dw.numel()))
    row_unit, channel_unit = alignment(rows), channels if packed else alignment(channels)
    sums = None if mask is None else dw.new_empty((ranges, rows), dtype=torch.float64)
    launch(
        conv_wgrad_partial,
        (tiles, ranges),
        reads=[
            *(grad.x, grad.other, grad.scale, grad.slope, grad.shift),
            None if mask is None else mask.out,
            *(z.x, z.scale, z.shift, z.center),
        ],
        writes=[partial, None if mask is None else mask.passed, sums],
        numbers=[
            shape.batch,
            *shape.size,
            *shape.out_size,
            *shape.padding,
            shape.groups,
            rows // row_unit,
            channels // channel_unit,
            steps,
        ],
        ROW_UNIT=row_unit,
        CHANNEL_UNIT=channel_unit,
        KERNEL_H=shape.kernel[0],
        KERNEL_W=shape.kernel[1],
        STRIDE_H=shape.stride[0],
        STRIDE_W=shape.stride[1],
        DILATION_H=shape.dilation[0],
        DILATION_W=shape.dilation[1],
        PACKED=packed,
        PLAIN=shape.plain,
        RELU=z.act == "relu",
        PRECISION=precision(z.x.dtype),
        INDEX=index_type(shape.pixels, config.k * ranges),
        **config.meta,
    )
    if ranges > 1:
        grid = (cdiv(dw.numel(), 1024),)
        numbers = (dw.numel(), ranges)
        launch(add_ranges, grid, [partial], [dw], numbers, finalizes=True, BLOCK=1024)
    if mask is not None:
        reductions.finish([sums], [mask.total])  # type: ignore[list-item]
    return dw
