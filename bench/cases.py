"""What is measured: whole networks, and every op at the shapes the layers of ResNet-50 give it."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import peers
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


def cases(batches: list[int], dtypes: list[str], size: int) -> Iterator[Case]:
    """All cases there are, for images of ``size`` pixels."""
    for batch in batches:
        for name in dtypes:
            dtype = DTYPES[name]
            for network in checkpoints.MODELS:
                make = functools.partial(_network_work, network, batch, dtype, size)
                yield Case(network, "", batch, name, make)
            for layer in layers(LAYERS_OF, size):
                make = functools.partial(_conv_work, layer, batch, dtype)
                yield Case("conv_bn_act", str(layer), batch, name, make)
            for op, shapes in elementwise(size).items():
                for shape in shapes:
                    make = functools.partial(WORKS[op], (batch, *shape), dtype)
                    yield Case(op, "x".join(map(str, shape)), batch, name, make)


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
def _truth(name: str, size: int, count: int) -> Tensor:
    exact = copy.deepcopy(seeded_network(name, size)).double()
    with torch.no_grad():
        return torch.cat([exact(x.double()) for x in images(count, size).split(1)])


def _network_work(name: str, batch: int, dtype: torch.dtype, size: int) -> Work:
    model = seeded_network(name, size)
    count = max(batch, 3 // batch * batch)  # three images, where the batch allows
    inputs = list(images(count, size).split(batch))
    threads = torch.get_num_threads()
    several = [
        *variants.standard(model, dtype, inputs[0]),
        peers.onnx_runtime(model, dtype, inputs[0], threads),
        peers.openvino(model, dtype, inputs[0], threads),
    ]
    several.sort(key=lambda v: (EAGER, PEER, OURS).index(v.kind))
    return Work(several, inputs, _truth(name, size, count), network_flops(name, batch, size), None)


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


class _Random:
    """The tensors a layer meets, from one seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.g = dtype, torch.Generator().manual_seed(0)

    def activations(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g).relu_().to(self.dtype)

    def weight(self, out_channels: int, *shape: int) -> Tensor:
        w = torch.randn(out_channels, *shape, generator=self.g)
        return (w * (2 / w[0].numel()) ** 0.5).to(self.dtype)

    def batch_norm(self, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Running mean and variance, weight and bias."""
        mean, bias = 0.2 * torch.randn(2, channels, generator=self.g)
        var, weight = 0.5 + torch.rand(2, channels, generator=self.g)
        return mean, var, weight, bias


def _eager(layout: str, call: Callable[..., Tensor]) -> Variant:
    """``call`` on its tensors in one of torch's layouts."""
    order = variants.LAYOUTS[layout]

    def feed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.contiguous(memory_format=order) for t in tensors)

    return Variant(f"eager {layout}", EAGER, lambda: Runner(lambda tensors: call(*tensors), feed))


def _ours(name: str, call: Callable[..., Tensor]) -> Variant:
    runner = _eager("NHWC", call).prepare()
    return Variant(name, OURS, lambda: runner)


def _work(
    eager: Callable[..., Tensor],
    ours: dict[str, Callable[..., Tensor]],
    exact: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    flops: int,
    moved: int,
) -> Work:
    with torch.no_grad():
        truth = exact(*(t.double() for t in tensors))
    several = [_eager("NCHW", eager), _eager("NHWC", eager)]
    several += [_ours(name, call) for name, call in ours.items()]
    size = tensors[0].element_size()
    return Work(several, [tensors], truth, flops, size * (moved + truth.numel()))


def _conv_work(layer: Layer, batch: int, dtype: torch.dtype) -> Work:
    random = _Random(dtype)
    x = random.activations(batch, layer.in_channels, layer.height, layer.width)
    w = random.weight(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
    bn = random.batch_norm(layer.out_channels)
    scale, shift = functional.bn_scale_shift(*bn)
    geometry = (layer.stride, layer.padding, (1, 1), layer.groups)
    lists = (list(layer.stride), list(layer.padding), [1, 1], layer.groups)
    y = F.conv2d(x[:1].to("meta"), w.to("meta"), None, *geometry)
    residual = (random.activations(batch, *y.shape[1:]),) if layer.residual else ()

    def eager(x: Tensor, w: Tensor, *residual: Tensor) -> Tensor:
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

    channels_last = w.contiguous(memory_format=torch.channels_last)
    ours = {
        "vendor": with_engine("vendor"),
        "native": with_engine("native"),
        "native packed": with_engine(
            "native", torch.ops.fused_resnet.conv_pack(channels_last, layer.groups)
        ),
    }
    # A kernel smaller than its stride does not read all of x.
    read = x.numel()
    for kernel, stride in zip(layer.kernel, layer.stride, strict=True):
        read = read * min(kernel, stride) // stride
    moved = read + w.numel() + sum(r.numel() for r in residual)
    flops = 2 * batch * y.numel() * w[0].numel()
    return _work(eager, ours, exact, (x, w, *residual), flops, moved)


def elementwise(size: int) -> dict[str, list[tuple[int, int, int]]]:
    """For every other op, the shapes of what it is applied to."""
    convs = layers(LAYERS_OF, size)
    made = [
        (c.out_channels, -(-c.height // c.stride[0]), -(-c.width // c.stride[1])) for c in convs
    ]
    ends = [shape for c, shape in zip(convs, made, strict=True) if c.residual]
    return {
        "bn_act": list(dict.fromkeys(made)),
        "bn_act_maxpool": made[:1],
        "eltwise_act": list(dict.fromkeys(ends)),
    }


def _bn_act_work(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    random = _Random(dtype)
    x = random.activations(*shape)
    bn = random.batch_norm(shape[1])
    scale, shift = functional.bn_scale_shift(*bn)
    native = engines.implementation("bn_act", "native")
    return _work(
        lambda x: F.relu_(F.batch_norm(x, *bn)),
        {"native": lambda x: native(x, scale, shift, None, "relu")},
        lambda x: reference.bn_act(x, scale.double(), shift.double(), None, "relu"),
        (x,),
        2 * x.numel(),
        x.numel(),
    )


def _bn_act_maxpool_work(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    random = _Random(dtype)
    x = random.activations(*shape)
    bn = random.batch_norm(shape[1])
    scale, shift = functional.bn_scale_shift(*bn)
    native = engines.implementation("bn_act_maxpool", "native")
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False, "relu")
    return _work(
        lambda x: F.max_pool2d(F.relu_(F.batch_norm(x, *bn)), 3, 2, 1),
        {"native": lambda x: native(x, scale, shift, *window)},
        lambda x: reference.bn_act_maxpool(x, scale.double(), shift.double(), *window),
        (x,),
        2 * x.numel(),
        x.numel(),
    )


def _eltwise_act_work(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    random = _Random(dtype)
    x, r = random.activations(*shape), random.activations(*shape)
    native = engines.implementation("eltwise_act", "native")
    return _work(
        lambda x, r: F.relu_(x + r),
        {"native": lambda x, r: native([x, r], "sum", None, "relu")},
        lambda x, r: reference.eltwise_act([x, r], "sum", None, "relu"),
        (x, r),
        x.numel(),
        2 * x.numel(),
    )


WORKS = {
    "bn_act": _bn_act_work,
    "bn_act_maxpool": _bn_act_maxpool_work,
    "eltwise_act": _eltwise_act_work,
}
