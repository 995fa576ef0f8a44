"""Caffe's layers as modules: what each type builds of its parameters, and of its blobs."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Eltwise(nn.Module):
    """``sum(c_i x_i)``, ``prod(x_i)`` or ``max(x_i)`` over tensors of one shape."""

    def __init__(self, op: str, coeff: Sequence[float] | None = None) -> None:
        super().__init__()
        self.op, self.coeff = op, coeff

    def forward(self, *inputs: Tensor) -> Tensor:
        terms: Sequence[Tensor] = inputs
        if self.coeff is not None:
            terms = [x * c for x, c in zip(inputs, self.coeff, strict=True)]
        combine: Any = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum}[self.op]
        return functools.reduce(combine, terms)

    def extra_repr(self) -> str:
        return repr(self.op) if self.coeff is None else f"{self.op!r}, coeff={self.coeff}"


class Scale(nn.Module):
    """``x * weight + bias``; ``trailing`` axes of x follow those that weight and bias have.

    The weight may be a second input instead.
    """

    def __init__(self, shape: Shape, trailing: int, weight: bool, bias: bool) -> None:
        super().__init__()
        self.after = (..., *itertools.repeat(None, trailing))
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        factor: Any = self.weight if weight is None else weight
        y = x * factor[self.after]
        return y if self.bias is None else y + self.bias[self.after]

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class InnerProduct(nn.Linear):
    """:class:`torch.nn.Linear` of all axes from ``axis`` on, as one."""

    def __init__(self, in_features: int, out_features: int, bias: bool, axis: int) -> None:
        super().__init__(in_features, out_features, bias)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.flatten(x, self.axis))


class Concat(nn.Module):
    """:func:`torch.cat` along ``axis``."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.axis)


class Reshape(nn.Module):
    """Axes ``start`` to ``end`` as ``dims``: 0 is the input's size there, -1 what is left."""

    def __init__(self, start: int, end: int, dims: Sequence[int]) -> None:
        super().__init__()
        self.start, self.end, self.dims = start, end, tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        dims = [d or x.size(self.start + i) for i, d in enumerate(self.dims)]
        return x.reshape(*x.shape[: self.start], *dims, *x.shape[self.end :])


class Built(NamedTuple):
    """What a layer becomes.

    Attributes:
        module: reads the layer's inputs.
        blobs: the shapes of the layer's blobs; those of a Scale that a BatchNorm takes in behind.
        state: makes the module's state_dict, in order, of the blobs.
    """

    module: nn.Module
    blobs: tuple[tuple[Shape, ...], ...] = ((),)
    state: Callable[..., tuple[Tensor, ...]] = lambda *blobs: blobs


def _learned(module: nn.Module) -> Built:
    """A module whose blobs are its parameters."""
    return Built(module, (tuple(tuple(p.shape) for p in module.parameters()),))


def _size(param: Any, name: str, default: int | None = None, least: int = 1) -> tuple[int, int]:
    """A size of a window: given once, or for height and width, or as ``_h`` and ``_w``."""
    sides = [name.removesuffix("_size") + side for side in ("_h", "_w")]
    known = param.DESCRIPTOR.fields_by_name
    apart = [side for side in sides if side in known and param.HasField(side)]
    given = list(getattr(param, name))
    if given and apart:
        raise ValueError(f"{name} is given, and {apart[0]} too")
    if apart:
        given = [getattr(param, side) for side in sides]
    elif not given and default is not None:
        given = [default]
    if len(given) not in (1, 2):
        raise ValueError(f"{name} must be given once or twice, got {len(given)} values")
    if min(given) < least:
        raise ValueError(f"{name} must be at least {least}, got {given}")
    return given[0], given[-1]


def _image(shape: Shape) -> Shape:
    if len(shape) != 4:
        raise ValueError(f"its input must have 4 axes, got shape {shape}")
    return shape


def _positive(param: Any, name: str) -> int:
    value = getattr(param, name)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _axis(axis: int, shape: Shape) -> int:
    """An axis counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is none of an input of shape {shape}")
    return axis % len(shape)


def _convolution(layer: Any, shape: Shape) -> Built:
    param = layer.convolution_param
    if param.axis != 1:
        raise ValueError(f"axis must be 1, got {param.axis}")
    conv = nn.Conv2d(
        _image(shape)[1],
        _positive(param, "num_output"),
        _size(param, "kernel_size"),
        _size(param, "stride", 1),
        _size(param, "pad", 0, 0),
        _size(param, "dilation", 1),
        _positive(param, "group"),
        param.bias_term,
    )
    return _learned(conv)


def batch_norm(layer: Any, shape: Shape, scale: Any = None) -> Built:
    """A BatchNorm layer, with the Scale layer behind it if that :func:`joins`.

    Its statistics are sums, and the third blob says of how much.
    """
    param = layer.batch_norm_param
    channels = _image(shape)[1]
    live = param.use_global_stats
    momentum = 1 - param.moving_average_fraction
    bn = nn.BatchNorm2d(channels, param.eps, momentum, scale is not None, live)

    def state(mean: Tensor, var: Tensor, factor: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        if len(affine) == 1:
            affine = (*affine, torch.zeros_like(*affine))
        share = torch.where(factor == 0, 0, 1 / factor)
        batches = mean.new_zeros((), dtype=torch.long)
        return (*affine, mean * share, var * share, batches) if live else affine

    vector = (channels,)
    blobs: list[tuple[Shape, ...]] = [(vector, vector, (1,))]
    if scale is not None:
        blobs.append((vector, vector) if scale.scale_param.bias_term else (vector,))
    return Built(bn, tuple(blobs), state)


def joins(scale: Any) -> bool:
    """Whether a Scale layer scales channels, as BatchNorm's affine parameters do."""
    return scale.scale_param.axis == 1 and scale.scale_param.num_axes == 1


def _scale(layer: Any, shape: Shape, factor: Shape | None = None) -> Built:
    param = layer.scale_param
    axis = _axis(param.axis, shape)
    if factor is not None:
        end = axis + len(factor)
    else:
        end = len(shape) if param.num_axes == -1 else axis + param.num_axes
    covered = shape[axis:end]
    if not axis <= end <= len(shape) or factor not in (None, covered):
        what = f"num_axes {param.num_axes}" if factor is None else f"a factor of shape {factor}"
        raise ValueError(f"{what} at axis {axis} does not fit an input of shape {shape}")
    return _learned(Scale(covered, len(shape) - end, factor is None, param.bias_term))


def _relu(layer: Any, shape: Shape) -> Built:
    slope = layer.relu_param.negative_slope
    return Built(nn.LeakyReLU(slope) if slope else nn.ReLU())


def _pooling(layer: Any, shape: Shape) -> Built:
    param = layer.pooling_param
    method = param.DESCRIPTOR.fields_by_name["pool"].enum_type.values_by_number[param.pool].name
    if method == "STOCHASTIC":
        raise ValueError("pool must be MAX or AVE, got STOCHASTIC")
    stride, pad = _size(param, "stride", 1), _size(param, "pad", 0, 0)
    image = _image(shape)[2:]
    if param.global_pooling:
        if param.kernel_size or param.kernel_h or param.kernel_w or any(pad) or stride != (1, 1):
            raise ValueError("global_pooling takes neither kernel_size nor pad nor stride")
        return Built(nn.AdaptiveMaxPool2d(1) if method == "MAX" else nn.AdaptiveAvgPool2d(1))
    kernel = _size(param, "kernel_size")
    if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
        raise ValueError(f"pad must be at most half of kernel_size {kernel}, got {pad}")
    ceil = not param.round_mode
    # torch leaves out a last window that starts behind the image. So does Caffe if there is
    # padding; else it puts out what it reads of nothing.
    for pixels, k, s in zip(image, kernel, stride, strict=True):
        if ceil and not any(pad) and -(-(pixels - k) // s) * s >= pixels:
            raise ValueError(
                f"the last window, of {k} in steps of {s}, lies outside of an image of {pixels}"
            )
    kind = nn.MaxPool2d if method == "MAX" else nn.AvgPool2d
    return Built(kind(kernel, stride, pad, ceil_mode=ceil))


def _eltwise(layer: Any, *shapes: Shape) -> Built:
    param = layer.eltwise_param
    field = param.DESCRIPTOR.fields_by_name["operation"]
    op = field.enum_type.values_by_number[param.operation].name.lower()
    if len(set(shapes)) > 1:
        raise ValueError(f"its inputs must have one shape, got {', '.join(map(str, shapes))}")
    if param.coeff and op != "sum":
        raise ValueError(f"coeff is for operation SUM only, got {op.upper()}")
    if param.coeff and len(param.coeff) != len(shapes):
        raise ValueError(f"coeff must have {len(shapes)} values, got {len(param.coeff)}")
    ones = all(c == 1 for c in param.coeff)
    return Built(Eltwise(op, None if ones else [*param.coeff]))


def _inner_product(layer: Any, shape: Shape) -> Built:
    param = layer.inner_product_param
    axis = _axis(param.axis, shape)
    features = math.prod(shape[axis:])
    linear = InnerProduct(features, _positive(param, "num_output"), param.bias_term, axis)
    if not param.transpose:
        return _learned(linear)
    ((weight, *bias),) = _learned(linear).blobs
    return Built(linear, ((weight[::-1], *bias),), lambda w, *b: (w.t().contiguous(), *b))


def _softmax(layer: Any, shape: Shape) -> Built:
    return Built(nn.Softmax(_axis(layer.softmax_param.axis, shape)))


def _dropout(layer: Any, shape: Shape) -> Built:
    return Built(nn.Dropout(layer.dropout_param.dropout_ratio))


def _concat(layer: Any, *shapes: Shape) -> Built:
    param = layer.concat_param
    if param.HasField("axis") and param.HasField("concat_dim"):
        raise ValueError("axis is given, and concat_dim too")
    axis = param.concat_dim if param.HasField("concat_dim") else param.axis
    return Built(Concat(_axis(axis, shapes[0])))


def _flatten(layer: Any, shape: Shape) -> Built:
    param = layer.flatten_param
    return Built(nn.Flatten(_axis(param.axis, shape), _axis(param.end_axis, shape)))


def _reshape(layer: Any, shape: Shape) -> Built:
    param = layer.reshape_param
    start = param.axis if param.axis >= 0 else len(shape) + param.axis + 1
    end = len(shape) if param.num_axes == -1 else start + param.num_axes
    if not 0 <= start <= end <= len(shape):
        what = f"num_axes {param.num_axes} at axis {param.axis}"
        raise ValueError(f"{what} does not fit an input of shape {shape}")
    return Built(Reshape(start, end, param.shape.dim))


class LayerType(NamedTuple):
    """What builds a layer of the shapes of its inputs, if it is a module; how many those may be."""

    build: Callable[..., Built] | None
    least: int = 1
    most: int = 1


_MANY = 2**31

#: By Caffe's name.
TYPES = {
    "BatchNorm": LayerType(batch_norm),
    "Concat": LayerType(_concat, 1, _MANY),
    "Convolution": LayerType(_convolution),
    "Dropout": LayerType(_dropout),
    "Eltwise": LayerType(_eltwise, 2, _MANY),
    "Flatten": LayerType(_flatten),
    "InnerProduct": LayerType(_inner_product),
    "Input": LayerType(None, 0, 0),
    "Pooling": LayerType(_pooling),
    "ReLU": LayerType(_relu),
    "Reshape": LayerType(_reshape),
    "Scale": LayerType(_scale, 1, 2),
    "Softmax": LayerType(_softmax),
    "Split": LayerType(None),
}
