"""The ops of inference at the shapes that the layers of networks give them."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Asked, Case, Work, on_engines
from bench.layers import Layer, places
from fused_resnet import engines, functional, reference, variants
from fused_resnet.measure import EAGER, OURS, Runner, Variant

#: Of each element of an op's images: the reference in float64 takes three copies or so, and every
#: variant has one of its own.
HELD_BYTES = 48


class Op(NamedTuple):
    """An op as a benchmark."""

    where: str  #: one of :func:`bench.layers.places`
    make: Callable[..., Work]  #: of the shape it is given, or of a layer and the batch


def op_cases(works: dict[str, Op], asked: Asked) -> Iterator[Case]:
    """The cases of ops."""
    everywhere = places(asked.networks, asked.size)
    for batch in asked.batches:
        for dtype in asked.dtypes:
            for name, op in works.items():
                for place in everywhere[op.where]:
                    of_layer = isinstance(place, Layer)
                    given = (place, batch) if of_layer else ((batch, *place),)
                    make = functools.partial(op.make, *given, DTYPES[dtype], asked.device)
                    shape = str(place) if of_layer else "x".join(map(str, place))
                    elements = place.x + place.y if of_layer else math.prod(place)
                    memory = HELD_BYTES * batch * elements
                    yield Case(name, shape, batch, dtype, make, memory)


def cases(asked: Asked) -> Iterator[Case]:
    """Those of inference."""
    return op_cases(WORKS, asked)


class Random:
    """The tensors a layer meets, from one seed."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.g = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.device)

    def activations(self, *shape: int) -> Tensor:
        return self.normal(*shape).relu_().to(self.dtype)

    def weight(self, out_channels: int, *shape: int) -> Tensor:
        w = self.normal(out_channels, *shape)
        return (w * (2 / w[0].numel()) ** 0.5).to(self.dtype)

    def batch_norm(self, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Running mean and variance, weight and bias."""
        mean, bias = 0.2 * self.normal(2, channels)
        var, weight = 0.5 + torch.rand(2, channels, generator=self.g, device=self.device)
        return mean, var, weight, bias


#: What an op's variants return.
Outputs = Tensor | tuple[Tensor, ...]


def _of_tensors(name: str, kind: str, layout: str, call: Callable[..., Outputs]) -> Variant:
    """``call`` on its tensors in one of torch's layouts."""
    order = variants.LAYOUTS[layout]

    def feed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            t.contiguous(memory_format=order if t.dim() == 4 else torch.contiguous_format)
            for t in tensors
        )

    runner = Runner(lambda tensors: call(*tensors), feed)
    return Variant(name, kind, lambda: runner)


def eager(call: Callable[..., Outputs]) -> list[Variant]:
    """``call`` in both of torch's layouts."""
    return [_of_tensors(f"eager {layout}", EAGER, layout, call) for layout in variants.LAYOUTS]


def ours(calls: dict[str, Callable[..., Outputs]]) -> list[Variant]:
    """Each of ``calls``, in the layout that is ours."""
    return [_of_tensors(name, OURS, "NHWC", call) for name, call in calls.items()]


def op_work(
    several: list[Variant],
    truth: Outputs,
    tensors: tuple[Tensor, ...],
    flops: int,
    read: int,
) -> Work:
    """A case of an op.

    Args:
        truth: what it returns, in float64; of several tensors each counts alike for the error,
            however large its values are.
        read: elements it must read; what it returns must be written.
    """
    parts = truth if isinstance(truth, tuple) else (truth,)
    scales = [float(t.abs().max()) or 1.0 for t in parts] if len(parts) > 1 else [1.0]

    def flat(made: Outputs) -> Tensor:
        found = zip(made if isinstance(made, tuple) else (made,), scales, strict=True)
        return torch.cat([(t.double() / scale).flatten() for t, scale in found])

    def reading(v: Variant) -> Variant:
        return replace(v, prepare=lambda: v.prepare()._replace(read=flat))

    moved = read + sum(t.numel() for t in parts)
    bytes_moved = tensors[0].element_size() * moved
    return Work([reading(v) for v in several], [tensors], flat(truth), flops, bytes_moved)


def _conv_work(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> Work:
    random = Random(dtype, device)
    x = random.activations(batch, layer.in_channels, layer.height, layer.width)
    w = random.weight(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
    bn = random.batch_norm(layer.out_channels)
    scale, shift = functional.bn_scale_shift(*bn)
    geometry = (layer.stride, layer.padding, (1, 1), layer.groups)
    lists = (list(layer.stride), list(layer.padding), [1, 1], layer.groups)
    residual = (random.activations(batch, *layer.made),) if layer.residual else ()

    def unfused(x: Tensor, w: Tensor, *residual: Tensor) -> Tensor:
        y = F.batch_norm(F.conv2d(x, w, None, *geometry), *bn)
        for r in residual:
            y += r
        return F.relu_(y) if layer.act == "relu" else y

    def with_engine(engine: str, packed: Tensor | None = None) -> Callable[..., Tensor]:
        op = engines.implementation("conv_bn_act", engine)

        def call(x: Tensor, w: Tensor, *residual: Tensor) -> Tensor:
            r = residual[0] if residual else None
            return op(x, w, scale, shift, r, *lists, layer.act, packed)

        return call

    def exact(x: Tensor, w: Tensor, *residual: Tensor) -> Tensor:
        r = residual[0] if residual else None
        vectors = (scale.double(), shift.double(), r)
        return reference.conv_bn_act(x, w, *vectors, *lists, layer.act)

    fused = {
        engine: with_engine(engine)
        for engine in ("vendor", *on_engines(device, dtype, "conv_bn_act"))
    }
    if device == "cpu":
        channels_last = w.contiguous(memory_format=torch.channels_last)
        packed = torch.ops.fused_resnet.conv_pack(channels_last, layer.groups)
        fused["native packed"] = with_engine("native", packed)
    read = batch * layer.read + layer.weights + sum(r.numel() for r in residual)
    tensors = (x, w, *residual)
    several = [*eager(unfused), *ours(fused)]
    truth = exact(*(t.double() for t in tensors))
    return op_work(several, truth, tensors, batch * layer.flops, read)


def _bn_act_work(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    random = Random(dtype, device)
    x = random.activations(*shape)
    bn = random.batch_norm(shape[1])
    scale, shift = functional.bn_scale_shift(*bn)
    rest = (None, "relu")
    several = eager(lambda x: F.relu_(F.batch_norm(x, *bn)))
    for engine, (op,) in on_engines(device, dtype, "bn_act").items():
        several += ours({engine: lambda x, op=op: op(x, scale, shift, *rest)})
    truth = reference.bn_act(x.double(), scale.double(), shift.double(), *rest)
    return op_work(several, truth, (x,), 2 * x.numel(), x.numel())


def _bn_act_maxpool_work(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    random = Random(dtype, device)
    x = random.activations(*shape)
    bn = random.batch_norm(shape[1])
    scale, shift = functional.bn_scale_shift(*bn)
    several = eager(lambda x: F.max_pool2d(F.relu_(F.batch_norm(x, *bn)), 3, 2, 1))
    for engine, (op,) in on_engines(device, dtype, "bn_act_maxpool").items():
        several += ours({engine: lambda x, op=op: op(x, scale, shift, *WINDOW, "relu")})
    truth = reference.bn_act_maxpool(x.double(), scale.double(), shift.double(), *WINDOW, "relu")
    return op_work(several, truth, (x,), 2 * x.numel(), x.numel())


def _eltwise_act_work(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    random = Random(dtype, device)
    x, r = random.activations(*shape), random.activations(*shape)
    rest = ("sum", None, "relu")
    several = eager(lambda x, r: F.relu_(x + r))
    for engine, (op,) in on_engines(device, dtype, "eltwise_act").items():
        several += ours({engine: lambda x, r, op=op: op([x, r], *rest)})
    truth = reference.eltwise_act([x.double(), r.double()], *rest)
    return op_work(several, truth, (x, r), x.numel(), 2 * x.numel())


def _global_avg_pool_work(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    x = Random(dtype, device).activations(*shape)
    several = eager(lambda x: F.adaptive_avg_pool2d(x, 1))
    for engine, (op,) in on_engines(device, dtype, "global_avg_pool").items():
        several += ours({engine: op})
    truth = reference.global_avg_pool(x.double())
    return op_work(several, truth, (x,), x.numel(), x.numel())


#: kernel_size, stride, padding, dilation and ceil_mode of ResNet's pooling.
WINDOW = ([3, 3], [2, 2], [1, 1], [1, 1], False)


WORKS = {
    "conv_bn_act": Op("layers", _conv_work),
    "bn_act": Op("outputs", _bn_act_work),
    "bn_act_maxpool": Op("the stem's", _bn_act_maxpool_work),
    "global_avg_pool": Op("the last output", _global_avg_pool_work),
    "eltwise_act": Op("blocks' outputs", _eltwise_act_work),
}
