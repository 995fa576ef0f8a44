"""``gram_moments``: the covariance, and the moments as one matrix, in the accumulation type."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, tiles
from .launch import bits, cdiv, launch


@triton.jit
def gram_moments_kernel(
    gram,  # [channels, channels]
    total,
    covariance,
    moments,  # [channels, channels + 1]
    channels,
    count,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < channels
    own = tl.load(total + row)
    products = tl.load(gram + row * channels + column, mask=is_column, other=0)
    other = tl.load(total + column, mask=is_column, other=0)
    apart = products - own / tiles.double(count) * other
    tiles.store(covariance, row * channels + column, apart, is_column)
    last = tl.where(is_column, products, own)
    tiles.store(moments, row * (channels + 1) + column, last, column <= channels)


def gram_moments(gram: Tensor, sum: Tensor, center: Tensor, count: float) -> tuple[Tensor, Tensor]:
    op = "gram_moments"
    checks.check_dim(op, "center", center, 1)
    checks.check_accumulation(op, "center", center)
    channels = center.numel()
    if gram.dtype != torch.float64:
        checks.fail(op, f"gram must be float64, got {checks.name(gram.dtype)}")
    checks.check_sizes(op, "gram", gram, (channels, channels))
    sum = checks.vector(op, "sum", sum, channels, torch.float64, gram)
    covariance = center.new_empty(channels, channels)
    moments = center.new_empty(channels, channels + 1)
    launch(
        gram_moments_kernel,
        (channels, cdiv(channels + 1, tiles.VECTOR)),
        (gram.contiguous(), sum),
        (covariance, moments),
        (channels, bits(count)),
        finalizes=True,
        BLOCK=tiles.VECTOR,
    )
    return covariance, moments
