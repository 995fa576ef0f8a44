"""Scale, shift and invstd of batch statistics; updates the running ones."""

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .checks import check_accumulation, check_dim, check_dtype, fail, vector
from .launch import bits, cdiv, launch


@triton.jit
def bn_finalize_kernel(
    mean,
    m2,
    weight,
    bias,
    running_mean,
    running_var,
    scale,
    shift,
    invstd,
    channels,
    count,
    momentum,
    eps,
    UPDATE: tl.constexpr,
    BC: tl.constexpr,
):
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = channel < channels
    count = tiles.double(count)
    mu = tl.load(mean + channel, mask=mask, other=0).to(tl.float64)
    squares = tl.load(m2 + channel, mask=mask, other=0).to(tl.float64)
    # Rounded, as the caller gets it.
    inverse = (1 / tl.sqrt(squares / count + tiles.double(eps))).to(invstd.dtype.element_ty)
    tiles.store(invstd, channel, inverse, mask)
    a = inverse
    if weight is not None:
        a = tl.load(weight + channel, mask=mask, other=0) * inverse
    tiles.store(scale, channel, a, mask)
    b = -mu * a.to(tl.float64)
    if bias is not None:
        b += tl.load(bias + channel, mask=mask, other=0).to(tl.float64)
    tiles.store(shift, channel, b, mask)
    if UPDATE:
        momentum = tiles.double(momentum)
        old = tl.load(running_mean + channel, mask=mask, other=0).to(tl.float64)
        tiles.store(running_mean, channel, (1 - momentum) * old + momentum * mu, mask)
        old = tl.load(running_var + channel, mask=mask, other=0).to(tl.float64)
        new = squares / (count - 1)
        tiles.store(running_var, channel, (1 - momentum) * old + momentum * new, mask)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bn_finalize"
    check_dim(op, "mean", mean, 1)
    check_accumulation(op, "mean", mean)
    dtype, channels = mean.dtype, mean.numel()
    if not count >= 0:
        fail(op, f"count must be at least 0, got {count:g}")
    if (running_mean is None) != (running_var is None):
        fail(op, "running_mean and running_var must be given together, got one")
    m2 = vector(op, "m2", m2, channels, dtype, mean)

    def parameter(argument: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        check_dtype(op, argument, t)
        return vector(op, argument, t, channels, t.dtype, mean).to(dtype)

    weight, bias = parameter("weight", weight), parameter("bias", bias)
    # Statistics that are not dense are updated in a copy and written back.
    dense_mean = dense_var = None
    if running_mean is not None and running_var is not None:
        check_dtype(op, "running_mean", running_mean)
        kind = running_mean.dtype
        dense_mean = vector(op, "running_mean", running_mean, channels, kind, mean)
        dense_var = vector(op, "running_var", running_var, channels, kind, mean)
    scale, shift, invstd = (mean.new_empty(channels) for _ in range(3))
    launch(
        bn_finalize_kernel,
        (cdiv(channels, tiles.VECTOR),),
        reads=[mean.contiguous(), m2, weight, bias],
        writes=[dense_mean, dense_var, scale, shift, invstd],
        numbers=[channels, bits(count), bits(momentum), bits(eps)],
        finalizes=True,
        UPDATE=dense_mean is not None and count > 0,
        BC=tiles.VECTOR,
    )
    for given, dense in ((running_mean, dense_mean), (running_var, dense_var)):
        if given is not None and given is not dense:
            given.copy_(dense)
    return scale, shift, invstd
