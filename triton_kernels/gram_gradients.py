"""``gram_gradients``: the gradient behind statistics of a product, short of matrix products."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype

from . import checks, tiles
from .launch import bits, launch


@triton.jit
def gram_gradients_kernel(
    weight,  # [rows, channels]
    s,
    scale,
    mean,
    invstd,
    sum_g,
    sum_gx,
    dgamma,
    scaled_s,
    slopes,  # [rows, channels + 1]
    scaled_weight,
    channels,
    count,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    mu = tl.load(mean + row).to(tl.float64)
    inverse = tl.load(invstd + row).to(tl.float64)
    of_g = tl.load(sum_g + row).to(tl.float64)
    a = tl.load(scale + row)
    if sum_gx is None:
        products = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, channels, BLOCK):
            column = first + tl.arange(0, BLOCK)
            place = row * channels + column
            w = tl.load(weight + place, mask=column < channels, other=0).to(tl.float64)
            products += w * tl.load(s + place, mask=column < channels, other=0).to(tl.float64)
        of_gx = inverse * (tl.sum(products, axis=0) - mu * of_g)
    else:
        of_gx = tl.load(sum_gx + row).to(tl.float64)
    share = -a.to(tl.float64) / tiles.double(count)
    b = share * inverse * of_gx
    c = share * of_g - b * mu
    tl.store(dgamma + row, of_gx.to(dgamma.dtype.element_ty))
    for first in range(0, channels + 1, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_column = column < channels
        place = row * channels + column
        w = tiles.load(weight, place, is_column)
        tiles.store(scaled_s, place, a * tl.load(s + place, mask=is_column, other=0), is_column)
        tiles.store(scaled_weight, place, a * w, is_column)
        slope = tl.where(is_column, b.to(w.dtype) * w, c.to(w.dtype))
        tiles.store(slopes, row * (channels + 1) + column, slope, column <= channels)


def gram_gradients(
    weight: Tensor,
    s: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor | None,
    count: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "gram_gradients"
    checks.check_dim(op, "weight", weight, 2)
    checks.check_dtype(op, "weight", weight)
    if not count > 0:
        checks.fail(op, f"count must be more than 0, got {count:g}")
    rows, channels = weight.shape
    dtype = accumulation_dtype(weight.dtype)
    s = checks.beside_weight(op, "s", s, weight)
    given = {"scale": scale, "mean": mean, "invstd": invstd, "sum_g": sum_g, "sum_gx": sum_gx}
    vectors = [
        None if t is None else checks.vector(op, name, t, rows, dtype, weight)
        for name, t in given.items()
    ]
    weight = weight.contiguous()
    dgamma, slopes = s.new_empty(rows), s.new_empty(rows, channels + 1)
    scaled_s, scaled_weight = s.new_empty(s.shape), weight.new_empty(weight.shape)
    launch(
        gram_gradients_kernel,
        (rows,),
        (weight, s, *vectors),
        (dgamma, scaled_s, slopes, scaled_weight),
        (channels, bits(count)),
        finalizes=True,
        BLOCK=min(tiles.VECTOR, max(16, triton.next_power_of_2(channels))),
    )
    return dgamma, scaled_s, slopes, scaled_weight
