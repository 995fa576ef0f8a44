"""``bn_act_gram``: the Gram matrix and the sum of centered activations.

Each range of at most 1024 rows makes its share in the accumulation type; they are added up in
float64, in order. Only tiles on and above the diagonal are computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, conv_configs, tiles
from .conv_gemm import operand
from .conv_shapes import channels_last, index_type, precision
from .launch import arch, cdiv, launch
from .tiles import alignment


@triton.jit
def _product(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``acc + a.T @ b``.

    ``SPLIT``: into two numbers of that half type, whose products matrix units take: a centered
    value has more bits than the type it was stored in.
    """
    if SPLIT is None:
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        a_high = a.to(SPLIT)
        b_high = b.to(SPLIT)
        acc = tl.dot(tl.trans(_rest(a, a_high, SPLIT)), b_high, acc)
        acc = tl.dot(tl.trans(a_high), _rest(b, b_high, SPLIT), acc)
        acc = tl.dot(tl.trans(a_high), b_high, acc)
    return acc


@triton.jit
def _rest(value, high, SPLIT: tl.constexpr):
    rest = value - high.to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), rest, 0.0).to(SPLIT)


@triton.jit
def _centered(x, place, channel, is_channel, mask, scale, shift, center, RELU: tl.constexpr):
    """The tile of ``act(x * scale + shift) - center``, not rounded behind the subtraction."""
    z = tl.load(x + place[:, None] + channel[None, :], mask=mask, other=0.0)
    if RELU or scale is not None:
        z = operand(z, None, scale, None, shift, None, channel, is_channel, RELU)
    about = tl.load(center + channel, mask=is_channel, other=0.0)[None, :]
    return tl.where(mask, tiles.wide(z) - about, 0.0)


@triton.jit
def gram_partial(
    x,  # images, [batch, height, width, channels]
    scale,
    shift,
    center,
    out,  # [ranges, channels + 1, channels]: the upper triangle, then the sum
    batch,
    height,
    width,
    rows_h,  # rows and columns of an image that are read
    rows_w,
    stride,
    units,  # channels, in units of UNIT
    steps,  # of BLOCK_K rows, a range
    UNIT: tl.constexpr,
    PLAIN: tl.constexpr,  # stride is 1
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,  # the type that counts rows
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channels = units * UNIT
    across = tl.cdiv(channels, BLOCK)
    tile_i = tl.program_id(0) // across
    tile_j = tl.program_id(0) % across
    if tile_i <= tile_j:
        i = tile_i * BLOCK + tl.arange(0, BLOCK)
        j = tile_j * BLOCK + tl.arange(0, BLOCK)
        rows = tl.cast(batch, INDEX) * rows_h * rows_w
        ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        acc = tl.zeros((BLOCK, BLOCK), dtype=ACC)
        total = tl.zeros((BLOCK,), dtype=ACC)
        first = tl.program_id(1).to(INDEX) * steps
        for step in range(steps):
            row = (first + step) * BLOCK_K + tl.arange(0, BLOCK_K)
            is_row = row < rows
            pixel = row.to(tl.int64)
            if not PLAIN:
                h = (row // rows_w % rows_h).to(tl.int64) * stride
                w = (row % rows_w).to(tl.int64) * stride
                pixel = ((row // (rows_h * rows_w)).to(tl.int64) * height + h) * width + w
            place = pixel * channels
            mask_i = is_row[:, None] & (i < channels)[None, :]
            mask_j = is_row[:, None] & (j < channels)[None, :]
            a = _centered(x, place, i, i < channels, mask_i, scale, shift, center, RELU)
            b = _centered(x, place, j, j < channels, mask_j, scale, shift, center, RELU)
            acc = _product(a, b, acc, SPLIT, PRECISION, ACC)
            total += tl.sum(a, axis=0)
        out += tl.program_id(1).to(tl.int64) * (channels + 1) * channels
        place_i = i.to(tl.int64) * channels
        mask = (i < channels)[:, None] & (j < channels)[None, :]
        tl.store(out + place_i[:, None] + j[None, :], acc, mask=mask)
        if tile_i == tile_j:
            tl.store(out + tl.cast(channels, tl.int64) * channels + i, total, mask=i < channels)


@triton.jit
def gram_finalize(
    partial,  # as gram_partial makes it
    gram,
    total,
    channels,
    ranges,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < channels
    # Below the diagonal, what lies above it; the last row is the sum.
    low = tl.where(row < channels, tl.minimum(row, column), row).to(tl.int64)
    high = tl.where(row < channels, tl.maximum(row, column), column)
    place = partial + low * channels + high
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(ranges):
        share = tl.load(place + tl.cast(i, tl.int64) * (channels + 1) * channels, mask=is_column)
        acc += share.to(tl.float64)
    if row < channels:
        tl.store(gram + tl.cast(row, tl.int64) * channels + column, acc, mask=is_column)
    else:
        tl.store(total + column, acc, mask=is_column)


def bn_act_gram(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, center: Tensor, act: str, stride: int
) -> tuple[Tensor, Tensor]:
    """See :func:`fused_resnet.reference_training.bn_act_gram`."""
    op = "bn_act_gram"
    checks.check_dim(op, "x", x, 4)
    checks.check_dtype(op, "x", x)
    checks.check_act(op, act)
    if stride < 1:
        checks.fail(op, f"stride must be at least 1, got {stride}")
    if (scale is None) != (shift is None):
        checks.fail(op, "scale and shift must be given together, got one")
    scale = None if scale is None else checks.channel_vector(op, "scale", scale, x)
    shift = None if shift is None else checks.channel_vector(op, "shift", shift, x)
    center = checks.channel_vector(op, "center", center, x)
    x = channels_last(x)
    batch, channels, height, width = x.shape
    gram = x.new_empty((channels, channels), dtype=torch.float64)
    total = x.new_empty((channels,), dtype=torch.float64)
    if channels == 0:
        return gram, total
    rows_h, rows_w = cdiv(height, stride), cdiv(width, stride)
    rows = batch * rows_h * rows_w
    config = conv_configs.gram(channels, x.dtype, arch(x))
    across = cdiv(channels, config.m)
    steps = conv_configs.gram_steps(across * (across + 1) // 2, rows, config.k)
    ranges = cdiv(rows, steps * config.k)
    partial = x.new_empty((ranges, channels + 1, channels), dtype=center.dtype)
    launch(
        gram_partial,
        (across * across, ranges),
        (x, scale, shift, center),
        (partial,),
        (batch, height, width, rows_h, rows_w, stride, channels // alignment(channels), steps),
        UNIT=alignment(channels),
        PLAIN=stride == 1,
        RELU=act == "relu",
        SPLIT={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype),
        PRECISION="tf32x3" if precision(x.dtype) == "tf32" else "ieee",
        INDEX=index_type(rows, steps * config.k),
        BLOCK=config.m,
        BLOCK_K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    grid = (channels + 1, cdiv(channels, 256))
    launch(
        gram_finalize, grid, (partial,), (gram, total), (channels, ranges), finalizes=True,
        BLOCK=256,
    )  # fmt: skip
    return gram, total
