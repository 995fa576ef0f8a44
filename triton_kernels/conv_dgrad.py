"""``conv_dgrad``: the gradient of a convolution's input, plus what else comes to it."""

from collections.abc import Sequence

from torch import Tensor

from fused_resnet.reference import empty_image

from . import checks
from .conv_launch import Epilogue, Operand, backward
from .conv_shapes import ConvShape, channels_last, check_weight, conv_shape, for_writing


def _describe(
    op: str,
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input_size: Sequence[int],
    *geometry: Sequence[int],
    groups: int,
) -> ConvShape:
    """Checks everything."""
    checks.check_dim(op, "grad", grad, 4)
    checks.check_pair(op, "input_size", input_size, 0)
    checks.check_dtype(op, "grad", grad)
    check_weight(op, weight, groups)
    checks.check_like(op, "weight", weight, grad, "grad")
    sizes = (grad.size(0), weight.size(1) * groups, *input_size)
    shape = conv_shape(op, sizes, weight.size(0), weight.shape[2:], *geometry, groups=groups)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    if added is not None:
        checks.check_like(op, "added", added, grad, "grad")
        checks.check_sizes(op, "added", added, shape.in_sizes)
    return shape


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
    """See :func:`fused_resnet.reference_training.conv_dgrad`."""
    geometry = (input_size, stride, padding, dilation)
    shape = _describe("conv_dgrad", grad, weight, added, *geometry, groups=groups)
    result = empty_image(grad, shape.in_sizes, grad, weight)
    dx = for_writing(result)
    residual = None if added is None else channels_last(added)
    backward(shape, Operand(channels_last(grad)), weight, dx, Epilogue(residual=residual))
    return result if dx is result else result.copy_(dx)


def conv_dgrad_(
    grad: Tensor,
    weight: Tensor,
    added: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """:func:`conv_dgrad` in the place of ``added``."""
    geometry = (input_size, stride, padding, dilation)
    shape = _describe("conv_dgrad_", grad, weight, added, *geometry, groups=groups)
    # What is not channels_last is worked on in a copy and written back.
    dx = channels_last(added)
    backward(shape, Operand(channels_last(grad)), weight, dx, Epilogue(residual=dx))
    if dx is not added:
        added.copy_(dx)
