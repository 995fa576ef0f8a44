"""The ops of chains: convolutions that normalise what they read and reduce what they write.

See :mod:`fused_resnet.reference_chain`. Images are worked on in channels_last.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image

from . import checks
from .conv_launch import (
    Epilogue,
    Operand,
    Second,
    backward,
    backward_tiles,
    forward,
    forward_tiles,
)
from .conv_shapes import ConvShape, channels_last, check_weight, conv_shape, for_writing
from .conv_sums import moments, new_sums, total
from .conv_wgrad import weight_gradient
from .launch import cdiv


def _vectors(op: str, x: Tensor, channels: int, **given: Tensor | None) -> list[Tensor | None]:
    """Dense, each checked to hold a number per channel in the type x is accumulated in."""
    dtype = accumulation_dtype(x.dtype)
    return [
        None if t is None else checks.vector(op, name, t, channels, dtype, x)
        for name, t in given.items()
    ]


def _image(op: str, argument: str, t: Tensor | None, like: Tensor, sizes: Sequence[int]) -> Tensor:
    """In channels_last, checked; None if it is."""
    if t is None:
        return None  # type: ignore[return-value]
    checks.check_like(op, argument, t, like)
    checks.check_sizes(op, argument, t, sizes)
    return channels_last(t)


def _together(op: str, **given: Tensor | None) -> bool:
    """Whether they are given; all are, or none is."""
    present = {t is not None for t in given.values()}
    if len(present) > 1:
        checks.fail(op, f"{', '.join(given)} must be given together")
    return present == {True}


def _source(op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Operand:
    """What a convolution reads of a raw x."""
    checks.check_dim(op, "x", x, 4)
    checks.check_dtype(op, "x", x)
    checks.check_act(op, act)
    _together(op, scale=scale, shift=shift)
    scale, shift = _vectors(op, x, x.size(1), scale=scale, shift=shift)
    return Operand(channels_last(x), scale, shift, act)


def _shape(
    op: str, sizes: Sequence[int], weight: Tensor, like: Tensor, *geometry: Sequence[int],
    groups: int,
) -> ConvShape:  # fmt: skip
    check_weight(op, weight, groups)
    checks.check_like(op, "weight", weight, like)
    channels = weight.size(1) * groups
    if sizes[1] != channels:
        checks.fail(op, f"x must have {channels} channels, got {sizes[1]}")
    return conv_shape(op, sizes, weight.size(0), weight.shape[2:], *geometry, groups=groups)


def _gradient(
    op: str,
    grad: Tensor,
    y: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
) -> Operand:
    """``a * grad + b * y + c``."""
    checks.check_dim(op, "grad", grad, 4)
    checks.check_dtype(op, "grad", grad)
    _together(op, y=y, b=b)
    a, b, c = _vectors(op, grad, grad.size(1), a=a, b=b, c=c)
    y = _image(op, "y", y, grad, grad.shape)
    return Operand(channels_last(grad), a, c, "none", y, b)


def bn_act_conv_stats(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bn_act_conv_stats"
    source = _source(op, x, scale, shift, act)
    shape = _shape(op, x.shape, weight, x, stride, padding, dilation, groups=groups)
    result = empty_image(x, shape.out_sizes, x, weight)
    y = for_writing(result)
    like = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    if y.numel() == 0:
        return result, like.new_full((y.size(1),), math.nan), like.new_zeros(y.size(1))
    tiles, block = forward_tiles(shape, source)
    sums = new_sums(tiles, y.size(1), like)
    forward(shape, source, weight, y, Epilogue(sums=sums))
    return _finished(result, y), *moments(sums, shape.pixels, block)


def _finished(result: Tensor, worked_on: Tensor) -> Tensor:
    return result if worked_on is result else result.copy_(worked_on)


def bn_act_conv_bn_act(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: str,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    stride2: Sequence[int] = (1, 1),
) -> Tensor:
    op = "bn_act_conv_bn_act"
    checks.check_act(op, act)
    source = _source(op, x, in_scale, in_shift, in_act)
    shape = _shape(op, x.shape, weight, x, stride, padding, dilation, groups=groups)
    scale, shift = _vectors(op, x, shape.out_channels, scale=scale, shift=shift)
    residual = _image(op, "residual", residual, x, shape.out_sizes)
    result = empty_image(x, shape.out_sizes, x, weight)
    out = for_writing(result)
    second = _projection(op, shape, x, x2, weight2, scale2, stride2)
    forward(shape, source, weight, out, Epilogue(scale, shift, residual, act=act), second)
    return _finished(result, out)


def _projection(
    op: str,
    shape: ConvShape,
    x: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    scale2: Tensor | None,
    stride2: Sequence[int],
) -> Second | None:
    """A 1x1 convolution of x2 to the output's sizes, checked; None if there is none."""
    if not _together(op, x2=x2, weight2=weight2):
        if scale2 is not None:
            checks.fail(op, "scale2 must be given with x2 and weight2")
        return None
    checks.check_dim(op, "x2", x2, 4)
    checks.check_like(op, "x2", x2, x)
    checks.check_pair(op, "stride2", stride2, 1)
    down, across = stride2
    if (x2.size(0), cdiv(x2.size(2), down), cdiv(x2.size(3), across)) != (
        shape.batch, *shape.out_size,
    ):  # fmt: skip
        wanted, sizes = [shape.batch, *shape.out_size], list(x2.shape)
        checks.fail(op, f"x2 must have {wanted} images, rows and columns by stride2, got {sizes}")
    checks.check_like(op, "weight2", weight2, x)
    checks.check_sizes(op, "weight2", weight2, (shape.out_channels, x2.size(1), 1, 1))
    scale2 = _vectors(op, x, shape.out_channels, scale2=scale2)[0]
    return Second(Operand(channels_last(x2)), channels_last(weight2), scale2, (down, across))


def bn_backward_conv_dgrad(
    grad: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    weight: Tensor,
    added: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    added_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bn_backward_conv_dgrad"
    checks.check_pair(op, "input_size", input_size, 0)
    gradient = _gradient(op, grad, y, a, b, c)
    checks.check_dim(op, "weight", weight, 4)
    sizes = (grad.size(0), weight.size(1) * groups, *input_size)
    shape = _shape(op, sizes, weight, grad, stride, padding, dilation, groups=groups)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    _together(op, x=x, scale=scale, shift=shift, mean=mean, invstd=invstd)
    if added_stride < 1:
        checks.fail(op, f"added_stride must be at least 1, got {added_stride}")
    added = _image(op, "added", added, grad, _every(shape.in_sizes, added_stride))
    result = empty_image(grad, shape.in_sizes, grad, weight)
    epilogue = Epilogue(residual=added, spread=added_stride)
    mask = (x, scale, shift, mean, invstd)
    return _masked(op, shape, gradient, weight, result, epilogue, None, mask)


def _every(sizes: Sequence[int], stride: int) -> tuple[int, ...]:
    """Of what has every ``stride``-th row and column of an image."""
    return (*sizes[:2], cdiv(sizes[2], stride), cdiv(sizes[3], stride))


def _masked(
    op: str,
    shape: ConvShape,
    grad: Operand,
    weight: Tensor,
    result: Tensor,
    epilogue: Epilogue,
    second: Second | None,
    mask: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of an input, masked and reduced if ``mask`` is not of None."""
    dx = for_writing(result)
    like = dx.new_empty(0, dtype=accumulation_dtype(dx.dtype))
    if mask[0] is None:
        backward(shape, grad, weight, dx, epilogue, second)
        return _finished(result, dx), like, like.clone()
    x = _image(op, "x", mask[0], grad.x, shape.in_sizes)
    names = ("scale", "shift", "mean", "invstd")
    vectors = _vectors(op, x, x.size(1), **dict(zip(names, mask[1:], strict=True)))
    scale, shift, mean, invstd = vectors
    if dx.numel() == 0:
        return result, like.new_zeros(x.size(1)), like.new_zeros(x.size(1))
    sums = new_sums(backward_tiles(shape, grad, second), x.size(1), like)
    behind = Operand(x, scale, shift, "relu", center=mean)
    epilogue = epilogue._replace(mask=behind, sums=sums)
    backward(shape, grad, weight, dx, epilogue, second)
    return _finished(result, dx), *total(sums, invstd)  # type: ignore[arg-type]


def bn_backward_conv_wgrad(
    grad: Tensor,
    y: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    op = "bn_backward_conv_wgrad"
    gradient = _gradient(op, grad, y, a, b, c)
    source = _source(op, x, scale, shift, act)
    center = _vectors(op, x, x.size(1), center=center)[0]
    checks.check_pair(op, "kernel_size", kernel_size, 1)
    if groups < 1 or x.size(1) % groups or grad.size(1) % groups:
        sizes = f"{x.size(1)} and {grad.size(1)}"
        checks.fail(op, f"groups must be positive and divide the channels {sizes}, got {groups}")
    shape = conv_shape(op, x.shape, grad.size(1), kernel_size, stride, padding, dilation, groups)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    return weight_gradient(shape, gradient, source._replace(center=center))


def bn_act_gram_backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor,
    act: str,
    matrix: Tensor,
    offset: Tensor,
    added: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bn_act_gram_backward"
    if stride < 1:
        checks.fail(op, f"stride must be at least 1, got {stride}")
    if stride > 1 and mean is not None:
        checks.fail(op, f"stride must be 1 with mean and invstd, got {stride}")
    gradient = _gradient(op, grad, None, None, None, None)
    source = _source(op, x, scale, shift, act)
    sizes = _every(x.shape, stride)
    shape = _shape(op, sizes, weight, grad, [1, 1], [0, 0], [1, 1], groups=1)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    channels = x.size(1)
    center, offset = _vectors(op, x, channels, center=center, offset=offset)  # type: ignore
    checks.check_like(op, "matrix", matrix, x)
    checks.check_sizes(op, "matrix", matrix, (channels, channels))
    if _together(op, mean=mean, invstd=invstd):
        _together(op, mean=mean, scale=scale)
    added = _image(op, "added", added, grad, sizes)
    steps = (stride, stride)
    second = Second(source._replace(center=center), matrix.contiguous(), stride=steps)
    mask = (None if mean is None else x, scale, shift, mean, invstd)
    result = empty_image(x, sizes, x)
    epilogue = Epilogue(shift=offset, residual=added)
    return _masked(op, shape, gradient, weight, result, epilogue, second, mask)
