"""The least time a case can take on a machine: its passes over memory, from the table of layers.

A pass takes as long as its products at the machine's peak, or as its bytes at the bandwidth of a
copy, whichever is longer; a case takes the sum of its passes. Every tensor that goes from one pass
to the next is written once and read once, and weights are read once a pass. The passes are those of
fusion as far as it goes without keeping a block on the chip:

- inference: a convolution with all that follows it up to the next one is a pass. The first one's
  includes its pooling, a block's last one its projection and the addition, the network's last one
  the average.
- training: forward a convolution reads what the one before wrote raw, and the addition at a
  block's end is part of the next block's first convolution. Backward a convolution's two gradients
  are a pass that reads both operands once, normalising them on the way.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.cases import DTYPES
from bench.layers import Block, Layer, table

CLASSES = 1000
TRAIN, BLOCK = "train/", "block"
#: A weight's gradient has four bytes, whatever is multiplied.
GRADIENT_BYTES = 4


class Machine(NamedTuple):
    """What cannot be exceeded."""

    copy: float  #: bytes a second, read and written, of a copy
    peak: dict[str, float]  #: FLOPs a second of a large convolution, by dtype


#: What was measured on GPUs by others than a run of the benchmark.
KNOWN = {"NVIDIA H200": Machine(4.3e12, {"bf16": 790e12, "fp16": 790e12})}


def machine(environment: dict[str, Any]) -> Machine | None:
    """The machine of some results: as it was measured beside them, or as it is known."""
    copy, peak = (environment.get(name) for name in ("copy_bytes_per_second", "peak_flops"))
    known = KNOWN.get((environment.get("gpus") or [""])[0])
    if environment.get("device") != "cuda":
        known = None
    if not copy or not peak:
        return known and known._replace(copy=copy or known.copy)
    return Machine(copy, peak)


class Pass(NamedTuple):
    """One of a call."""

    flops: float
    bytes: float


class _Passes:
    """Makes passes of what is counted for one image."""

    def __init__(self, batch: int, element: int) -> None:
        self.batch, self.element = batch, element

    def __call__(
        self, elements: int, flops: int = 0, weights: int = 0, grads: int = 0, flags: int = 0
    ) -> Pass:
        """``elements`` of images, ``weights`` read, ``grads`` of them written, bytes of flags."""
        moved = self.batch * (self.element * elements + flags)
        moved += self.element * weights + GRADIENT_BYTES * grads
        return Pass(self.batch * flops, moved)


def _pooled(layer: Layer) -> int:
    """Elements that max pooling leaves of the first convolution's output."""
    channels, height, width = layer.made
    return channels * ((height - 1) // 2 + 1) * ((width - 1) // 2 + 1)


def _block(block: Block, passes: _Passes, kept: int) -> Iterator[Pass]:
    """Inference by a block, of whose output ``kept`` elements are written."""
    for layer in block.convs[:-1]:
        yield passes(layer.read + layer.y, layer.flops, layer.weights)
    last, beside = block.convs[-1], block.projection
    if beside is None:
        yield passes(last.read + last.y + kept, last.flops, last.weights)
    else:
        both = (last.flops + beside.flops, last.weights + beside.weights)
        yield passes(last.read + beside.read + kept, *both)


def _block_step(block: Block, passes: _Passes, last: bool = True) -> Iterator[Pass]:
    """A step of training by a block, the ``last`` one or with one after it."""
    for layer in block.layers:
        yield passes(layer.read + layer.y, layer.flops, layer.weights)
    # A next block's first convolution reads two images and writes one; it counts one itself.
    yield passes((3 if last else 2) * block.convs[-1].y)
    for layer in block.layers:
        # Of its output's size the gradient and what is normalised; of its input's what it read and
        # the gradient made, which for a block's first one includes the identity's, is masked, and
        # is summed beside what is normalised there.
        into = 4 * layer.x if layer is block.convs[0] else layer.read + layer.x
        yield passes(2 * layer.y + into, 2 * layer.flops, layer.weights, layer.weights)


def _inference(blocks: list[Block], passes: _Passes) -> Iterator[Pass]:
    stem, *rest = blocks
    first = stem.convs[0]
    yield passes(first.read + _pooled(first), first.flops, first.weights)
    for block in rest:
        end = block.convs[-1]
        yield from _block(block, passes, end.out_channels if block is rest[-1] else end.y)
    features = rest[-1].convs[-1].out_channels
    weights = features * CLASSES
    yield passes(features + CLASSES, 2 * weights, weights + CLASSES)


def _training(blocks: list[Block], passes: _Passes) -> Iterator[Pass]:
    stem, *rest = blocks
    first = stem.convs[0]
    pooled = _pooled(first)
    yield passes(first.read + first.y, first.flops, first.weights)
    yield passes(first.y + pooled, flags=pooled)
    yield passes(2 * first.y + pooled, flags=pooled)
    yield passes(first.read + 2 * first.y, first.flops, grads=first.weights)
    for block in rest:
        yield from _block_step(block, passes, last=block is rest[-1])
    end = rest[-1].convs[-1]
    features, weights = end.out_channels, end.out_channels * CLASSES
    average = (end.y + features, features + end.y)
    yield from (passes(elements) for elements in average)
    both = features + CLASSES
    yield passes(both, 2 * weights, weights + CLASSES)
    yield passes(both, 2 * weights, weights + CLASSES)
    yield passes(both, 2 * weights, grads=weights + CLASSES)


def passes_of(row: dict[str, Any], size: int) -> list[Pass]:
    """The passes of a case, given a row of its results, for images of ``size`` pixels."""
    passes = _Passes(row["batch"], DTYPES[row["dtype"]].itemsize)
    if row["what"] in (BLOCK, TRAIN + BLOCK):
        network, _, name = row["case"].split("/")[-3].partition(".")
        block = next(b for b in table(network, size) if b.name == name)
        if row["what"] == BLOCK:
            return list(_block(block, passes, block.convs[-1].y))
        return list(_block_step(block, passes))
    if row["bytes"] is not None:
        return [Pass(row["flops"], row["bytes"])]
    if row["what"].startswith(TRAIN):
        return list(_training(table(row["what"].removeprefix(TRAIN), size), passes))
    return list(_inference(table(row["what"], size), passes))


def seconds(passes: list[Pass], dtype: str, on: Machine) -> float | None:
    """The least time for them; None where the machine's peak is not known for the dtype."""
    if dtype not in on.peak:
        return None
    return sum(max(p.flops / on.peak[dtype], p.bytes / on.copy) for p in passes)


def floor(row: dict[str, Any], size: int, on: Machine | None) -> dict[str, Any]:
    """The floor of a row of results, as it goes into JSON."""
    passes = passes_of(row, size)
    return {
        "passes": len(passes),
        "flops": sum(p.flops for p in passes),
        "bytes": sum(p.bytes for p in passes),
        "seconds": seconds(passes, row["dtype"], on) if on else None,
    }
