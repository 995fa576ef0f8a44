"""Sums over all positions of a channel, in two launches: each program adds up a run of tiles,
element by element, into its row of fp64 partials, and one kernel adds those in order. So results do
not depend on timing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import cdiv, launch

#: Partials of a channel block that are added at once.
ROWS, CHANNELS = 32, 32
#: Of a tile, whose sums are held in registers.
MOST_ELEMENTS = 2048
#: Programs to aim for: enough for every processor. Tiles that a program has at least.
_PROGRAMS, _LEAST_TILES = 1024, 4


@triton.jit
def run_of(channels, BC: tl.constexpr):
    """The run of tiles this program has, and its channels; programs run through channels first."""
    program = tl.program_id(0)
    across = tl.cdiv(channels, BC)
    return program // across, program % across * BC + tl.arange(0, BC)


@triton.jit
def total(tile):
    """Over a tile's positions, in fp64: what each element has summed up is added here once."""
    return tl.sum(tile.to(tl.float64), 0)


@triton.jit
def put(partials, run, channel, channels, total):
    """This program's row of a table of partials; total has one number per channel."""
    at = run.to(tl.int64) * channels + channel
    tl.store(partials + at, total.to(tl.float64), mask=channel < channels)


@triton.jit
def add_up_kernel(partials, sums, runs, channels, ROWS: tl.constexpr, BC: tl.constexpr):
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    for k in tl.static_range(len(sums)):
        added = tl.zeros([ROWS, BC], tl.float64)
        for row in range(0, runs, ROWS):
            at = row + tl.arange(0, ROWS)
            mask = tiles.inside(at, channel, runs, channels)
            offsets = at.to(tl.int64)[:, None] * channels + channel[None, :]
            added += tl.load(partials[k] + offsets, mask=mask, other=0)
        tiles.store(sums[k], channel, tl.sum(added, 0), channel < channels)


class Plan(NamedTuple):
    """Who adds up what."""

    extent: tiles.Extent
    tiles_a_run: int
    runs: int
    grid: tuple[int]
    meta: dict[str, Any]

    @property
    def numbers(self) -> tuple[int, ...]:
        """What kernels are passed."""
        return (*self.extent.numbers, self.tiles_a_run)

    @property
    def positions_a_run(self) -> int:
        return self.tiles_a_run * self.meta["BP"]

    def partials(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Tables of a row per run and a column per channel of x, uninitialized."""
        shape = (self.runs, x.size(1))
        return tuple(x.new_empty(shape, dtype=torch.float64) for _ in range(count))


def plan(x: Tensor, extent: tiles.Extent | None = None, most_elements: int = MOST_ELEMENTS) -> Plan:
    """For a dense image tensor; of another one's extent if that is given."""
    extent = extent or tiles.extent(x)
    config = tiles.config_for(x, extent.positions * extent.channels)
    tile = extent.tile(min(config.elements, most_elements), most_channels=64)
    across = cdiv(extent.channels, tile[1])
    along = cdiv(extent.positions, tile[0])
    tiles_a_run = max(_LEAST_TILES, cdiv(along * across, _PROGRAMS))
    runs = cdiv(along, tiles_a_run)
    return Plan(extent, tiles_a_run, runs, (runs * across,), extent.meta(tile, config))


def finish(partials: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Add up the rows of each table into a vector."""
    runs, channels = partials[0].shape
    launch(
        add_up_kernel,
        (cdiv(channels, CHANNELS),),
        reads=[tuple(partials)],
        writes=[tuple(sums)],
        numbers=[runs, channels],
        finalizes=True,
        ROWS=ROWS,
        BC=CHANNELS,
    )
