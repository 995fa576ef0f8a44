"""``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale``, per channel."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype

from . import tiles
from .checks import check_dim, check_dtype, vector
from .launch import bits, cdiv, launch


@triton.jit
def bn_scale_shift_kernel(mean, var, weight, bias, scale, shift, channels, eps, BC: tl.constexpr):
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = channel < channels
    variance = tl.load(var + channel, mask=mask, other=1).to(tl.float64)
    a = 1 / tl.sqrt(variance + tiles.double(eps))
    if weight is not None:
        a *= tl.load(weight + channel, mask=mask, other=0).to(tl.float64)
    b = -tl.load(mean + channel, mask=mask, other=0).to(tl.float64) * a
    if bias is not None:
        b += tl.load(bias + channel, mask=mask, other=0).to(tl.float64)
    tiles.store(scale, channel, a, mask)
    tiles.store(shift, channel, b, mask)


def bn_scale_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    op = "bn_scale_shift"
    check_dim(op, "running_mean", running_mean, 1)
    check_dtype(op, "running_mean", running_mean)
    given = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    channels, dtype = running_mean.numel(), running_mean.dtype
    reads = [
        None if t is None else vector(op, name, t, channels, dtype, running_mean)
        for name, t in given.items()
    ]
    scale, shift = (
        running_mean.new_empty(channels, dtype=accumulation_dtype(dtype)) for _ in range(2)
    )
    launch(
        bn_scale_shift_kernel,
        (cdiv(channels, tiles.VECTOR),),
        reads=reads,
        writes=[scale, shift],
        numbers=[channels, bits(eps)],
        finalizes=True,
        BC=tiles.VECTOR,
    )
    return scale, shift
