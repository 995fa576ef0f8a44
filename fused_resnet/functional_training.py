"""BatchNorm with batch statistics and what follows it: :mod:`fused_resnet.functional` has them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, engines
from .functional import (
    add_act,
    bn_act,
    bn_scale_shift,
    check_act,
    check_image,
    needs_grad,
    pooling_pairs,
)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    r"""BatchNorm, a residual and an activation, with batch statistics in training.

    .. math:: y = act((x - \mu_c) / \sqrt{\sigma^2_c + \epsilon} \cdot \gamma_c + \beta_c + r)

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps: as in
            :func:`torch.nn.functional.batch_norm`; running statistics are updated in training.
        residual: added before the activation; broadcasts and promotes as in :func:`torch.add`.
        act: ``"none"`` or ``"relu"``.

    Returns:
        A tensor of x's shape, dtype and memory format, rounded once.

    Raises:
        ValueError, RuntimeError: as torch's function.
    """
    name = "batch_norm_act"
    check_act(name, act)
    vectors = (running_mean, running_var, weight, bias)
    tensors = (x, weight, bias, residual)
    engine = _batch_norm_engine(x, vectors, tensors, training, eps)
    if engine is None:
        return autograd.batch_norm_act_of_torch(x, *vectors, residual, training, momentum, eps, act)
    if not training and not needs_grad(tensors):
        scale, shift = bn_scale_shift(running_mean, running_var, weight, bias, eps)  # type: ignore[arg-type]
        return bn_act(x, scale, shift, residual, act)
    settings = (training, momentum, eps)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        checks.residual(name, residual, x, x.shape)
        y = autograd.BatchNormAct.apply(
            x, weight, bias, None, running_mean, running_var, *settings, "none", engine
        )
        return add_act(y, residual, act)
    return autograd.BatchNormAct.apply(
        x, weight, bias, residual, running_mean, running_var, *settings, act, engine
    )


def batch_norm_act_maxpool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The end of a ResNet's stem in training: BatchNorm with batch statistics, activation, pooling.

    Args:
        x, running_mean, running_var, weight, bias, momentum, eps, act: as in
            :func:`batch_norm_act` in training.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            :func:`torch.nn.functional.max_pool2d`.

    Returns:
        The pooled tensor, of x's dtype and memory format.

    Raises:
        ValueError, RuntimeError: as torch's functions.
    """
    name = "batch_norm_act_maxpool"
    check_act(name, act)
    check_image(name, x)
    pooling = pooling_pairs(name, x, kernel_size, stride, padding, dilation)
    vectors = (running_mean, running_var, weight, bias)
    engine = _batch_norm_engine(x, vectors, (x, weight, bias), True, eps)
    if engine is None or pooling[0][0] * pooling[0][1] > 255:
        y = autograd.batch_norm_act_of_torch(x, *vectors, None, True, momentum, eps, act)
        kernel, steps, pads, gaps = pooling
        return F.max_pool2d(y, kernel, steps, pads, gaps, ceil_mode=ceil_mode)
    return autograd.BatchNormActMaxpool.apply(
        *(x, weight, bias, running_mean, running_var, momentum, eps),
        *((*pooling, ceil_mode), act, engine),
    )


def _batch_norm_engine(
    x: Tensor,
    vectors: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    training: bool,
    eps: float,
) -> str | None:
    """The engine a BatchNorm runs fused on, or None where it is left to torch."""
    if autograd.batch_norm_obstacle(x, vectors, training, eps) is not None:
        return None
    engine = engines.choose("bn_stats", x.device.type, x.dtype, engines.wish())
    return None if engine == "reference" and needs_grad(tensors) else engine
