"""The vendor engine: torch's own convolution (oneDNN, cuDNN), then one in-place pass of ours over
its output for scale, shift, residual and activation, in the accumulation type."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import below_autograd
from .plan import Params
from .reference import accumulation_dtype, conv_shape, empty_image, memory_format


def _laid_out(y: Tensor, *layout_of: Tensor) -> Tensor:
    """A convolution's result in the format of every engine; torch's of float64 on CUDA has not."""
    if y.dtype == torch.float64:
        return y.contiguous(memory_format=memory_format(*layout_of))
    return y


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
    y = F.conv2d(x, weight, None, list(stride), list(padding), list(dilation), groups)
    y = _laid_out(y, x, weight)
    if scale is None and shift is None and residual is None and act == "none":
        return y
    dtype = accumulation_dtype(y.dtype)
    if scale is None:
        scale = torch.ones(y.size(1), dtype=dtype, device=y.device)
    if shift is None:
        shift = torch.zeros(y.size(1), dtype=dtype, device=y.device)
    torch.ops.fused_resnet.bn_act_.default(y, scale, shift, residual, act)
    return y


def conv_batch_norm_act(
    x: Tensor,
    tensors: Params,
    eps: float,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    """``act(batch_norm(conv2d(x)) + residual)`` of fixed statistics, where nothing is recorded."""
    weight, bias, gamma, beta, mean, var = tensors
    with below_autograd():
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        op = torch.ops.fused_resnet.batch_norm_act_.default
        if residual is None or (residual.shape == y.shape and residual.dtype == y.dtype):
            op(y, mean, var, gamma, beta, eps, residual, act)
            return y
        op(y, mean, var, gamma, beta, eps, None, "none")
        y = y + residual
        return torch.relu(y) if act == "relu" else y


#: What cuDNN's fused kernels take; it addresses with 32 bits, and torch does not cut for them.
_CUDNN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDNN_NUMEL = 2**31


def must_be_deterministic() -> bool:
    """Whether torch's own convolutions are held to algorithms that are."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


def cudnn_why_not(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
    deterministic: bool,
) -> str | None:
    """Why cuDNN's fused ``relu(conv(x) + bias + z)`` is not :func:`conv_bn_act`, or None. Pure.

    A scale would have to be folded, and a shift of another type than x rounded: neither is exact.
    """
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    if x.dtype not in _CUDNN_DTYPES:
        return f"it does not compute in {x.dtype}"
    if act != "relu":
        return "it ends in ReLU"
    if scale is not None:
        return "there is a scale"
    if shift is not None and shift.dtype != x.dtype:
        return f"shift is {shift.dtype}, its bias {x.dtype}"
    if deterministic:
        return "torch does not hold it to deterministic algorithms"
    y = conv_shape(x.shape, weight.shape, stride, padding, dilation)
    sizes = (x.numel(), weight.numel(), math.prod(y))
    if min(sizes) == 0 or max(sizes) >= _CUDNN_NUMEL:
        return f"its tensors have 1 to {_CUDNN_NUMEL - 1} elements, got {max(sizes)}"
    return None


def conv_bn_act_cudnn(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``relu(conv2d(x, weight) + shift[c] + residual)`` in one kernel of cuDNN.

    Only where :func:`cudnn_why_not` has no objection. NaN may come out as 0: cuDNN's ReLU promises
    nothing, and whoever calls this has asked.
    """
    window = (list(stride), list(padding), list(dilation))
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, shift, *window, groups)
    return torch.ops.aten.cudnn_convolution_add_relu(
        x, weight, residual, 1.0, shift, *window, groups
    )


def conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, plus ``added``."""
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    x = empty_image(grad, shape, grad, weight)
    dx = _backward(grad, x, weight, (stride, padding, dilation), groups, [True, False])[0]
    dx = _laid_out(dx, grad, weight)
    return dx if added is None else dx.add_(added)


def conv_dgrad_(grad: Tensor, weight: Tensor, added: Tensor, *args: Any, **kwargs: Any) -> None:
    """:func:`conv_dgrad` in the place of ``added``."""
    added.add_(conv_dgrad(grad, weight, None, *args, **kwargs))


def conv_wgrad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's weight, its input being ``act(x * scale + shift)``."""
    z = _input(x, scale, shift, act)
    weight = empty_image(x, (grad.size(1), x.size(1) // groups, *kernel_size), x, grad)
    return _wide(_backward(grad, z, weight, (stride, padding, dilation), groups, [False, True])[1])


def conv_backward(
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """:func:`conv_dgrad`, in the place of ``added`` where that is given, and :func:`conv_wgrad`.

    One call of torch for both: each takes longer than a GPU for a small convolution.
    """
    z = _input(x, scale, shift, act)
    geometry = (stride, padding, dilation)
    dx, dw, _ = _backward(grad, z, weight, geometry, groups, [True, True])
    dx = _laid_out(dx, grad, weight)
    return dx if added is None else added.add_(dx), _wide(dw)


def _input(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """``act(x * scale + shift)``, which a convolution has read."""
    if scale is not None and shift is not None:
        return torch.ops.fused_resnet.bn_act(x, scale, shift, None, act)
    return torch.relu(x) if act == "relu" else x


def _wide(dw: Tensor) -> Tensor:
    """A weight's gradient as our ops return it."""
    return dw.to(accumulation_dtype(dw.dtype), memory_format=torch.channels_last)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients; of what is not differentiated it reads shape and layout alone."""
    stride, padding, dilation = (list(pair) for pair in geometry)
    given = (grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(*given, [*wanted, False])
