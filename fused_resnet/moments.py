"""Batch statistics of convolution outputs, of one process or of many.

A 1x1 convolution is linear in its input, so its output's statistics follow from the input's Gram
matrix and the output need not exist: ``mean = W mean(z)``, ``var_k = w_k Cov(z) w_k``.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import engines
from .reference import accumulation_dtype

#: Stride, padding, dilation, groups and activation of a convolution that is a matrix product.
AS_PRODUCT = ([1, 1], [0, 0], [1, 1], 1, "none")


class Moments(NamedTuple):
    """Per channel: the mean, and the sum of squared deviations from it, over so many values."""

    mean: Tensor
    m2: Tensor
    values: float


class Gram(NamedTuple):
    """Second moments of a 1x1 convolution's input z about ``center``.

    Centred before it is squared: taken of z itself, a channel whose mean is far from zero leaves
    nothing of its variance.
    """

    center: Tensor  #: C
    matrix: Tensor  #: C x C, sum of (z - center)(z - center)^T, float64
    total: Tensor  #: C, sum of (z - center), float64
    positions: float


def run(op: str, engine: str, x: Any, *args: Any, suited: bool = True) -> Any:
    """Call ``op`` for ``x`` on what :func:`engines.choose` takes for the wish ``engine``."""
    chosen = engines.choose(op.removesuffix("_"), x.device.type, x.dtype, engine, suited)
    return engines.implementation(op, chosen)(x, *args)


def count_of(y: Tensor) -> int:
    """Values per channel."""
    return y.numel() // y.size(1) if y.size(1) else 0


def of_tensor(y: Tensor, engine: str) -> Moments:
    mean, m2 = run("bn_stats", engine, y)
    return Moments(mean, m2, float(count_of(y)))


def count_batches(*norms: Any) -> list[float]:
    """Count a batch in each BatchNorm that trains; the shares it has in new running statistics."""
    counters = [bn.num_batches_tracked for bn in norms if bn.track_running_stats]
    found = [counter for counter in counters if counter is not None]
    if len(set(map(id, found))) < len(found):  # one BatchNorm twice: its share changes in between
        return [share for bn in norms for share in count_batches(bn)]
    if len(found) > 1:
        torch._foreach_add_(found, 1)  # one kernel on a GPU
    elif found:
        found[0].add_(1)
    return [_share(bn) for bn in norms]


def _share(bn: Any) -> float:
    if bn.momentum is not None:
        return bn.momentum
    counted = bn.track_running_stats and bn.num_batches_tracked is not None
    return 1.0 / float(bn.num_batches_tracked) if counted else 0.0


def by_transpose(a: Tensor, b: Tensor, engine: str) -> Tensor:
    """``a @ b.T`` of two matrices, as a 1x1 convolution over a's rows.

    The vendor's matrix product has half the speed of a convolution on some processors.
    """
    image = a.contiguous()[None, None].permute(0, 3, 1, 2)
    y = run("conv_bn_act", engine, image, b[:, :, None, None], None, None, None, *AS_PRODUCT)
    return y.permute(0, 2, 3, 1).view(a.size(0), b.size(0))


def by_columns(a: Tensor, b: Tensor, engine: str) -> Tensor:
    """``b.T @ a`` of two matrices, as the gradient of a 1x1 convolution's weight; why: as above."""
    grad, x = (t.contiguous()[None, None].permute(0, 3, 1, 2) for t in (b, a))
    geometry = ([1, 1], *AS_PRODUCT[:-1])
    return run("conv_wgrad", engine, grad, x, None, None, "none", *geometry).flatten(1)


def weighted_sum(weight: Tensor, v: Tensor) -> Tensor:
    """``weight @ v`` of a 1x1 convolution's weight, summed in float64."""
    w = weight.flatten(1)
    return (w * v.to(accumulation_dtype(w.dtype))).sum(1, dtype=torch.float64)


def of_product(weight: Tensor, gram: Gram, engine: str) -> Moments:
    """Of ``W (z - center)`` for a 1x1 convolution's weight.

    Means are subtracted in float64; of what is left, no sum cancels as z's own moments would, and
    the product of matrices is made in the type that activations are accumulated in.
    """
    w = weight.flatten(1).to(gram.center.dtype)
    mean = gram.total / gram.positions
    covariance = torch.addr(gram.matrix, gram.total, mean, alpha=-1).to(w.dtype)
    m2 = (by_transpose(w, covariance, engine) * w).sum(1, dtype=torch.float64)  # it is symmetric
    m2 = m2.clamp_min(0)  # rounding alone can go below zero; NaN stays
    return Moments(weighted_sum(weight, mean), m2, gram.positions)


def combine(own: Moments, group: Any) -> Moments:
    """Of all processes of ``group`` together, by Chan's formula; None: of this one alone."""
    if group is None:
        return own
    packed = torch.cat([own.mean, own.m2, own.mean.new_tensor([own.values])]).double()
    gathered = packed.new_empty(dist.get_world_size(group), packed.numel())
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    channels = own.mean.numel()
    means, m2s, counts = gathered.split([channels, channels, 1], dim=1)
    # A process without data has no statistics: its share is nothing, not NaN.
    means, m2s = (torch.where(counts > 0, t, 0) for t in (means, m2s))
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    m2 = (m2s + (means - mean).square() * counts).sum(0)
    return Moments(mean.to(own.mean.dtype), m2.to(own.m2.dtype), float(count))


def sum_over(group: Any, *vectors: Tensor) -> list[Tensor]:
    """Each vector summed over the processes of ``group``; None: as it is."""
    if group is None:
        return list(vectors)
    packed = torch.cat(vectors)
    dist.all_reduce(packed, group=group)
    return list(packed.split([v.numel() for v in vectors]))
