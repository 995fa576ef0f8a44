"""What is measured: whole networks, and every op at the shapes the layers of ResNet-50 give it."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import graph, peers
from fused_resnet import checkpoints, engines, functional, fuse, reference, variants
from fused_resnet.blocks import Fused
from fused_resnet.measure import EAGER, OURS, PEER, Runner, Variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS_OF = "resnet50"


class Work(NamedTuple):
    """A case made ready to be measured."""

    variants: list[Variant]
    inputs: list
    truth: Tensor
    flops: int  #: of one call
    bytes: int | None  #: the fewest that one call of an op can move; None for a network
    facts: Callable[[str], dict] = lambda variant: {}  #: more about the variant of that name


@dataclass(frozen=True)
class Case:
    what: str  #: a network or an op
    shape: str  #: of an op; empty for a network
    batch: int
    dtype: str
    make: Callable[[], Work]

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.what, self.shape, f"b{self.batch}", self.dtype)))


def cases(batches: list[int], dtypes: list[str], size: int, device: str) -> Iterator[Case]:
    """All cases of inference, for images of ``size`` pixels."""
    for batch in batches:
        for name in dtypes:
            dtype = DTYPES[name]
            for network in checkpoints.MODELS:
                make = functools.partial(_network_work, network, batch, dtype, size, device)
                yield Case(network, "", batch, name, make)
            for layer in layers(LAYERS_OF, size):
                make = functools.partial(_conv_work, layer, batch, dtype, device)
                yield Case("conv_bn_act", str(layer), batch, name, make)
            yield from op_cases(WORKS, batch, name, size, device)


def op_cases(
    works: dict[str, "Op"], batch: int, dtype: str, size: int, device: str
) -> Iterator[Case]:
    """The cases of ops that are no convolutions, at the shapes ResNet-50's layers give them."""
    for name, op in works.items():
        for shape in places(size)[op.where]:
            make = functools.partial(op.make, (batch, *shape), DTYPES[dtype], device)
            yield Case(name, "x".join(map(str, shape)), batch, dtype, make)


def images(count: int, size: int) -> Tensor:
    """Random fields, smooth as photographs are."""
    g = torch.Generator().manual_seed(0)
    x = 0.2 * torch.randn(count, 3, size, size, generator=g)
    for coarse in (4, 15):
        field = torch.randn(count, 3, coarse, coarse, generator=g)
        x += 0.7 * F.interpolate(field, (size, size), mode="bilinear")
    return x


@functools.lru_cache(maxsize=1)
def seeded_network(name: str, size: int) -> nn.Module:
    """A network whose BatchNorms have seen images, for the same weights every time."""
    return checkpoints.seeded(checkpoints.build(name), images(8, max(size, 64)), seed=0)


@functools.lru_cache(maxsize=2)
def _truth(name: str, size: int, count: int, device: str) -> Tensor:
    exact = copy.deepcopy(seeded_network(name, size)).to(device).double()
    with torch.no_grad():
        pixels = images(count, size).to(device)
        return torch.cat([exact(x.double()) for x in pixels.split(1)])


def _network_work(name: str, batch: int, dtype: torch.dtype, size: int, device: str) -> Work:
    model = copy.deepcopy(seeded_network(name, size)).to(device)
    count = max(batch, 3 // batch * batch)  # three images, where the batch allows
    inputs = list(images(count, size).to(device).split(batch))
    several = variants.standard(model, dtype, inputs[0])
    if device == "cuda":
        several.append(variants.compiled(model, dtype, "max-autotune"))
        graphed = [v for v in several if v.kind == OURS or v.name == "eager NHWC"]
        several += [graph.replayed(v, inputs[0]) for v in graphed]
        fused = variants.fused(model, dtype)
        several += on_each_engine(fused, device, dtype, engines.INFERENCE_OPS)
    else:
        threads = torch.get_num_threads()
        several.append(peers.onnx_runtime(model, dtype, inputs[0], threads))
        several.append(peers.openvino(model, dtype, inputs[0], threads))
    several.sort(key=lambda v: (EAGER, PEER, OURS).index(v.kind))
    truth = _truth(name, size, count, device)
    return Work(several, inputs, truth, network_flops(name, batch, size), None)


def network_flops(name: str, batch: int, size: int) -> int:
    """Of one forward."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        checkpoints.build(name)(torch.empty(batch, 3, size, size))
    return counter.get_total_flops()


class Layer(NamedTuple):
    """A convolution with its BatchNorm and what follows."""

    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    act: str
    residual: bool

    def __str__(self) -> str:
        text = f"{self.in_channels}x{self.height}x{self.width}-"
        text += "x".join(map(str, self.kernel))
        text += f"s{self.stride[0]}" if max(self.stride) > 1 else ""
        text += f"g{self.groups}" if self.groups > 1 else ""
        text += f"-{self.out_channels}" + ("-add" if self.residual else "")
        return text + ("-relu" if self.act == "relu" else "")


@functools.lru_cache(maxsize=4)
def layers(name: str, size: int) -> list[Layer]:
    """The distinct convolutions of a network, in the order it runs them."""
    found: dict[Layer, None] = {}
    with torch.device("meta"):
        model = fuse(checkpoints.build(name).eval())
    for block in model.modules():
        if isinstance(block, Fused):
            for p in block.pairs():
                conv = block.get(p.conv)

                def note(m, args, conv=conv, p=p) -> None:
                    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
                    shape = (*args[0].shape[1:], conv.out_channels)
                    found[Layer(*shape, *geometry, p.act, p.residual)] = None

                conv.register_forward_pre_hook(note)  # and so the block runs unfused
    model(torch.empty(1, 3, size, size, device="meta"))
    return list(found)


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


def on_engines(device: str, dtype: torch.dtype, *ops: str) -> dict[str, list[Callable[..., Any]]]:
    """By engine, the implementations of ``ops``, where it has kernels of its own for all."""
    able = ("native", "triton") if device == "cuda" else ("native",)
    return {
        engine: [engines.implementation(op, engine) for op in ops]
        for engine in able
        if all(engines.why_not(engine, op, device, dtype) is None for op in ops)
    }


def on_each_engine(
    v: Variant, device: str, dtype: torch.dtype, ops: Sequence[str]
) -> list[Variant]:
    """``v`` on every engine that has kernels of its own for all of ``ops``, which it calls."""

    def wishing(engine: str) -> Variant:
        def prepare() -> Runner:
            with engines.use_engine(engine):
                runner = v.prepare()

            def run(x: Any) -> Any:
                with engines.use_engine(engine):
                    return runner.run(x)

            return runner._replace(run=run)

        return replace(v, name=f"{v.name} on {engine}", prepare=prepare)

    return [wishing(engine) for engine in on_engines(device, dtype, *ops)]


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
    y = F.conv2d(x[:1].to("meta"), w.to("meta"), None, *geometry)
    residual = (random.activations(batch, *y.shape[1:]),) if layer.residual else ()

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
    # A kernel smaller than its stride does not read all of x.
    read = x.numel()
    for kernel, stride in zip(layer.kernel, layer.stride, strict=True):
        read = read * min(kernel, stride) // stride
    read += w.numel() + sum(r.numel() for r in residual)
    flops = 2 * batch * y.numel() * w[0].numel()
    tensors = (x, w, *residual)
    several = [*eager(unfused), *ours(fused)]
    return op_work(several, exact(*(t.double() for t in tensors)), tensors, flops, read)


@functools.lru_cache(maxsize=4)
def places(size: int) -> dict[str, list[tuple[int, int, int]]]:
    """The shapes of convolutions' outputs: everywhere, after the stem's, and at blocks' ends."""
    convs = layers(LAYERS_OF, size)
    made = [
        (c.out_channels, -(-c.height // c.stride[0]), -(-c.width // c.stride[1])) for c in convs
    ]
    ends = [shape for c, shape in zip(convs, made, strict=True) if c.residual]
    return {
        "everywhere": list(dict.fromkeys(made)),
        "stem": made[:1],
        "ends": list(dict.fromkeys(ends)),
    }


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


#: kernel_size, stride, padding, dilation and ceil_mode of ResNet's pooling.
WINDOW = ([3, 3], [2, 2], [1, 1], [1, 1], False)


class Op(NamedTuple):
    """An op that is no convolution, as a benchmark."""

    where: str  #: one of :func:`places`
    make: Callable[[tuple[int, ...], torch.dtype, str], Work]


WORKS = {
    "bn_act": Op("everywhere", _bn_act_work),
    "bn_act_maxpool": Op("stem", _bn_act_maxpool_work),
    "eltwise_act": Op("ends", _eltwise_act_work),
}
