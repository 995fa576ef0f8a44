"""One call of every op, at a size that crosses vectors and tiles, for tests that are about where
and how ops run and not about what each of them computes."""

from typing import Any

import torch
from cases import EPS, Source, channels_last
from torch import Tensor

from fused_resnet import reference_training
from fused_resnet.reference import accumulation_dtype

WINDOW = ([3, 3], [2, 2], [1, 1], [1, 1])
CONV = ([1, 1], [1, 1], [1, 1], 1)
IMAGE = (3, 40, 9, 11)
OUT_CHANNELS = 24


class _Maker:
    """The tensors of a seed, and what the specification makes of them where an op takes that."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.source, wide = Source(seed, dtype), accumulation_dtype(dtype)
        self.x, self.grad, self.residual = (self.image(*IMAGE) for _ in range(3))
        channels = IMAGE[1]
        vectors = self.source.batch_norm(channels)
        self.gamma, self.beta = vectors["gamma"], vectors["beta"]
        self.running = vectors["mean"].to(wide), vectors["var"].to(wide)
        self.count = float(self.x.numel() // channels)
        self.mean, self.m2 = reference_training.bn_stats(self.x)
        variance = self.m2 / self.count
        self.invstd = torch.rsqrt(variance + EPS)
        self.scale = self.gamma.to(wide) * self.invstd
        self.affine = self.scale, self.beta.to(wide) - self.mean * self.scale
        self.of_batch = self.mean, self.invstd
        self.center = self.beta.to(wide).clamp_min(0)
        self.weight = channels_last(self.source.normal(OUT_CHANNELS, channels, 3, 3) / 20)
        self.out_affine = tuple(self.source.normal(OUT_CHANNELS).to(wide) for _ in range(2))
        self.out_grad = self.image(IMAGE[0], OUT_CHANNELS, *IMAGE[2:])

    def image(self, *shape: int) -> Tensor:
        return channels_last(self.source.normal(*shape))

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        out, argmax = reference_training.bn_act_maxpool_train(
            self.x, *self.affine, *WINDOW, False, "relu"
        )
        return self.image(*out.shape), out, argmax


def _finalize(m: _Maker) -> tuple[Any, ...]:
    return (m.mean, m.m2, m.count, m.gamma, m.beta, *m.running, 0.1, EPS)


def _reduce(m: _Maker) -> tuple[Any, ...]:
    return (m.grad, m.x, None, *m.affine, *m.of_batch, "relu")


def _backward(m: _Maker) -> tuple[Any, ...]:
    sums = reference_training.bn_act_backward_reduce(*_reduce(m))
    return (*_reduce(m)[:-1], *sums, m.count, "relu")


def _gram(m: _Maker) -> tuple[Tensor, Tensor]:
    return reference_training.bn_act_gram(m.x, *m.affine, m.center, "relu", 1)


def _gram_stats(m: _Maker) -> tuple[Any, ...]:
    weight, (gram, total) = m.weight[:, :, 0, 0].contiguous(), _gram(m)
    covariance, _ = reference_training.gram_moments(gram, total, m.center, m.count)
    product = (weight.double() @ covariance.double()).to(m.center.dtype)
    return weight, product, total, m.center, m.count


def _gram_gradients(m: _Maker) -> tuple[Any, ...]:
    weight, product, *_ = _gram_stats(m)
    scale, mean = m.out_affine
    return weight, product, scale, mean, scale.abs() + 0.5, mean + 1, None, m.count


def _pool_reduce(m: _Maker) -> tuple[Any, ...]:
    return (*m.pooled(), m.x, *m.of_batch, *WINDOW, "relu")


def _pool_backward(m: _Maker) -> tuple[Any, ...]:
    given = _pool_reduce(m)
    sums = reference_training.bn_act_maxpool_backward_reduce(*given)
    return (*given[:4], m.scale, *m.of_batch, *sums, m.count, *WINDOW, "relu")


_ARGUMENTS: dict[str, Any] = {
    "eltwise_act": lambda m: ([m.x, m.residual], "sum", None, "relu"),
    "bn_scale_shift": lambda m: (*m.running, m.gamma.to(m.mean), m.beta.to(m.mean), EPS),
    "bn_act": lambda m: (m.x, *m.affine, m.residual, "relu"),
    "bn_act_maxpool": lambda m: (m.x, *m.affine, *WINDOW, False, "relu"),
    "global_avg_pool": lambda m: (m.x,),
    "conv_bn_act": lambda m: (m.x, m.weight, *m.out_affine, m.out_grad, *CONV, "relu"),
    "bn_stats": lambda m: (m.x,),
    "bn_finalize": _finalize,
    "bn_act_backward_reduce": _reduce,
    "bn_act_backward": _backward,
    "bn_act_gram": lambda m: (m.x, *m.affine, m.center, "relu", 1),
    "gram_moments": lambda m: (*_gram(m), m.center, m.count),
    "gram_stats": _gram_stats,
    "gram_gradients": _gram_gradients,
    "relu_backward_reduce": lambda m: (m.grad, torch.relu(m.x)),
    "bn_act_maxpool_train": lambda m: (m.x, *m.affine, *WINDOW, False, "relu"),
    "bn_act_maxpool_backward_reduce": _pool_reduce,
    "bn_act_maxpool_backward": _pool_backward,
    "eltwise_act_backward": lambda m: (
        *(m.grad, [m.x, m.residual], torch.relu(m.x + m.residual), "sum", None, "relu"),
    ),
    "conv_dgrad": lambda m: (m.out_grad, m.weight, m.residual, list(IMAGE[2:]), *CONV),
    "conv_wgrad": lambda m: (m.out_grad, m.x, *m.affine, "relu", [3, 3], *CONV),
}


def arguments(op: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What to call an op with, as its schema has it."""
    return _ARGUMENTS[op](_Maker(seed, dtype))
