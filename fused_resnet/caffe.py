"""Networks from Caffe's files: a prototxt, and a caffemodel with its weights."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .caffe_layers import TYPES, Built, Shape, batch_norm, joins
from .caffe_net import CaffeNet, FusedCaffeNet
from .graph_units import Step

__all__ = ["CaffeError", "load"]


class CaffeError(ValueError):
    """A file that does not hold what it should; it names the file, and the line or the layer."""


def load(
    prototxt: str | os.PathLike[str], caffemodel: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A network as Caffe would run it in its TEST phase, in evaluation mode.

    Layers: Convolution, BatchNorm, Scale, ReLU, Pooling, Eltwise, InnerProduct, Softmax, Concat,
    Dropout, Flatten, Reshape, Split, Input; as ``layer`` or, with the old names, ``layers``. The
    input's shape in the file gives channels; the network takes any batch, and any image size its
    InnerProduct and Reshape layers bear. Call :func:`fused_resnet.fuse` or
    :func:`fused_resnet.freeze` on it.

    Args:
        prototxt: a path to the network's definition, a text file.
        caffemodel: a path to its weights, a binary file; None: those in the prototxt, and where it
            has none, torch's initial ones. Layers that the network does not have are left out.

    Returns:
        A module whose submodules are torch's own (``Conv2d``, ``BatchNorm2d``, ...), named after
        the layers with ``.`` as ``_``. A BatchNorm and the Scale behind it are one. It returns the
        blob that no layer reads, or if there are several, a dictionary of them by name.

    Raises:
        ImportError: protobuf, the extra ``caffe``, is not installed.
        FileNotFoundError: there is no such file.
        CaffeError: a file that cannot be read to the end, a layer that is unknown, contradicts
            itself or has no weights, blobs of another shape.
    """
    try:
        from . import caffe_proto
    except ImportError as error:
        raise ImportError(
            "caffe.load: Caffe's files are protobuf's: pip install 'fused_resnet[caffe]'"
        ) from error
    file, net = _parsed(prototxt, caffe_proto.from_text)
    graph = _Graph(file, net)
    if caffemodel is not None:
        file, net = _parsed(caffemodel, caffe_proto.from_binary)
    blobs = {layer.name: layer.blobs for layer in (*net.layers, *net.layer)}
    return graph.network(_Weights(file, blobs, required=caffemodel is not None)).eval()


def _parsed(path: str | os.PathLike[str], parse: Callable[[bytes], Any]) -> tuple[str, Any]:
    """A file's name and its content."""
    name = os.fspath(path)
    data = Path(name).read_bytes()
    try:
        return name, parse(data)
    except ValueError as error:
        raise CaffeError(f"{name}: {error}") from error


def _error(file: str, layer: Any, what: object) -> CaffeError:
    return CaffeError(f"{file}: layer {layer.name!r}: {what}")


def _type_of(layer: Any) -> str:
    """Caffe's name of a layer's type; the older message has a number for it."""
    if isinstance(layer.type, str):
        return layer.type
    field = layer.DESCRIPTOR.fields_by_name["type"]
    name = field.enum_type.values_by_number[layer.type].name
    return next((known for known in TYPES if known.upper() == name.replace("_", "")), name)


def _old_shapes(file: str, net: Any) -> list[Shape | None]:
    """The shapes of a network's own inputs, which need no layer."""
    dims = list(net.input_dim)
    shapes = [tuple(shape.dim) for shape in net.input_shape]
    shapes += [tuple(dims[i : i + 4]) for i in range(0, len(dims), 4)]
    if len(shapes) not in (0, len(net.input)) or len(dims) % 4:
        raise CaffeError(
            f"{file}: input must have 4 input_dim or one input_shape each, got {len(net.input)} "
            f"inputs, {len(dims)} input_dim and {len(net.input_shape)} input_shape"
        )
    return [*shapes] or [None] * len(net.input)


def _included(file: str, layer: Any, state: Any) -> bool:
    """Whether a layer is part of the network in the TEST phase."""

    def met(rule: Any) -> bool:
        return (
            not (rule.HasField("phase") and rule.phase != _TEST)
            and not (rule.HasField("min_level") and state.level < rule.min_level)
            and not (rule.HasField("max_level") and state.level > rule.max_level)
            and set(rule.stage) <= set(state.stage)
            and not set(rule.not_stage) & set(state.stage)
        )

    if layer.include and layer.exclude:
        raise _error(file, layer, "it has rules of both kinds, include and exclude")
    if layer.include:
        return any(map(met, layer.include))
    return not any(map(met, layer.exclude))


_TEST = 1  #: Phase


class _Weights(NamedTuple):
    """The blobs of layers, by name, and whether every layer must have its own."""

    file: str
    blobs: Mapping[str, Sequence[Any]]
    required: bool

    def of(self, layers: Sequence[Any], shapes: Sequence[Sequence[Shape]]) -> list[Tensor] | None:
        """The tensors of these layers, or None where they may be initialised instead."""
        found = [self.blobs.get(layer.name, ()) for layer in layers]
        if not self.required and not any(found):
            return None
        tensors = []
        for layer, expected, blobs in zip(layers, shapes, found, strict=True):
            if len(blobs) != len(expected):
                what = f"expected {len(expected)} blobs of weights, got {len(blobs)}"
                raise _error(self.file, layer, what)
            for i, (blob, shape) in enumerate(zip(blobs, expected, strict=True)):
                tensors.append(self.tensor(layer, i, blob, shape))
        return tensors

    def tensor(self, layer: Any, i: int, blob: Any, shape: Shape) -> Tensor:
        if blob.HasField("shape"):
            got, wanted = tuple(blob.shape.dim), shape
        else:  # the older form always has four
            got = blob.num, blob.channels, blob.height, blob.width
            wanted = (1,) * (4 - len(shape)) + shape
        if got != wanted:
            raise _error(self.file, layer, f"blob {i} must have shape {wanted}, got {got}")
        double = len(blob.double_data) > 0
        stored = blob.double_data if double else blob.data
        values = np.array(stored, dtype=np.float64 if double else np.float32)
        if len(values) != math.prod(shape):
            what = f"blob {i} must have {math.prod(shape)} values, got {len(values)}"
            raise _error(self.file, layer, what)
        return torch.from_numpy(values).to(torch.get_default_dtype()).reshape(shape)


@dataclass
class _Node:
    """A layer, or a BatchNorm with its Scale, and the numbers of what it reads and makes."""

    layers: list[Any]
    type: str
    inputs: tuple[int, ...]
    output: int


class _Graph:
    """The layers of a prototxt. Each blob that one makes is a value of its own, in place or not."""

    def __init__(self, file: str, net: Any) -> None:
        self.file = file
        self.nodes: list[_Node] = []
        self.inputs: dict[str, Shape | None] = {}
        self.values: dict[str, int] = {}  # what a blob's name stands for so far
        self.unread: dict[str, None] = {}
        self.count = 0
        self.named: set[tuple[str, str]] = set()  # what weights are known by
        if net.layer and net.layers:
            raise CaffeError(f"{file}: it has layers of both kinds, layer and layers")
        for name, shape in zip(net.input, _old_shapes(file, net), strict=True):
            self.inputs[name] = shape
            self.make(name)
        for layer in (*net.layer, *net.layers):
            if _included(file, layer, net.state):
                self.add(layer)
        if len(self.inputs) != 1:
            names = ", ".join(self.inputs) or "none"
            raise CaffeError(f"{file}: the network must have one input, got {names}")
        if not self.nodes:
            raise CaffeError(f"{file}: the network has no layers")
        self.outputs = {name: self.values[name] for name in self.unread}
        self.join_scales()

    def make(self, blob: str, value: int | None = None) -> int:
        """Let a blob's name stand for a value, by default a new one."""
        if value is None:
            value, self.count = self.count, self.count + 1
        self.values[blob] = value
        self.unread[blob] = None
        return value

    def add(self, layer: Any) -> None:
        kind = _type_of(layer)
        if kind not in TYPES:
            raise _error(self.file, layer, f"type must be one of {', '.join(TYPES)}, got {kind!r}")
        _, least, most = TYPES[kind]
        if not least <= len(layer.bottom) <= most:
            expected = least if most == least else f"{least} or more"
            what = f"{kind} must have {expected} bottoms, got {len(layer.bottom)}"
            raise _error(self.file, layer, what)
        for blob in layer.bottom:
            if blob not in self.values:
                raise _error(self.file, layer, f"no layer before it makes its bottom {blob!r}")
        for i, blob in enumerate(layer.top):
            if blob in self.values and list(layer.bottom[i : i + 1]) != [blob]:
                raise _error(self.file, layer, f"an earlier layer makes its top {blob!r}, too")
        for blob in layer.bottom:
            self.unread.pop(blob, None)
        inputs = tuple(self.values[blob] for blob in layer.bottom)
        if kind == "Input":
            given = [tuple(shape.dim) for shape in layer.input_param.shape]
            for blob, shape in zip(layer.top, itertools.cycle(given or (None,)), strict=False):
                self.inputs[blob] = shape
                self.make(blob)
        elif kind == "Split":
            for blob in layer.top:
                self.make(blob, *inputs)
        elif len(layer.top) != 1:
            raise _error(self.file, layer, f"{kind} must have 1 top, got {len(layer.top)}")
        else:
            self.nodes.append(_Node([layer], kind, inputs, self.make(layer.top[0])))

    def join_scales(self) -> None:
        """Let BatchNorms take in the Scale that alone reads what they make."""
        kept = set(self.outputs.values())
        readers = Counter(value for node in self.nodes for value in node.inputs)
        norms = {node.output: node for node in self.nodes if node.type == "BatchNorm"}
        for node in [*self.nodes]:
            norm = norms.get(node.inputs[0])
            if norm is None or node.type != "Scale" or len(node.inputs) > 1:
                continue
            if readers[norm.output] == 1 and norm.output not in kept and joins(node.layers[0]):
                norm.layers += node.layers
                norm.output = node.output
                self.nodes.remove(node)

    def network(self, weights: _Weights) -> CaffeNet:
        """The network, with these weights."""
        ((blob, shape),) = self.inputs.items()
        if not shape or min(shape) < 1:
            raise CaffeError(f"{self.file}: input {blob!r} must have a shape, got {shape}")
        shapes = {0: shape}
        modules: dict[str, nn.Module] = {}
        steps = []
        reserved = FusedCaffeNet({}, [], {})
        for node in self.nodes:
            built = self.build(node, shapes)
            _fill(built, weights.of(node.layers, built.blobs))
            name = node.layers[0].name.replace(".", "_") or node.type
            while name in modules or hasattr(reserved, name):
                name += "_"
            modules[name] = built.module
            steps.append(Step(name, node.inputs, node.output))
        return CaffeNet(modules, steps, self.outputs)

    def build(self, node: _Node, shapes: dict[int, Shape]) -> Built:
        """A node's module, without memory yet; its output's shape joins the others."""
        given = [shapes[value] for value in node.inputs]
        layer, *scale = node.layers
        try:
            with torch.device("meta"):
                if node.type == "BatchNorm":
                    built = batch_norm(layer, *given, *scale)
                else:
                    build: Any = TYPES[node.type].build
                    built = build(layer, *given)
                made = built.module.eval()(*map(torch.empty, given))
        except (IndexError, RuntimeError, ValueError) as error:
            raise _error(self.file, layer, f"{node.type}: {error}") from error
        for own, blobs in zip(node.layers, built.blobs, strict=True):
            self.check_alone(own, len(blobs))
        shapes[node.output] = tuple(made.shape)
        return built

    def check_alone(self, layer: Any, blobs: int) -> None:
        """Fail if another layer with weights has the same name, or shares them."""
        params = [param if isinstance(param, str) else param.name for param in layer.param]
        own = [("name", layer.name)] if blobs else []
        for what, name in (*own, *(("param", name) for name in params if name)):
            if (what, name) in self.named:
                text = f"its {what} {name!r} is another layer's, too: weights cannot be shared"
                raise _error(self.file, layer, text)
            self.named.add((what, name))


def _fill(built: Built, tensors: list[Tensor] | None) -> None:
    """Give a module its weights, or initial ones."""
    module: Any = built.module
    names = [*module.state_dict()]
    if names and tensors is None:
        module.to_empty(device="cpu")
        module.reset_parameters()
    elif names:
        state = zip(names, built.state(*tensors or ()), strict=True)
        module.load_state_dict(dict(state), assign=True)
