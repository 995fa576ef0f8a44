"""Fake kernels of the ops that training is made of; :mod:`fused_resnet.native` registers them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference


def _vector(x: Tensor) -> Tensor:
    """One number per channel of x, in the type x is accumulated in."""
    return x.new_empty((x.size(1),), dtype=reference.accumulation_dtype(x.dtype))


def _image(x: Tensor, like: Tensor) -> Tensor:
    return torch.empty(
        like.shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(like)
    )


def _bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x), _vector(x)


def _bn_finalize(
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
    scale, shift, invstd = (mean.new_empty(mean.shape) for _ in range(3))
    return scale, shift, invstd


def _bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    return _vector(grad), _vector(grad)


def _bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    act: str,
) -> Tensor:
    return _image(grad, grad if x is None else x)


def _bn_act_backward_(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    act: str,
) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "bn_stats": _bn_stats,
    "bn_finalize": _bn_finalize,
    "bn_act_backward_reduce": _bn_act_backward_reduce,
    "bn_act_backward": _bn_act_backward,
    "bn_act_backward_": _bn_act_backward_,
}
