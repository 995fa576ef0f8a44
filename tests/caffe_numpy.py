"""Caffe's rules in NumPy, one blob after the other in float64, and its two file formats by hand.

Nothing here is the package's: it reads a prototxt by itself, and writes a caffemodel byte by byte.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

TOKEN = re.compile(r'\s*(?:#[^\n]*\s*)*("[^"]*"|[{}:]|[^\s{}:"]+)')


def parse(text: str) -> dict[str, list[Any]]:
    """A prototxt as nested dictionaries; every field is a list of what it was given."""
    tokens = TOKEN.findall(text)
    tokens.reverse()

    def message() -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = defaultdict(list)
        while tokens and tokens[-1] != "}":
            name, following = tokens.pop(), tokens.pop()
            if following == ":":
                following = tokens.pop()
            if following == "{":
                fields[name].append(message())
                tokens.pop()
            else:
                fields[name].append(value(following))
        return fields

    return message()


def value(token: str) -> Any:
    if token.startswith('"'):
        return token[1:-1]
    if token in ("true", "false"):
        return token == "true"
    try:
        return int(token)
    except ValueError:
        try:
            return float(np.float32(token))
        except ValueError:
            return token


def sizes(param: dict[str, list[Any]], name: str, default: int) -> tuple[int, int]:
    stem = name.removesuffix("_size")
    if given := param[name]:
        return given[0], given[-1]
    height, width = ((param[f"{stem}_{side}"] or [default])[0] for side in "hw")
    return height, width


class Net:
    """A network; weights it was not given it draws, and keeps in ``blobs`` by layer."""

    def __init__(self, text: str, blobs: dict[str, list[np.ndarray]] | None = None, seed: int = 0):
        self.net = parse(text)
        self.blobs = {} if blobs is None else blobs
        self.random = np.random.default_rng(seed)

    def layers(self) -> list[tuple[str, str, dict[str, list[Any]]]]:
        """Name, type and content of the layers of the TEST phase."""
        found = []
        for layer in (*self.net["layer"], *self.net["layers"]):
            phases = [rule["phase"] for rule in layer["include"]]
            if not phases or ["TEST"] in phases:
                kind = layer["type"][0].replace("_", "").lower()
                found.append((layer["name"][0], kind, layer))
        return found

    def run(self, x: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What each layer makes, by its name, and the blobs at the end."""
        inputs = self.net["input"] or self.layers()[0][2]["top"]
        blobs, made = {inputs[0]: x.astype(np.float64)}, {}
        for name, kind, layer in self.layers():
            if kind == "input":
                continue
            given = [blobs[bottom] for bottom in layer["bottom"]]
            self.name = name
            top = getattr(self, kind)(layer, *given)
            for blob in layer["top"]:
                blobs[blob] = top
            made[name] = top
        return made, blobs

    def weights(self, *shapes: Sequence[int]) -> list[np.ndarray]:
        if self.name not in self.blobs:
            drawn = []
            for shape in shapes:
                deviation = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.3
                drawn.append(deviation * self.random.standard_normal(shape))
            self.blobs[self.name] = [array.astype(np.float32) for array in drawn]
        return [array.astype(np.float64) for array in self.blobs[self.name]]

    def convolution(self, layer, x):
        param = layer["convolution_param"][0]
        kernel = sizes(param, "kernel_size", 0)
        stride, pad = sizes(param, "stride", 1), sizes(param, "pad", 0)
        dilation = sizes(param, "dilation", 1)
        group, out = (param["group"] or [1])[0], param["num_output"][0]
        shape = (out, x.shape[1] // group, *kernel)
        biased = (param["bias_term"] or [True])[0]
        weight, *bias = self.weights(shape, *([(out,)] if biased else []))
        size = [
            (x.shape[i + 2] + 2 * pad[i] - (dilation[i] * (kernel[i] - 1) + 1)) // stride[i] + 1
            for i in (0, 1)
        ]
        padded = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
        y = np.zeros((len(x), out, *size))
        own, fed = out // group, x.shape[1] // group
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                top, left = i * dilation[0], j * dilation[1]
                seen = padded[:, :, top:, left:][:, :, :: stride[0], :: stride[1]]
                seen = seen[:, :, : size[0], : size[1]]
                for g in range(group):
                    taps = weight[g * own : (g + 1) * own, :, i, j]
                    part = seen[:, g * fed : (g + 1) * fed].reshape(len(x), fed, -1)
                    y[:, g * own : (g + 1) * own] += (taps @ part).reshape(len(x), own, *size)
        return y + bias[0].reshape(-1, 1, 1) if biased else y

    def batchnorm(self, layer, x):
        param = (layer["batch_norm_param"] or [defaultdict(list)])[0]
        if self.name not in self.blobs:
            factor, channels = np.float32(2.5), x.shape[1]
            mean = factor * self.random.normal(0, 0.3, channels)
            var = factor * self.random.uniform(0.5, 2, channels)
            self.blobs[self.name] = [a.astype(np.float32) for a in (mean, var, np.array([factor]))]
        mean, var, (factor,) = self.blobs[self.name]
        share = np.float32(0) if factor == 0 else np.float32(1) / factor
        mean, var = ((a * share).astype(np.float64).reshape(-1, 1, 1) for a in (mean, var))
        eps = np.float64((param["eps"] or [np.float32(1e-5)])[0])
        if (param["use_global_stats"] or [True])[0] is False:
            mean = x.mean((0, 2, 3), keepdims=True)
            var = x.var((0, 2, 3), keepdims=True)
        return (x - mean) / np.sqrt(var + eps)

    def scale(self, layer, x, *factor):
        param = (layer["scale_param"] or [defaultdict(list)])[0]
        axis = (param["axis"] or [1])[0] % x.ndim
        count = factor[0].ndim if factor else (param["num_axes"] or [1])[0]
        covered = x.shape[axis:] if count == -1 else x.shape[axis : axis + count]
        shape = (*(1,) * axis, *covered, *(1,) * (x.ndim - axis - len(covered)))
        biased = (param["bias_term"] or [False])[0]
        found = [*factor, *self.weights(*[covered] * (biased + (not factor)))]
        y = x * found[0].reshape(shape)
        return y + found[1].reshape(shape) if biased else y

    def relu(self, layer, x):
        param = (layer["relu_param"] or [defaultdict(list)])[0]
        return np.where(x > 0, x, x * (param["negative_slope"] or [0])[0])

    def pooling(self, layer, x):
        param = layer["pooling_param"][0]
        average = param["pool"] == ["AVE"]
        if param["global_pooling"] == [True]:
            pooled = x.mean((2, 3)) if average else x.max((2, 3))
            return pooled[:, :, None, None]
        kernel = sizes(param, "kernel_size", 0)
        stride, pad = sizes(param, "stride", 1), sizes(param, "pad", 0)
        floor = param["round_mode"] == ["FLOOR"]
        image, count = x.shape[2:], [0, 0]
        for i in (0, 1):
            steps = (image[i] + 2 * pad[i] - kernel[i]) / stride[i]
            count[i] = int(np.floor(steps) if floor else np.ceil(steps)) + 1
            if any(pad) and (count[i] - 1) * stride[i] >= image[i] + pad[i]:
                count[i] -= 1
        y = np.zeros((*x.shape[:2], *count))
        for row in range(count[0]):
            for column in range(count[1]):
                start = [row * stride[0] - pad[0], column * stride[1] - pad[1]]
                end = [min(start[i] + kernel[i], image[i] + pad[i]) for i in (0, 1)]
                area = (end[0] - start[0]) * (end[1] - start[1])
                window = x[:, :, max(start[0], 0) : end[0], max(start[1], 0) : end[1]]
                if average:
                    y[:, :, row, column] = window.sum((2, 3)) / area
                else:
                    y[:, :, row, column] = window.max((2, 3))
        return y

    def eltwise(self, layer, *inputs):
        param = (layer["eltwise_param"] or [defaultdict(list)])[0]
        coeff = param["coeff"] or [1] * len(inputs)
        y = inputs[0] * coeff[0]
        for x, c in zip(inputs[1:], coeff[1:], strict=True):
            match (param["operation"] or ["SUM"])[0]:
                case "SUM":
                    y = y + c * x
                case "PROD":
                    y = y * x
                case "MAX":
                    y = np.maximum(y, x)
        return y

    def innerproduct(self, layer, x):
        param = layer["inner_product_param"][0]
        axis = (param["axis"] or [1])[0] % x.ndim
        out, features = param["num_output"][0], int(np.prod(x.shape[axis:]))
        transpose = (param["transpose"] or [False])[0]
        biased = (param["bias_term"] or [True])[0]
        shape = (features, out) if transpose else (out, features)
        weight, *bias = self.weights(shape, *([(out,)] if biased else []))
        y = x.reshape(*x.shape[:axis], features) @ (weight if transpose else weight.T)
        return y + bias[0] if biased else y

    def softmax(self, layer, x):
        param = (layer["softmax_param"] or [defaultdict(list)])[0]
        axis = (param["axis"] or [1])[0]
        y = np.exp(x - x.max(axis, keepdims=True))
        return y / y.sum(axis, keepdims=True)

    def dropout(self, layer, x):
        return x

    split = dropout

    def concat(self, layer, *inputs):
        param = (layer["concat_param"] or [defaultdict(list)])[0]
        return np.concatenate(inputs, (param["axis"] or param["concat_dim"] or [1])[0])

    def flatten(self, layer, x):
        param = (layer["flatten_param"] or [defaultdict(list)])[0]
        start = (param["axis"] or [1])[0] % x.ndim
        end = (param["end_axis"] or [-1])[0] % x.ndim + 1
        return x.reshape(*x.shape[:start], -1, *x.shape[end:])

    def reshape(self, layer, x):
        param = layer["reshape_param"][0]
        (axis,), (count,) = param["axis"] or [0], param["num_axes"] or [-1]
        start = axis if axis >= 0 else x.ndim + axis + 1
        end = x.ndim if count == -1 else start + count
        dims = param["shape"][0]["dim"]
        dims = [x.shape[start + i] if dim == 0 else dim for i, dim in enumerate(dims)]
        return x.reshape(x.shape[:start] + tuple(dims) + x.shape[end:])


def varint(n: int) -> bytes:
    low, rest = n & 127, n >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, content: bytes | int) -> bytes:
    """A field of a message: a number, or bytes behind their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(array: np.ndarray, old: bool = False, double: bool = False) -> bytes:
    """A BlobProto; ``old``: of four dimensions, which have a field each."""
    values = array.astype("<f8" if double else "<f4").tobytes()
    data = field(8 if double else 5, values)
    if old:
        dims = (*(1,) * (4 - array.ndim), *array.shape)
        return b"".join(field(i, n) for i, n in enumerate(dims, 1)) + data
    return data + field(7, field(1, b"".join(map(varint, array.shape))))


def caffemodel(
    blobs: dict[str, Iterable[np.ndarray]], old: bool = False, double: bool = False
) -> bytes:
    """A NetParameter with the blobs of layers, in the older message or today's."""
    layers, name_of, blobs_of = (2, 4, 6) if old else (100, 1, 7)
    net = field(1, b"net")
    for name, arrays in blobs.items():
        content = field(name_of, name.encode())
        content += b"".join(field(blobs_of, blob(array, old, double)) for array in arrays)
        net += field(layers, content)
    return net


def unpacked(array: np.ndarray) -> bytes:
    """A BlobProto in which each value has a tag of its own."""
    shape = field(7, b"".join(field(1, n) for n in array.shape))
    values = (varint(5 << 3 | 5) + struct.pack("<f", v) for v in array.flat)
    return shape + b"".join(values)


def resnet(depths: Sequence[int] = (3, 4, 6, 3), size: int = 224, classes: int = 1000) -> str:
    """The deploy file of a ResNet of bottlenecks: stride on the first 1x1, as its authors' has."""
    text = 'name: "ResNet"\ninput: "data"\n' + "".join(
        f"input_dim: {n}\n" for n in (1, 3, size, size)
    )

    def layer(name: str, kind: str, bottoms: str, top: str, param: str = "") -> None:
        nonlocal text
        given = "".join(f'\tbottom: "{b}"\n' for b in bottoms.split())
        head = f'\ttop: "{top}"\n\tname: "{name}"\n\ttype: "{kind}"\n'
        text += f"layer {{\n{given}{head}\t{param}\n}}\n"

    def conv(name: str, bottom: str, n: int, k: int, s: int, tail: str, bias: str = "false"):
        p = k // 2
        layer(
            name,
            "Convolution",
            bottom,
            name,
            f"convolution_param {{ num_output: {n} kernel_size: {k} pad: {p} stride: {s} "
            f"bias_term: {bias} }}",
        )
        layer(f"bn{tail}", "BatchNorm", name, name, "batch_norm_param { use_global_stats: true }")
        layer(f"scale{tail}", "Scale", name, name, "scale_param { bias_term: true }")

    conv("conv1", "data", 64, 7, 2, "_conv1", "true")
    layer("conv1_relu", "ReLU", "conv1", "conv1")
    layer(
        "pool1", "Pooling", "conv1", "pool1", "pooling_param { kernel_size: 3 stride: 2 pool: MAX }"
    )
    bottom = "pool1"
    for stage, depth in enumerate(depths, 2):
        width = 64 << (stage - 2)
        for i in range(depth):
            block = f"{stage}{chr(ord('a') + i)}"
            stride = 2 if stage > 2 and i == 0 else 1
            shortcut = bottom
            if i == 0:
                shortcut = f"res{block}_branch1"
                conv(shortcut, bottom, 4 * width, 1, stride, f"{block}_branch1")
            given = bottom
            for part, n, k in (("a", width, 1), ("b", width, 3), ("c", 4 * width, 1)):
                name = f"res{block}_branch2{part}"
                conv(name, given, n, k, stride if part == "a" else 1, f"{block}_branch2{part}")
                if part != "c":
                    layer(f"{name}_relu", "ReLU", name, name)
                given = name
            bottom = f"res{block}"
            layer(bottom, "Eltwise", f"{shortcut} {given}", bottom)
            layer(f"{bottom}_relu", "ReLU", bottom, bottom)
    last = -(-size // 32)
    layer(
        "pool5",
        "Pooling",
        bottom,
        "pool5",
        f"pooling_param {{ kernel_size: {last} stride: 1 pool: AVE }}",
    )
    layer("fc", "InnerProduct", "pool5", "fc", f"inner_product_param {{ num_output: {classes} }}")
    layer("prob", "Softmax", "fc", "prob")
    return text
