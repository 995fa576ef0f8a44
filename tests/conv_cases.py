"""The convolutions under test, at the edges of the CPU kernel's tiles and of what one can be."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import EPS, PANELS, ROWS, TILE, Source, around, torch_act, torch_batch_norm
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fused_resnet
from fused_resnet import reference

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv:
    """Geometry of one convolution; its inputs come from a seed."""

    batch: int = 2
    channels: Pair = (5, 9)
    size: Pair = (6, 7)
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    emulated: bool = True  #: not one at the edge of the CPU's tiles, which is nothing to a GPU's

    def __str__(self) -> str:
        def pair(name: str, value: Pair, usual: Pair) -> str:
            return "" if value == usual else f"-{name}{value[0]}x{value[1]}"

        text = f"{self.batch}x{self.channels[0]}x{self.size[0]}x{self.size[1]}-{self.channels[1]}"
        text += pair("k", self.kernel, (0, 0)) + pair("s", self.stride, (1, 1))
        text += pair("p", self.padding, (0, 0)) + pair("d", self.dilation, (1, 1))
        return text + (f"-g{self.groups}" if self.groups > 1 else "")

    @property
    def out_size(self) -> Pair:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def work(self) -> float:
        """What a program and a product cost where they are emulated; see cases.Emulated."""
        if not self.emulated:
            return float("inf")
        taps = self.kernel[0] * self.kernel[1] * self.channels[0] // self.groups
        pixels = self.batch * self.out_size[0] * self.out_size[1]
        return 500 * self.groups + pixels * self.channels[1] * taps // 32

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def inputs(self, seed: int, dtype: torch.dtype, residual: bool = True) -> dict[str, Any]:
        source = Source(seed, dtype)
        fan_in = self.channels[0] // self.groups
        taps = self.kernel[0] * self.kernel[1]
        weight = source.normal(self.channels[1], fan_in, *self.kernel) / (fan_in * taps) ** 0.5
        shape = (self.batch, self.channels[1], *self.out_size)
        return {
            "x": source.normal(self.batch, self.channels[0], *self.size),
            "weight": weight,
            "bn": source.batch_norm(self.channels[1]),
            "residual": source.normal(*shape) if residual else None,
            "geometry": self.geometry,
        }


Given = dict[str, Any]


def scale_shift(bn: Given | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of the reference, whichever engine is under test: not all of them have it."""
    if bn is None:
        return None, None
    return reference.bn_scale_shift(bn["mean"], bn["var"], bn["gamma"], bn["beta"], EPS)


def ours(
    x: Tensor,
    weight: Tensor,
    bn: Given | None,
    residual: Tensor | None,
    geometry: Given,
    act="relu",
) -> Tensor:
    scale, shift = scale_shift(bn)
    return fused_resnet.functional.conv_bn_act(
        x, weight, scale, shift, residual, act=act, **geometry
    )


def eager(
    x: Tensor,
    weight: Tensor,
    bn: Given | None,
    residual: Tensor | None,
    geometry: Given,
    act="relu",
) -> Tensor:
    y = F.conv2d(x, weight, None, **geometry)
    y = y if bn is None else torch_batch_norm(y, **bn)
    return torch_act(y if residual is None else y + residual, act)


def raw_arguments(
    x: Tensor,
    weight: Tensor,
    bn: Given | None,
    residual: Tensor | None,
    geometry: Given,
    act="relu",
) -> tuple[Any, ...]:
    """The same call as the op's schema takes it."""
    scale, shift = scale_shift(bn)
    pairs = [list(geometry[name]) for name in ("stride", "padding", "dilation")]
    return (x, weight, scale, shift, residual, *pairs, geometry["groups"], act)


def pointwise(pixels: int, channels: Pair) -> Conv:
    return Conv(1, channels, (1, pixels), kernel=(1, 1), padding=(0, 0))


def _side(nbytes: int, channels: Pair, batch: int) -> int:
    """Smallest square image of which ``batch``, in and out, exceed ``nbytes`` in float32."""
    side = 1
    while batch * side * side * sum(channels) * 4 <= nbytes:
        side += 1
    return side


_WIDE = (24, 40)
_CHUNKED = _side(2 * max(TILE["kPackInPassBytes"][0], TILE["kChunkBytes"][0]), _WIDE, 2)

TILES = [
    *(pointwise(pixels, (5, 9)) for pixels in around(*ROWS)),
    *(Conv(1, (17, 9), (1, pixels)) for pixels in around(*ROWS)),
    *(pointwise(15, (6, width)) for width in around(*PANELS)),
    *(Conv(1, (6, width), (3, 5)) for width in around(*PANELS)),
    # Depth: vectors of the packing transposition, then the length of a sum in registers.
    *(pointwise(7, (depth, 9)) for depth in around(8, 16)),
    *(Conv(1, (depth, 9), (3, 3)) for depth in around(8, 16)),
    *(pointwise(7, (depth, 9)) for depth in around(TILE["kSumSteps"][0])),
    *(Conv(1, (TILE["kSumSteps"][0] // 9 + d, 9), (4, 3)) for d in (0, 1)),
    # Read where it lies, with padding at the ends of tiles and beyond, in wide tiles and others.
    *(
        Conv(2, (TILE["kShortDepth"][0] * 2, width), (rows, columns))
        for width in (PANELS[-1], 2 * PANELS[-1], 2 * PANELS[-1] + 1)
        for rows, columns in ((3, ROWS[-1]), (4, ROWS[-2]), (2, ROWS[-1] + 1))
    ),
    Conv(1, (TILE["kShortDepth"][0] * 2 + 1, 70), (5, 7), (5, 5), padding=(3, 4), dilation=(2, 2)),
    # Pixels that fall into one set of the cache are copied.
    *(
        Conv(1, (TILE["kSetBytes"][0] // size, 70), (4, 5), (1, 1), (s, s), (0, 0))
        for size, s in ((4, 1), (2, 1), (4, 2))
    ),
    # More than one chunk of pixels; more weights than pixels; nearly as much.
    Conv(2, _WIDE, (_CHUNKED, _CHUNKED), kernel=(1, 1), padding=(0, 0)),
    Conv(2, _WIDE, (_CHUNKED, _CHUNKED), stride=(2, 2)),
    Conv(1, (160, 170), (5, 4)),
    Conv(3, (260, 270), (9, 8), kernel=(1, 1), padding=(0, 0)),
]

TILES = [replace(case, emulated=False) for case in TILES]

#: At the edges of the GPU kernels' tiles: rows, columns, and terms of a sum at a time.
GPU_TILES = [
    pointwise(65, (17, 65)),
    pointwise(64, (16, 64)),
    pointwise(127, (15, 129)),
    Conv(1, (65, 17), (12, 11), kernel=(3, 1), padding=(1, 0)),
    Conv(1, (3, 16), (9, 15)),
]

GEOMETRIES = [
    Conv(1, (3, 16), (23, 21), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),  # the stem
    Conv(2, (24, 32), (9, 11), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),  # a projection
    Conv(kernel=(5, 3), padding=(2, 0)),
    Conv(kernel=(1, 7), padding=(0, 3)),
    Conv(kernel=(2, 2)),
    Conv(kernel=(4, 1), padding=(3, 0), stride=(2, 1)),
    Conv(stride=(2, 1)),
    Conv(stride=(3, 2), size=(13, 10)),
    Conv(kernel=(1, 1), stride=(3, 3), padding=(4, 2)),  # whole windows in the padding
    Conv(stride=(5, 4), padding=(0, 0), size=(3, 3)),
    Conv(dilation=(2, 1), padding=(2, 1)),
    Conv(dilation=(1, 3), padding=(0, 3)),
    Conv(dilation=(3, 2), padding=(1, 0), size=(9, 8), stride=(2, 2)),
    Conv(kernel=(6, 7), padding=(0, 0)),  # as large as the image
    Conv(size=(1, 1)),
    Conv(1, (1, 1), (1, 1), (1, 1), padding=(0, 0)),
    Conv(1, (1, 9)),
    Conv(2, (9, 1)),
    Conv(0),
    Conv(2, (32, 16), (1, 1), (1, 1), padding=(0, 0)),
]

GROUPED = [
    Conv(channels=(6, 6), groups=6),
    Conv(channels=(6, 18), groups=6),
    Conv(channels=(6, 4), groups=2),
    Conv(channels=(40, 40), groups=40, stride=(2, 2)),
    Conv(channels=(15, 51), groups=3),  # panels that straddle groups
    Conv(channels=(12, 39), groups=3, kernel=(1, 1), padding=(0, 0)),
    *(Conv(1, (6, 2 * width), (3, 5), groups=2, emulated=False) for width in around(*PANELS)),
    Conv(channels=(64, 64), groups=32, dilation=(2, 2), padding=(2, 2)),  # ResNeXt
    Conv(channels=(96, 96), groups=4),
]

CASES = sorted({*TILES, *GPU_TILES, *GEOMETRIES, *GROUPED}, key=str)
#: Few, for what is checked in many ways: a whole tile, a ragged one, groups, a strided one, a stem.
SOME = [
    Conv(2, (16, 32), (7, 8)),
    Conv(2, (5, 9), (6, 7)),
    Conv(2, (6, 18), (6, 5), groups=3),
    Conv(2, (9, 17), (7, 6), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Conv(2, (3, 7), (9, 11), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
]


@st.composite
def convolutions(draw):
    def pairs(least, most):
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    groups = draw(st.integers(1, 4))
    kernel, stride, padding, dilation = pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    size = tuple(draw(st.integers(n, n + 7)) for n in least)
    channels = (groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 20)))
    batch = draw(st.integers(0, 3))
    return Conv(batch, channels, size, kernel, stride, padding, dilation, groups)
