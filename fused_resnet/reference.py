"""The specification: every op in plain torch, for any dtype and device, differentiable.

Half types are computed in float32 and rounded once at the end, as every engine does. Run on float64
tensors these functions are the ground truth of the tests.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype values of ``dtype`` are computed in: float32 for half types, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch reads a 4-D tensor's strides as channels_last; not where both would do."""
    if x.dim() != 4 or x.stride(1) == 0:
        return False
    dense = x.is_contiguous(memory_format=torch.channels_last)
    if dense != x.is_contiguous():  # at once: this is asked of every image, all day
        return dense
    _, channels, height, width = x.shape
    across_n, across_c, across_h, across_w = x.stride()
    fits = across_c * channels <= across_w and across_w * width <= across_h
    return 0 not in x.shape and fits and across_n >= across_h * height != across_c


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last if any of the tensors is, else contiguous: what torch's convolution returns."""
    if any(suggests_channels_last(t) for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def empty_image(x: Tensor, shape: Sequence[int], *layout_of: Tensor) -> Tensor:
    """Of ``shape``, with x's dtype and device, in the :func:`memory_format` of ``layout_of``."""
    layout = memory_format(*layout_of)
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def conv_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The shape of a convolution's output; ``x`` and ``weight``: the shapes of what it reads."""
    size = [
        (x[i + 2] + 2 * padding[i] - dilation[i] * (weight[i + 2] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return (x[0], weight[0], *size)


def _in_format_of(y: Tensor, *tensors: Tensor) -> Tensor:
    """``y`` in the :func:`memory_format` of ``tensors``, strides of lengths of one included."""
    layout = memory_format(*tensors)
    if y.stride() == torch.empty(y.shape, device="meta", memory_format=layout).stride():
        return y
    return y.clone(memory_format=layout)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round a convolution's output before scale and shift."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _act(x: Tensor, act: str) -> Tensor:
    return torch.relu(x) if act == "relu" else x


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype).view(1, -1, 1, 1)


def eltwise_act(
    inputs: Sequence[Tensor], op: str, coeff: Sequence[float] | None, act: str
) -> Tensor:
    """``act(op_i(coeff_i * input_i))`` over tensors of one shape and dtype."""
    combine: Any = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum}[op]
    terms = [t.to(accumulation_dtype(t.dtype)) for t in inputs]
    if coeff is not None:
        terms = [t * c for t, c in zip(terms, coeff, strict=True)]
    return _act(functools.reduce(combine, terms), act).to(inputs[0].dtype)


def bn_scale_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale``, per channel."""
    dtype = accumulation_dtype(running_mean.dtype)
    deviation = torch.sqrt(running_var.to(dtype) + eps)
    scale = 1 / deviation if weight is None else weight.to(dtype) / deviation
    shift = -running_mean.to(dtype) * scale
    return scale, shift if bias is None else shift + bias.to(dtype)


def bn_act(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """``act(x * scale[c] + shift[c] + residual)``."""
    y = x.to(accumulation_dtype(x.dtype))
    y = y * _per_channel(scale, y) + _per_channel(shift, y)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return _in_format_of(_act(y, act).to(x.dtype), x)


def bn_act_maxpool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    act: str,
) -> Tensor:
    """``max_pool2d(act(x * scale[c] + shift[c]))``."""
    y = x.to(accumulation_dtype(x.dtype))
    y = _act(y * _per_channel(scale, y) + _per_channel(shift, y), act)
    y = F.max_pool2d(
        y, list(kernel_size), list(stride), list(padding), list(dilation), ceil_mode=ceil_mode
    )
    return _in_format_of(y.to(x.dtype), x)


def global_avg_pool(x: Tensor) -> Tensor:
    """The mean of each image's channel."""
    y = F.adaptive_avg_pool2d(x.to(accumulation_dtype(x.dtype)), 1)
    return _in_format_of(y.to(x.dtype), x)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    packed: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight) * scale[c] + shift[c] + residual)``; ``packed`` is not read."""
    dtype = accumulation_dtype(x.dtype)
    geometry = (list(stride), list(padding), list(dilation), groups)
    with _without_autocast(x):
        y = F.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)
    if scale is not None:
        y = y * _per_channel(scale, y)
    if shift is not None:
        y = y + _per_channel(shift, y)
    if residual is not None:
        y = y + residual.to(dtype)
    return _in_format_of(_act(y, act).to(x.dtype), x, weight)


def conv_bn_act_winograd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    tile: int,
    act: str,
    packed: Tensor | None = None,
) -> Tensor:
    """:func:`conv_bn_act`; tile, the outputs computed at once, and ``packed`` are not read."""
    geometry = ([1, 1], padding, [1, 1], 1, act)
    return conv_bn_act(x, weight, scale, shift, residual, *geometry)


def conv_bn_act_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    ceil_mode: bool,
    act: str,
) -> Tensor:
    """``max_pool2d(act(conv2d(x, weight) * scale[c] + shift[c]))``; kernel_size is the pool's."""
    dtype = accumulation_dtype(x.dtype)
    geometry = (stride, padding, dilation, 1, act)
    y = conv_bn_act(x.to(dtype), weight.to(dtype), scale, shift, None, *geometry)
    size, step, pad, gap = map(list, (kernel_size, pool_stride, pool_padding, pool_dilation))
    y = F.max_pool2d(y, size, step, pad, gap, ceil_mode=ceil_mode)
    return _in_format_of(y.to(x.dtype), x, weight)


def conv_bn_act_avgpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    """The mean over each image of ``act(conv2d(x, weight) * scale[c] + shift[c] + residual)``,
    whose values are rounded as if they were stored."""
    geometry = (stride, padding, dilation, groups)
    return global_avg_pool(conv_bn_act(x, weight, scale, shift, residual, *geometry, act))
