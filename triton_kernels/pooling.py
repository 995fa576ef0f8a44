"""Windows of a pooling: checks, and how kernels find them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .checks import check_dim, check_like, check_pair, check_sizes, fail

#: Of a tile: finding windows takes registers.
MOST_ELEMENTS = 1024


@triton.jit
def split(position, height, width, SMALL: tl.constexpr):
    """Image, row and column of positions counted through images."""
    pixels = tl.cast(height, tl.int64) * width
    pixel = position % pixels
    if SMALL:
        pixel = pixel.to(tl.int32)
    return position // pixels, pixel // width, pixel % width


@triton.jit
def offsets(image, pixel, channel, channels, pixels, LAST: tl.constexpr):
    """Where a tile's elements lie; pixel is one per position, or per position and channel."""
    if LAST:
        return (image[:, None] * pixels + pixel) * channels + channel[None, :]
    else:
        return (image[:, None] * channels + channel[None, :]) * pixels + pixel


class Pooling(NamedTuple):
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def check(self, op: str) -> None:
        check_pair(op, "kernel_size", self.kernel_size, 1)
        check_pair(op, "stride", self.stride, 1)
        check_pair(op, "padding", self.padding, 0)
        check_pair(op, "dilation", self.dilation, 1)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            size = list(self.kernel_size)
            fail(
                op, f"padding must be at most half of kernel_size {size}, got {list(self.padding)}"
            )

    def check_positions(self, op: str) -> None:
        """A position in the window must fit in a byte."""
        if self.kernel_size[0] * self.kernel_size[1] > 255:
            size = list(self.kernel_size)
            fail(op, f"kernel_size must have at most 255 positions, got {size}")

    def length(self, size: int, i: int, ceil_mode: bool) -> int:
        """Of the output, as torch.nn.functional.max_pool2d counts it."""
        step, pad = self.stride[i], self.padding[i]
        reach = size + 2 * pad - self.dilation[i] * (self.kernel_size[i] - 1) - 1
        out = (reach + (step - 1 if ceil_mode else 0)) // step + 1
        # The last window has to begin inside the input or its left padding.
        return out - 1 if ceil_mode and (out - 1) * step >= size + pad else out

    def output_size(self, op: str, sizes: Sequence[int], ceil_mode: bool) -> tuple[int, int]:
        """Of an input of ``sizes``."""
        height, width = (self.length(sizes[2 + i], i, ceil_mode) for i in (0, 1))
        if height <= 0 or width <= 0:
            size = list(self.kernel_size)
            fail(op, f"kernel_size {size} is larger than the padded input {list(sizes)}")
        return height, width

    def check_pooled(
        self,
        op: str,
        x: Tensor,
        grad: Tensor,
        out: Tensor,
        argmax: Tensor,
        layout: torch.memory_format,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grad, out and argmax, dense in ``layout``; checked to be of the pooled x."""
        self.check(op)
        self.check_positions(op)
        check_dim(op, "x", x, 4)
        check_dim(op, "grad", grad, 4)
        for i in (0, 1):
            least, most = (self.length(x.size(2 + i), i, mode) for mode in (False, True))
            if grad.size(2 + i) not in (least, most):
                fail(
                    op,
                    f"grad must have {least} or {most} positions in dimension {2 + i}, got "
                    f"{grad.size(2 + i)}",
                )
        sizes = (*x.shape[:2], *grad.shape[2:])
        for argument, t in (("grad", grad), ("out", out)):
            check_like(op, argument, t, x)
            check_sizes(op, argument, t, sizes)
        if argmax.dtype != torch.uint8:
            fail(op, "argmax must be uint8")
        if argmax.device != x.device:
            fail(op, "argmax must be on the device of x")
        check_sizes(op, "argmax", argmax, sizes)
        grad, out, argmax = (t.contiguous(memory_format=layout) for t in (grad, out, argmax))
        return grad, out, argmax

    def meta(self, x: Tensor) -> dict[str, int]:
        """The constexprs of kernels; SMALL: pixels of x can be counted in 32 bits."""
        pairs = {"K": self.kernel_size, "S": self.stride, "P": self.padding, "D": self.dilation}
        meta = {f"{k}{axis}": pair[i] for k, pair in pairs.items() for i, axis in enumerate("HW")}
        reach = [n + 2 * p for n, p in zip(x.shape[2:], self.padding, strict=True)]
        return {**meta, "SMALL": reach[0] * reach[1] < 2**31}


def pixels(x: Tensor) -> tiles.Extent:
    """As tiles are cut for pooling: a position is a pixel, in either layout."""
    seen = tiles.extent(x)
    return seen._replace(images=seen.positions, inner=1)
