"""``gram_stats``: the statistics of a product from those of its input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype

from . import checks, tiles
from .launch import bits, launch


@triton.jit
def gram_stats_kernel(
    weight,  # [rows, channels]
    product,
    total,
    center,
    mean,
    about,
    m2,
    channels,
    count,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    near = tl.zeros((BLOCK,), dtype=tl.float64)
    offset = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, channels, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_column = column < channels
        w = tl.load(weight + row * channels + column, mask=is_column, other=0).to(tl.float64)
        p = tl.load(product + row * channels + column, mask=is_column, other=0).to(tl.float64)
        squares += w * p
        near += w * tl.load(total + column, mask=is_column, other=0)
        offset += w * tl.load(center + column, mask=is_column, other=0).to(tl.float64)
    mu = tl.sum(near, axis=0) / tiles.double(count)
    square = tl.sum(squares, axis=0)
    # Rounding alone can go below zero; NaN stays.
    square = tl.where(square < 0, 0.0, square)
    tl.store(about + row, mu.to(about.dtype.element_ty))
    tl.store(mean + row, (mu + tl.sum(offset, axis=0)).to(mean.dtype.element_ty))
    tl.store(m2 + row, square.to(m2.dtype.element_ty))


def gram_stats(
    weight: Tensor, product: Tensor, sum: Tensor, center: Tensor, count: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = "gram_stats"
    checks.check_dim(op, "weight", weight, 2)
    checks.check_dtype(op, "weight", weight)
    rows, channels = weight.shape
    dtype = accumulation_dtype(weight.dtype)
    product = checks.beside_weight(op, "product", product, weight)
    sum = checks.vector(op, "sum", sum, channels, torch.float64, weight)
    center = checks.vector(op, "center", center, channels, dtype, weight)
    mean, about, m2 = (center.new_empty(rows) for _ in range(3))
    launch(
        gram_stats_kernel,
        (rows,),
        (weight.contiguous(), product, sum, center),
        (mean, about, m2),
        (channels, bits(count)),
        finalizes=True,
        BLOCK=min(tiles.VECTOR, max(16, triton.next_power_of_2(channels))),
    )
    return mean, about, m2
