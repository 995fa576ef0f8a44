"""Winograd's form of a 3x3 convolution: which layers it is for, and how much it loses.

A tile of m x m outputs takes (m + 2)^2 products where the convolution has 9 m^2: 2.25 times fewer
for m = 2, 4 times for m = 4. What it reads is transformed for that, and what it makes back again,
which amplifies rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The ways of a frozen layer, and their tiles.
TILES = {"winograd2": 2, "winograd4": 4}

#: Where the polynomials behind the transforms are zero, besides infinity; of
#: csrc/kernels/cpu/winograd.h.
POINTS = {2: (0, 1, -1), 4: (0, 0.625, -0.625, 1.5, -1.5)}


def suits(weight: Tensor, geometry: Any) -> bool:
    """Whether a convolution has Winograd's form, on a device and in a type that has kernels.

    Its geometry is stride, padding, dilation and groups.
    """
    stride, _, dilation, groups = geometry
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and {*stride, *dilation, groups} == {1}
    )


def matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and B, in float64: outputs are ``A^T ((G g) * (B^T d))``, in each dimension."""
    points = POINTS[tile]
    a, g, b = (torch.zeros(tile + 2, n, dtype=torch.float64) for n in (tile, 3, tile + 2))
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        scale = 1.0
        for q in others:
            scale *= p - q
        a[i] = torch.tensor([p**j for j in range(tile)])
        g[i] = torch.tensor([p**j for j in range(3)]) / scale
        b[i, : tile + 1] = _polynomial(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = _polynomial(points)
    return a, g, b.T


def _polynomial(zeros: Sequence[float]) -> Tensor:
    """Its coefficients, the constant one first."""
    found = torch.ones(1, dtype=torch.float64)
    for zero in zeros:
        padded = torch.nn.functional.pad(found, (1, 1))
        found = padded[:-1] - zero * padded[1:]
    return found


@functools.cache
def amplification(tile: int) -> float:
    """How many times a convolution's rounding errors those of a tile's outputs are.

    Of inputs and weights that are independent and of one variance, product k of one dimension sums
    numbers ``|B_k| |G_k|`` times as large as the convolution's terms, and its rounding errors reach
    output i times ``A_ki``. The variances of all products add up; the convolution has 3 terms:

    .. math:: \\frac{1}{3 m} \\sum_{i, k} A_{ki}^2 |B_k|^2 |G_k|^2

    is the square of the ratio in one dimension, and so the ratio in two.
    """
    a, g, b = matrices(tile)
    each = (a**2).sum(1) * (g**2).sum(1) * (b**2).sum(0)
    return float(each.sum()) / (3 * tile)
