"""Launches of :func:`conv_gemm.conv_gemm`: a convolution, and the gradient of its input."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import conv_configs
from .conv_gemm import conv_gemm
from .conv_shapes import ConvShape, channels_last, index_type, precision
from .launch import arch, cdiv, launch
from .tiles import alignment


class Operand(NamedTuple):
    """``act(x * scale + other * slope + shift) - center``, as a product reads it."""

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    other: Tensor | None = None
    slope: Tensor | None = None
    center: Tensor | None = None


class Epilogue(NamedTuple):
    """``act(result * scale + shift + residual)``, where ``mask`` is positive, and its statistics.

    ``spread``: residual has only every so many-th row and column of the result.
    ``sums``: two of [tiles, channels], for the means and squared deviations of each tile's rows;
    with a mask for the sums of the result and of its products with ``mask.x - mask.center``.
    ``of_images``: instead of the result there are sums of it over tiles of so many rows of each
    image, see :func:`image_tiles`.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    spread: int = 1
    act: str = "none"
    mask: Operand | None = None
    sums: tuple[Tensor, Tensor] | None = None
    of_images: bool = False


class Second(NamedTuple):
    """A product that is added: of an image with one tap, times ``scale``.

    ``weight`` is [out's channels, the image's], or the reverse in a gradient.
    """

    source: Operand
    weight: Tensor
    scale: Tensor | None = None
    stride: tuple[int, int] = (1, 1)


class _Axis(NamedTuple):
    """One dimension of a launch, see :func:`conv_gemm.conv_gemm`."""

    kernel: int
    step: int
    advance: int
    phases: int
    sparse: int
    dilation: int


class _Geometry(NamedTuple):
    """What a launch is but for its tensors and what is done to their elements."""

    grid: tuple[int, int]
    numbers: tuple[int, ...]
    meta: dict[str, Any]


def _config(columns: int, source: Operand, second: Second | None = None) -> conv_configs.Config:
    two = source.other is not None or second is not None
    return conv_configs.gemm(columns, source.x.dtype, arch(source.x), 2 if two else 1)


def forward_tiles(shape: ConvShape, source: Operand) -> tuple[int, int]:
    """How many tiles of rows the statistics of a convolution come in, and rows a tile."""
    block = _config(shape.out_channels // shape.groups, source).m
    return cdiv(shape.pixels, block), block


def backward_tiles(shape: ConvShape, grad: Operand, second: Second | None) -> int:
    """How many tiles of rows the statistics of a gradient come in."""
    block = _config(shape.in_channels // shape.groups, grad, second).m
    return math.prod(shape.stride) * cdiv(_phase_rows(shape), block)


def image_tiles(shape: ConvShape, dtype: torch.dtype) -> int:
    """How many sums over an image's tiles there are."""
    return cdiv(math.prod(shape.out_size), conv_configs.mean(dtype).m)


def _phase_rows(shape: ConvShape) -> int:
    """Rows of the largest of an input gradient's phases."""
    height, width = (cdiv(n, s) for n, s in zip(shape.size, shape.stride, strict=True))
    return shape.batch * height * width


def forward(
    shape: ConvShape,
    source: Operand,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    second: Second | None = None,
) -> None:
    """``out = conv2d(source, weight)`` and ``second``; images are channels_last."""
    _launch(shape, source, weight, out, epilogue, second, is_backward=False)


def backward(
    shape: ConvShape,
    grad: Operand,
    weight: Tensor,
    dx: Tensor,
    epilogue: Epilogue,
    second: Second | None = None,
) -> None:
    """``dx``, the gradient of the input of a convolution whose output's is ``grad``."""
    _launch(shape, grad, weight, dx, epilogue, second, is_backward=True)


def _axis(kernel: int, stride: int, dilation: int, is_backward: bool) -> _Axis:
    if not is_backward:
        return _Axis(kernel, stride, dilation, 1, 1, dilation)
    common = math.gcd(stride, dilation)
    return _Axis(kernel, 1, -dilation // common, stride, stride // common, dilation)


@functools.lru_cache(maxsize=1024)
def _geometry(
    shape: ConvShape, config: conv_configs.Config, is_backward: bool, of_images: bool
) -> _Geometry:
    axes = [
        _axis(*each, is_backward)
        for each in zip(shape.kernel, shape.stride, shape.dilation, strict=True)
    ]
    channels = (shape.in_channels // shape.groups, shape.out_channels // shape.groups)
    sizes = (shape.size, shape.out_size)
    if is_backward:
        rows, offsets = _phase_rows(shape), shape.padding
        channels, sizes = channels[::-1], sizes[::-1]
    else:
        rows, offsets = shape.pixels, (-shape.padding[0], -shape.padding[1])
    row_tiles = cdiv(rows, config.m)
    if of_images:
        row_tiles = shape.batch * cdiv(math.prod(shape.out_size), config.m)
    reduced, columns = channels
    # Of few channels, several taps fill a step.
    packed = reduced < 16 and shape.kernel != (1, 1)
    reduced_unit, column_unit = reduced if packed else alignment(reduced), alignment(columns)
    return _Geometry(
        (
            row_tiles * cdiv(columns, config.n) * shape.groups,
            axes[0].phases * axes[1].phases,
        ),
        (
            shape.batch,
            *sizes[0],
            *sizes[1],
            *offsets,
            shape.groups,
            reduced // reduced_unit,
            columns // column_unit,
        ),
        {
            "REDUCED_UNIT": reduced_unit,
            "COLUMN_UNIT": column_unit,
            **{f"{name.upper()}_H": value for name, value in axes[0]._asdict().items()},
            **{f"{name.upper()}_W": value for name, value in axes[1]._asdict().items()},
            "BACKWARD": is_backward,
            "PACKED": packed,
            "PLAIN": shape.plain,
            "SUMS": of_images,
            "INDEX": index_type(rows, config.m),
            **config.meta,
        },
    )


def _describable(shape: ConvShape, x: Tensor, weight: Tensor) -> bool:
    """Whether a product's operands are what descriptors take: matrices at an address and with rows
    of a multiple of 16 bytes, counted in 32 bits."""
    size = x.element_size()
    return (
        shape.plain
        and shape.groups == 1
        and arch(x) >= 90
        and size <= 4
        and shape.in_channels * size % 16 == shape.out_channels * size % 16 == 0
        and shape.pixels + 128 < 2**31
        and all(
            t.is_meta or isinstance(t, FakeTensor) or t.data_ptr() % 16 == 0 for t in (x, weight)
        )
    )


def _launch(
    shape: ConvShape,
    source: Operand,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    second: Second | None,
    is_backward: bool,
) -> None:
    x = source.x
    columns = (shape.in_channels if is_backward else shape.out_channels) // shape.groups
    config = _config(columns, source, second)
    if epilogue.of_images:
        config = conv_configs.mean(x.dtype)
    geometry = _geometry(shape, config, is_backward, epilogue.of_images)
    weight = channels_last(weight)
    alone = source.other is None and second is None  # else it takes more than one tile
    descriptors = config.descriptors and alone and _describable(shape, x, weight)
    plain = source.scale is None and source.act == "none"
    reads = [x, source.other, source.scale, source.slope, source.shift, weight]
    numbers: list[int | None] = [None] * 3
    unit, stride = 1, (1, 1)
    if second is None:
        reads += [None] * 6
    else:
        z, stride = second.source, second.stride
        reads += [z.x, z.scale, z.shift, z.center, second.weight, second.scale]
        unit = alignment(z.x.size(1))
        numbers = [*z.x.shape[2:], z.x.size(1) // unit]
    reads += [epilogue.scale, epilogue.shift, epilogue.residual]
    mask = epilogue.mask
    reads += [None] * 4 if mask is None else [mask.x, mask.scale, mask.shift, mask.center]
    launch(
        conv_gemm,
        geometry.grid,
        reads=reads,
        writes=[out, *(epilogue.sums or (None, None))],
        numbers=(*geometry.numbers, *numbers),
        X2_UNIT=unit,
        STRIDE2_H=stride[0],
        STRIDE2_W=stride[1],
        SPREAD=epilogue.spread,
        DESCRIPTORS=descriptors,
        SPECIALIZE=descriptors and plain,
        IN_RELU=source.act == "relu",
        X2_RELU=second is not None and second.source.act == "relu",
        RELU=epilogue.act == "relu",
        PRECISION=precision(x.dtype),
        **geometry.meta,
    )
