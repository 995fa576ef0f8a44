"""Batch statistics of convolution outputs, of one process or of many.

A 1x1 convolution is linear in its input, so its output's statistics follow from the input's Gram
matrix and the output need not exist: ``mean = W mean(z)``, ``var_k = w_k Cov(z) w_k``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import engines

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
    sum: Tensor  #: C, of z - center, float64
    covariance: Tensor  #: C x C, sum of products of deviations from the mean
    moments: Tensor  #: C x (C + 1), sum of (z - center)(z - center)^T beside that of z - center
    positions: float


def run(op: str, engine: str, x: Any, *args: Any) -> Any:
    """Call ``op`` for ``x`` on what :func:`engines.choose` takes for the wish ``engine``."""
    chosen = engines.choose(op.removesuffix("_"), x.device.type, x.dtype, engine)
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


def by_transpose(a: Tensor, b: Tensor, engine: str, added: Tensor | None = None) -> Tensor:
    """``a @ b.T + added`` of matrices; on a CPU as a 1x1 convolution over a's rows.

    The vendor's matrix product has half the speed of a convolution on some processors. And on a GPU
    a convolution of float32 may be one of TF32, which statistics do not bear.
    """
    if a.is_cuda:
        return a @ b.T if added is None else (a @ b.T).add_(added)
    image, residual = (None if t is None else _as_image(t) for t in (a, added))
    weight = b[:, :, None, None]
    y = run("conv_bn_act", engine, image, weight, None, None, residual, *AS_PRODUCT)
    return y.permute(0, 2, 3, 1).view(a.size(0), b.size(0))


def by_columns(a: Tensor, b: Tensor, engine: str) -> Tensor:
    """``b.T @ a``; on a CPU as the gradient of a 1x1 convolution's weight; why: as above."""
    if a.is_cuda:
        return b.T @ a
    geometry = ([1, 1], *AS_PRODUCT[:-1])
    given = (_as_image(b), _as_image(a), None, None, "none")
    return run("conv_wgrad", engine, *given, *geometry).flatten(1)


def _as_image(a: Tensor) -> Tensor:
    """A matrix whose columns are the channels of an image of one line."""
    return a.contiguous()[None, None].permute(0, 3, 1, 2)


def gram_of(
    given: Sequence[Tensor | None], center: Tensor, act: str, stride: int, count: int, engine: str
) -> Gram:
    """Of ``count`` positions of ``z = act(x * scale + shift)``; ``given``: x, scale and shift."""
    matrix, total = run("bn_act_gram", engine, *given, center, act, stride)
    whole = (matrix, total, center, float(count))
    covariance, joined = run("gram_moments", engine, *whole)
    return Gram(center, total, covariance, joined, float(count))


def of_product(weight: Tensor, gram: Gram, engine: str) -> tuple[Moments, Tensor]:
    """Of ``weight z`` for a 1x1 convolution's weight, and its mean about ``weight center``.

    Means are subtracted in float64; of what is left, no sum cancels as z's own moments would, and
    the product of matrices is made in the type that activations are accumulated in.
    """
    w = weight.flatten(1)
    product = by_transpose(w.to(gram.center.dtype), gram.covariance, engine)
    given = (w, product, gram.sum, gram.center, gram.positions)
    mean, about, m2 = run("gram_stats", engine, *given)
    return Moments(mean, m2, gram.positions), about


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
