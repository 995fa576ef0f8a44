"""What the memory-bound kernels share: how they see a tensor, per-element formulas, tiles.

An image tensor is *positions* times *channels*, and a tile some of both. In channels_last a
position is a pixel and its channels lie side by side; contiguous tensors have ``inner`` positions
of one image side by side. So one kernel serves both layouts, and a vector of one number per channel
always lies along a tile's second axis.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import memory_format

from . import launch


@triton.jit
def double(bits):
    """The number :func:`launch.bits` has taken apart."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def wide(x):
    """In the type it is accumulated in: fp64 for fp64, else fp32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def load(pointer, offsets, mask):
    """Widened; zero outside the mask."""
    return wide(tl.load(pointer + offsets, mask=mask, other=0))


@triton.jit
def store(pointer, offsets, value, mask):
    """Rounded to the type stored."""
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def activate(x, RELU: tl.constexpr):
    """relu(NaN) is NaN and relu(-0) is -0, as in torch: only what compares below zero goes."""
    if RELU:
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def relu_backward(out, g):
    """Selected, so that a NaN in g stays out where relu is flat, and passed on where out is NaN."""
    return tl.where(out <= 0, 0.0, g)


@triton.jit
def maximum(a, b):
    """NaN on either side wins. The hardware's plain maximum would lose it."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def scale_shift(x, scale, shift):
    return x * scale + shift


@triton.jit
def aligned(channels, inner, LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Both, the one that lies side by side written so that the compiler knows that ALIGN divides it
    and moves 16 bytes at once."""
    if LAST:
        return channels // ALIGN * ALIGN, inner
    else:
        return channels, inner // ALIGN * ALIGN


@triton.jit
def tile_of(channels, BP: tl.constexpr, BC: tl.constexpr):
    """The positions and channels of this program's tile; programs run through channels first."""
    program = tl.program_id(0)
    across = tl.cdiv(channels, BC)
    position = (program // across).to(tl.int64) * BP + tl.arange(0, BP)
    channel = program % across * BC + tl.arange(0, BC)
    return position, channel


@triton.jit
def offsets(position, channel, channels, inner, LAST: tl.constexpr):
    """Where the elements of a tile lie."""
    if LAST:
        return position[:, None] * channels + channel[None, :]
    else:
        image = position // inner
        pixel = image * channels * inner + position % inner
        return pixel[:, None] + (channel.to(tl.int64) * inner)[None, :]


@triton.jit
def inside(position, channel, positions, channels):
    return (position < positions)[:, None] & (channel < channels)[None, :]


@triton.jit
def per_channel(pointer, channel, channels):
    """A tile's numbers per channel, along its second axis."""
    return tl.load(pointer + channel, mask=channel < channels, other=0)[None, :]


#: Channels of a program that works on vectors only.
VECTOR = 128


class Config(NamedTuple):
    """Elements of a tile, and the warps that work on it."""

    elements: int
    num_warps: int


CONFIGS = (Config(512, 2), Config(1024, 4), Config(4096, 4), Config(8192, 8))


def pick(numel: int, dtype: torch.dtype, arch: int) -> int:
    """Which of CONFIGS: 16 bytes a thread at least, then enough programs for every processor."""
    enough = 512 if arch >= 90 else 256
    if dtype.itemsize == 2 and numel >= 4096 * enough:
        return 2
    return 1 if numel >= 1024 * enough else 0


def config_for(x: Tensor, numel: int) -> Config:
    return launch.chosen(CONFIGS, pick(numel, x.dtype, launch.arch(x)))


def alignment(n: int) -> int:
    """The largest power of two, of at most 16, that divides n."""
    return min(n & -n, 16) if n else 16


class Extent(NamedTuple):
    """A dense image tensor as kernels see it."""

    images: int  # in channels_last every pixel is one, of a single position
    channels: int
    inner: int
    last: bool

    @property
    def positions(self) -> int:
        return self.images * self.inner

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What a kernel is passed."""
        return self.images, self.channels, self.inner

    @property
    def align(self) -> int:
        """What divides the length that lies side by side."""
        return alignment(self.channels if self.last else self.inner)

    def tile(self, elements: int, most_channels: int = 256) -> tuple[int, int]:
        """Positions and channels of a tile."""
        positions = launch.next_power_of_2(max(self.positions, 1))
        channels = launch.next_power_of_2(max(self.channels, 1))
        if self.last:
            across = min(channels, most_channels, elements)
            return min(positions, elements // across), across
        rows = min(positions, elements)
        return rows, min(channels, elements // rows)

    def meta(self, tile: tuple[int, int], config: Config) -> dict[str, Any]:
        """The constexprs that kernels of a tile have."""
        return {
            "LAST": self.last,
            "ALIGN": self.align,
            "BP": tile[0],
            "BC": tile[1],
            "num_warps": config.num_warps,
        }

    def programs(self, tile: tuple[int, int]) -> int:
        """How many cover it."""
        return launch.cdiv(self.positions, tile[0]) * launch.cdiv(self.channels, tile[1])


def extent(x: Tensor) -> Extent:
    """Of a dense tensor; in channels_last if that is how torch reads its strides."""
    n, channels, height, width = x.shape
    if memory_format(x) == torch.channels_last:
        return Extent(n * height * width, channels, 1, True)
    return Extent(n, channels, height * width, False)
