"""Whole blocks of networks, inference and training, at the shapes they have there."""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, Asked, Case, Work, memory_of, on_each_engine, seeded_network
from bench.floors import BLOCK, TRAIN
from bench.layers import Block, table
from bench.ops import Random
from bench.training import autocast, step_work
from fused_resnet import engines, variants
from fused_resnet.measure import EAGER, OURS, PEER


def cases(asked: Asked) -> Iterator[Case]:
    """Of each network every block that has shapes of its own."""
    for network in asked.networks:  # each is made once
        for batch in asked.batches:
            for name in asked.dtypes:
                for block in distinct(network, asked.size):
                    given = (network, block, batch, DTYPES[name], asked.size, asked.device)
                    shape = f"{network}.{block.name}"
                    for what, make in ((BLOCK, _inference), (TRAIN + BLOCK, _training)):
                        memory = batch * memory_of([block], steps=what != BLOCK)
                        made = functools.partial(make, *given)
                        yield Case(what, shape, batch, name, made, memory)


def distinct(network: str, size: int) -> list[Block]:
    """The blocks, of those that are alike the first."""
    found: dict[tuple, Block] = {}
    for block in table(network, size):
        if block.name:
            found.setdefault((tuple(block.convs), block.projection), block)
    return list(found.values())


def _module(network: str, block: Block, size: int, device: str) -> nn.Module:
    return copy.deepcopy(seeded_network(network, size).get_submodule(block.name)).to(device)


def _inputs(block: Block, batch: int, device: str) -> Tensor:
    first = block.convs[0]
    shape = (batch, first.in_channels, first.height, first.width)
    return Random(torch.float32, device).activations(*shape)


def _counted(block: Block, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs of inference, and its bytes where all between input and output stays on the chip."""
    first, last = block.convs[0], block.convs[-1]
    weights = sum(layer.weights for layer in block.layers)
    moved = dtype.itemsize * (batch * (first.x + last.y) + weights)
    return batch * sum(layer.flops for layer in block.layers), moved


def _inference(
    network: str, block: Block, batch: int, dtype: torch.dtype, size: int, device: str
) -> Work:
    model = _module(network, block, size, device)
    x = _inputs(block, batch, device)
    several = [*variants.standard(model, dtype, x), variants.tuned(model, dtype, x)]
    if device == "cuda":
        fused = variants.fused(model, dtype)
        several += on_each_engine(fused, device, dtype, engines.INFERENCE_OPS)
    several.sort(key=lambda v: (EAGER, PEER, OURS).index(v.kind))
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    return Work(several, [x], truth, *_counted(block, batch, dtype))


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward, into the input as well, of half an image's sum of squares."""
    x = x.detach().requires_grad_()
    with autocast(dtype, x.device.type):
        y = model(x)
    wide = y if dtype == torch.float64 else y.float()
    (wide.square().sum() / (2 * x.size(0))).backward()


def _training(
    network: str, block: Block, batch: int, dtype: torch.dtype, size: int, device: str
) -> Work:
    flops, moved = _counted(block, batch, dtype)
    batches = list(_inputs(block, 3 * batch, device).split(batch))
    # Backward computes as much for the input and for the weight of each convolution.
    model = _module(network, block, size, device)
    return step_work(model, batches, dtype, step, 3 * flops, 3 * moved)
