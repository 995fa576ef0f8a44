"""What is measured: a case and what is asked for; whole networks."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import graph, peers
from bench.layers import Block, table
from fused_resnet import checkpoints, engines, variants
from fused_resnet.measure import EAGER, OURS, PEER, Runner, Variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    memory: int = 0  #: bytes it takes, about, besides weights and what compilers take

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.what, self.shape, f"b{self.batch}", self.dtype)))


class Asked(NamedTuple):
    """The cases there are to choose from."""

    batches: Sequence[int]
    dtypes: Sequence[str]  #: of DTYPES
    size: int  #: of the images, in pixels
    device: str
    networks: tuple[str, ...]  #: whose layers and blocks are measured


def cases(asked: Asked) -> Iterator[Case]:
    """Inference by every network."""
    for batch in asked.batches:
        for name in asked.dtypes:
            for network in checkpoints.MODELS:
                size, device = asked.size, asked.device
                make = functools.partial(_network_work, network, batch, DTYPES[name], size, device)
                memory = batch * memory_of(table(network, size), steps=False)
                yield Case(network, "", batch, name, make, memory)


def memory_of(blocks: Iterable[Block], steps: bool) -> int:
    """Bytes, for an image, that a network or a part of one takes in float64, which is the most.

    A step keeps of every layer what it makes, before and after BatchNorm; inference has the input,
    the output and what is added of a layer at a time.
    """
    made = [layer.y for block in blocks for layer in block.layers]
    return 8 * (2 * sum(made) if steps else 3 * max(made))


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
        for mode in ("reduce-overhead", "max-autotune"):  # both replay CUDA graphs
            several.append(variants.compiled(model, dtype, mode))
        if peers.TENSORRT not in peers.absent(device):
            several.append(peers.tensorrt(model, dtype, inputs[0]))
        graphed = [v for v in several if v.kind == OURS or v.name == "eager NHWC"]
        several += [graph.replayed(v, inputs[0]) for v in graphed]
        fused = variants.fused(model, dtype)
        several += on_each_engine(fused, device, dtype, engines.INFERENCE_OPS)
    else:
        threads = torch.get_num_threads()
        several.append(peers.onnx_runtime(model, dtype, inputs[0], threads))
        several.append(peers.openvino(model, dtype, inputs[0], threads))
        if dtype == torch.float32:
            several.append(variants.int8(model, inputs[0], images(8, size)))
            several.append(variants.winograd(model, dtype, inputs[0]))
    several.append(peers.torchscript(model, dtype, inputs[0]))
    several.append(variants.tuned(model, dtype, inputs[0]))
    several.sort(key=lambda v: (EAGER, PEER, OURS).index(v.kind))
    truth = _truth(name, size, count, device)
    return Work(several, inputs, truth, network_flops(name, batch, size), None)


def network_flops(name: str, batch: int, size: int) -> int:
    """Of one forward."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        checkpoints.build(name)(torch.empty(batch, 3, size, size))
    return counter.get_total_flops()


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
