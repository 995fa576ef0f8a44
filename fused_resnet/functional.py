"""The ops as functions, in the manner of :mod:`torch.nn.functional`.

Each checks its arguments, lets :mod:`fused_resnet.engines` choose, and calls. Where a gradient is
needed the formulas of :mod:`fused_resnet.reference` run instead, which autograd differentiates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, engines
from .conditions import needs_grad
from .native import below_autograd
from .reference import conv_shape

__all__ = [
    "add_act",
    "batch_norm_act",
    "batch_norm_act_maxpool",
    "bn_act",
    "bn_act_maxpool",
    "bn_scale_shift",
    "conv_bn_act",
    "eltwise_act",
    "global_avg_pool",
]

_ACTS = ("none", "relu")


def check_act(op: str, act: str) -> None:
    """Raise ValueError unless ``act`` is an activation there is."""
    if act not in _ACTS:
        raise ValueError(f'{op}: act must be "none" or "relu", got {act!r}')


def _pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or pair[0] < least or pair[1] < least:
        raise RuntimeError(
            f"{op}: {name} must be one or two integers of at least {least}, got {value!r}"
        )
    return pair


def check_image(op: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is 4-D."""
    if x.dim() != 4:
        raise ValueError(f"{op}: expected 4D input (got {x.dim()}D input)")


# Ops whose gradient is fused too, called as their schema has it, after the engine.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "eltwise_act": lambda engine, inputs, op, coeff, act: autograd.EltwiseAct.apply(
        op, coeff, act, engine, *inputs
    ),
    "bn_act": lambda engine, *args: autograd.BnAct.apply(*args, engine),
}


def _run(op: str, tensors: Sequence[Tensor | None], *args: Any, suited: bool = True) -> Any:
    """Choose an engine for ``op`` by its first tensor, and call it; tensors may need gradients.

    ``suited``: see :func:`engines.suits`.
    """
    x = tensors[0]
    if x is None or not x.dtype.is_floating_point:
        got = "None" if x is None else x.dtype
        raise NotImplementedError(f"{op}: input must be a floating point tensor, got {got}")
    wished = engines.wish()
    function = _FUNCTIONS.get(op)
    recorded = needs_grad(tensors)
    if recorded and function is not None and wished != "reference" and not autograd.transformed():
        engine = engines.choose(op, x.device.type, x.dtype, wished)
        if engine != "reference":
            checks.arguments(op, *args)
            return function(engine, *args)
    if recorded:
        if wished not in ("auto", "reference"):
            raise engines.EngineError(
                f"{op}: engine {wished!r} has no backward for it; an input requires grad"
            )
        wished = "reference"
    device = x.device
    engine = engines.choose(op, device.type, x.dtype, wished, suited)
    implementation = engines.implementation(op, engine)
    alike = all(t is None or t.device == device for t in tensors)
    if engine not in ("native", "triton") or not alike:  # others check nothing
        checks.arguments(op, *args)
    if engine == "reference" or not alike:
        return implementation(*args)
    with below_autograd():
        return implementation(*args)


def eltwise_act(
    inputs: Sequence[Tensor],
    op: str = "sum",
    coeff: Sequence[float] | None = None,
    act: str = "none",
) -> Tensor:
    r"""Combine tensors element by element, then activate (Caffe's Eltwise layer).

    .. math:: y = act(c_1 x_1 + c_2 x_2 + \dots), \quad act(x_1 x_2 \dots)
        \quad\text{or}\quad act(\max(x_1, x_2, \dots))

    Args:
        inputs: one or more floating point tensors; shapes broadcast and dtypes promote as in
            :func:`torch.add`. Half types are accumulated in float32 and rounded once.
        op: ``"sum"``, ``"prod"`` or ``"max"`` (NaN wins, as :func:`torch.maximum`).
        coeff: one number per input, for ``"sum"`` only.
        act: ``"none"`` or ``"relu"``.

    Returns:
        A tensor of the broadcast shape, the promoted dtype and the layout torch's op would give it.

    Raises:
        ValueError: an unknown ``op`` or ``act``, no inputs, or ``coeff`` of another length.
        RuntimeError: shapes that do not broadcast.
        NotImplementedError: inputs that are not floating point.
    """
    name = "eltwise_act"
    check_act(name, act)
    inputs = list(inputs)
    if not inputs:
        raise ValueError(f"{name}: inputs must hold at least one tensor, got none")
    if op not in ("sum", "prod", "max"):
        raise ValueError(f'{name}: op must be "sum", "prod" or "max", got {op!r}')
    if coeff is not None and op != "sum":
        raise ValueError(f'{name}: coeff is for op "sum" only, got op {op!r}')
    if coeff is not None and len(coeff) != len(inputs):
        raise ValueError(
            f"{name}: coeff must hold {len(inputs)} numbers, one per input, got {len(coeff)}"
        )
    first = inputs[0]
    if any(t.shape != first.shape or t.dtype != first.dtype for t in inputs):
        inputs = _as_torch_would(name, inputs)
        first = inputs[0]
    coefficients = None if coeff is None else [float(c) for c in coeff]
    return _run(name, inputs, inputs, op, coefficients, act)


def _as_torch_would(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Broadcast and promoted; the first in the layout torch's elementwise ops would return."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in inputs))
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in inputs))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise RuntimeError(f"{name}: inputs must broadcast, got shapes {shapes}") from error
    shadows = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in inputs]
    layout = functools.reduce(torch.add, shadows)
    first, *rest = (t.to(dtype).expand(shape) for t in inputs)
    if first.stride() != layout.stride():
        dense = torch.empty_strided(shape, layout.stride(), dtype=dtype, device=first.device)
        first = dense.copy_(first)
    return [first, *rest]


def add_act(a: Tensor, b: Tensor, act: str = "relu") -> Tensor:
    """``act(a + b)``: :func:`eltwise_act` of two tensors, the end of a residual block."""
    return eltwise_act([a, b], "sum", None, act)


def bn_scale_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""Per-channel scale and shift of BatchNorm with fixed statistics.

    .. math:: scale = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad shift = \beta - \mu \cdot scale

    Args:
        running_mean, running_var, weight, bias: vectors of C; weight and bias default to 1 and 0.
        eps: added to the variance.

    Returns:
        scale and shift, vectors of C in float32 (float64 for float64 statistics). A negative
        variance gives NaN, as in torch.

    Raises:
        RuntimeError: vectors of different lengths.
    """
    vectors = (running_mean, running_var, weight, bias)
    dtypes = {v.dtype for v in vectors if v is not None}
    if len(dtypes) == 1:
        return _run("bn_scale_shift", vectors, *vectors, eps)
    dtype = functools.reduce(torch.promote_types, dtypes)
    promoted = [None if v is None else v.to(dtype) for v in vectors]
    return _run("bn_scale_shift", vectors, *promoted, eps)


def bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    r"""BatchNorm with fixed statistics, a residual and an activation in one pass.

    .. math:: y = act(x \cdot scale_c + shift_c + r)

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, contiguous or channels_last.
        scale, shift: vectors of C from :func:`bn_scale_shift`, in float32 (float64 for float64 x).
        residual: added before the activation; broadcasts and promotes as in :func:`torch.add`.
        act: ``"none"`` or ``"relu"``.

    Returns:
        A tensor of x's shape, dtype and memory format, rounded once.

    Raises:
        ValueError: x is not 4-D, or an unknown ``act``.
        RuntimeError: scale or shift of another length or dtype, a residual that does not broadcast.
    """
    name = "bn_act"
    check_act(name, act)
    check_image(name, x)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        checks.residual(name, residual, x, x.shape)
        return add_act(bn_act(x, scale, shift), residual, act)
    return _run(name, (x, scale, shift, residual), x, scale, shift, residual, act)


def bn_act_maxpool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    act: str = "relu",
) -> Tensor:
    r"""The end of a ResNet's stem in one pass.

    .. math:: y = maxpool(act(x \cdot scale_c + shift_c))

    Args:
        x, scale, shift, act: as in :func:`bn_act`.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            :func:`torch.nn.functional.max_pool2d`.

    Returns:
        The pooled tensor, of x's dtype and memory format.

    Raises:
        ValueError: x is not 4-D, or an unknown ``act``.
        RuntimeError: scale or shift of another length or dtype, sizes the pooling cannot have.
    """
    name = "bn_act_maxpool"
    check_act(name, act)
    check_image(name, x)
    pooling = pooling_pairs(name, x, kernel_size, stride, padding, dilation)
    args = (x, scale, shift, *pooling, ceil_mode, act)
    return _run(name, (x, scale, shift), *args)


def global_avg_pool(x: Tensor) -> Tensor:
    r"""The mean of each image's channel, NaN without pixels: a ResNet's last pooling.

    .. math:: y_{nc} = \frac{1}{HW} \sum_{hw} x_{nchw}

    Args:
        x: a floating point tensor (N, C, H, W), in any memory format.

    Returns:
        A tensor (N, C, 1, 1) of x's dtype and memory format, as that of
        :func:`torch.nn.functional.adaptive_avg_pool2d` for an output size of 1.

    Raises:
        ValueError: x is not 4-D.
    """
    name = "global_avg_pool"
    check_image(name, x)
    return _run(name, (x,), x)


def pooling_pairs(
    name: str,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> list[list[int]]:
    """Checked pairs of kernel_size, stride, padding and dilation."""
    kernel = _pair(name, "kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair(name, "stride", stride, 1)
    pads, gaps = _pair(name, "padding", padding, 0), _pair(name, "dilation", dilation, 1)
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        raise RuntimeError(f"{name}: padding must be at most half of kernel_size, got {padding!r}")
    if any(
        g * (k - 1) >= n + 2 * p for g, k, n, p in zip(gaps, kernel, x.shape[2:], pads, strict=True)
    ):
        raise RuntimeError(
            f"{name}: kernel_size {kernel_size!r} is larger than the padded input {tuple(x.shape)}"
        )
    return [kernel, steps, pads, gaps]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
    packed: Tensor | None = None,
) -> Tensor:
    r"""Convolution with everything that follows it up to the next one.

    .. math:: y = act(conv(x, w) \cdot scale_c + shift_c + r)

    Args:
        x: (N, C, H, W) or (C, H, W), float32, float64, bfloat16 or float16; channels_last is fast.
        weight, stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`. Under
            autocast x and weight are cast as that function casts them.
        scale, shift: vectors of the output channels, from :func:`bn_scale_shift`; default 1 and 0.
        residual: added before the activation; broadcasts and promotes as in :func:`torch.add`.
        act: ``"none"`` or ``"relu"``.
        packed: the weight as the native engine's ``conv_pack`` op lays it out, to save doing so.

    Returns:
        A tensor of x's dtype, accumulated in float32 (float64 for float64) and rounded once, in the
        memory format torch's convolution would return.

    Raises:
        ValueError: an unknown ``act``.
        RuntimeError: ranks, channels, dtypes or sizes that do not fit, as torch's convolution.
    """
    name = "conv_bn_act"
    check_act(name, act)
    if x.dim() == 3:
        batched = None if residual is None else residual.unsqueeze(0)
        rest = (stride, padding, dilation, groups, act, packed)
        return conv_bn_act(x.unsqueeze(0), weight, scale, shift, batched, *rest).squeeze(0)
    if x.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            f"{name}: expected 3D (unbatched) or 4D (batched) input and 4D weight, got "
            f"{x.dim()}D and {weight.dim()}D"
        )
    if not weight.size(0) or not weight.size(1):
        raise RuntimeError(f"{name}: weight must have channels, got shape {tuple(weight.shape)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype.is_floating_point:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    steps, pads = _pair(name, "stride", stride, 1), _pair(name, "padding", padding, 0)
    gaps = _pair(name, "dilation", dilation, 1)
    if residual is not None:
        shape = conv_shape(x.shape, weight.shape, steps, pads, gaps)
        if residual.dtype != x.dtype or residual.shape != shape:
            if min(shape) > 0:
                checks.residual(name, residual, x, shape)
            y = conv_bn_act(
                x, weight, scale, shift, None, steps, pads, gaps, groups, "none", packed
            )
            return add_act(y, residual, act)
    suited = _suits_conv(x, weight, groups)
    tensors = (x, weight, scale, shift, residual)
    return _run(name, tensors, *tensors, steps, pads, gaps, groups, act, packed, suited=suited)


def _suits_conv(x: Tensor, weight: Tensor, groups: int) -> bool:
    layout = torch.channels_last
    channels_last = x.is_contiguous(memory_format=layout) or weight.is_contiguous(
        memory_format=layout
    )
    return engines.suits("conv_bn_act", channels_last, weight.shape, groups)


def conv_engine(x: Tensor, weight: Tensor, groups: int) -> str:
    """The engine that :func:`conv_bn_act` would run on, where no gradient is needed."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    suited = _suits_conv(x, weight, groups)
    return engines.choose("conv_bn_act", kind, dtype, engines.wish(), suited)


# At the end, for it builds on the functions above.
from .functional_training import batch_norm_act, batch_norm_act_maxpool  # noqa: E402
