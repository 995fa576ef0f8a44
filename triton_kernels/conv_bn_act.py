"""``conv_bn_act``: act(conv2d(x, weight) * scale[c] + shift[c] + residual)."""

from collections.abc import Sequence

from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image

from . import checks
from .conv_launch import Epilogue, Operand, forward
from .conv_shapes import ConvShape, channels_last, check_weight, conv_shape, for_writing


def checked(
    op: str,
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
) -> tuple[ConvShape, Epilogue]:
    """The convolution, and what follows it with dense tensors."""
    checks.check_dim(op, "x", x, 4)
    checks.check_dtype(op, "x", x)
    checks.check_act(op, act)
    check_weight(op, weight, groups)
    checks.check_like(op, "weight", weight, x)
    channels = weight.size(1) * groups
    if x.size(1) != channels:
        checks.fail(
            op,
            f"x must have {channels} channels for weight {list(weight.shape)} and groups {groups}, "
            f"got {x.size(1)}",
        )
    geometry = (weight.shape[2:], stride, padding, dilation, groups)
    shape = conv_shape(op, x.shape, weight.size(0), *geometry)
    out_vector = (shape.out_channels, accumulation_dtype(x.dtype), x)
    scale = None if scale is None else checks.vector(op, "scale", scale, *out_vector)
    shift = None if shift is None else checks.vector(op, "shift", shift, *out_vector)
    if residual is not None:
        checks.check_like(op, "residual", residual, x)
        checks.check_sizes(op, "residual", residual, shape.out_sizes)
        residual = channels_last(residual)
    return shape, Epilogue(scale, shift, residual, act=act)


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
    """See :func:`fused_resnet.reference.conv_bn_act`; ``packed`` is not read."""
    op = "conv_bn_act"
    geometry = (stride, padding, dilation, groups)
    shape, epilogue = checked(op, x, weight, scale, shift, residual, *geometry, act)
    result = empty_image(x, shape.out_sizes, x, weight)
    out = for_writing(result)
    forward(shape, Operand(channels_last(x)), weight, out, epilogue)
    return result if out is result else result.copy_(out)
