"""What a convolution is, and what its kernels are launched with."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import checks


class ConvShape(NamedTuple):
    """A convolution of [batch, in_channels, *size] to [batch, out_channels, *out_size]."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def in_sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, *self.size

    @property
    def out_sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, *self.out_size

    @property
    def pixels(self) -> int:
        """Of the output, in all images."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def plain(self) -> bool:
        """Whether it is a matrix product of the tensors as they lie."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)


def check_weight(op: str, weight: Tensor, groups: int) -> None:
    checks.check_dim(op, "weight", weight, 4)
    n = weight.size(0)
    if groups < 1 or n % groups:
        message = f"groups must be positive and divide the output channels {n}, got {groups}"
        checks.fail(op, message)
    if 0 in weight.shape:
        sizes = list(weight.shape)
        checks.fail(op, f"weight must have no dimension of size zero, got {sizes}")


def conv_shape(
    op: str,
    sizes: Sequence[int],
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvShape:
    """Of an input of ``sizes``; checks the geometry."""
    lengths = map(tuple, (sizes, kernel, stride, padding, dilation))
    return _conv_shape(op, out_channels, groups, *lengths)


@functools.lru_cache(maxsize=1024)
def _conv_shape(
    op: str,
    out_channels: int,
    groups: int,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> ConvShape:
    checks.check_pair(op, "stride", stride, 1)
    checks.check_pair(op, "padding", padding, 0)
    checks.check_pair(op, "dilation", dilation, 1)
    out = []
    for n, k, s, p, d in zip(sizes[2:], kernel, stride, padding, dilation, strict=True):
        reach = n + 2 * p - d * (k - 1) - 1
        if reach < 0:
            checks.fail(
                op,
                f"kernel {list(kernel)} with dilation {list(dilation)} is larger than the padded "
                f"input {list(sizes)}",
            )
        out.append(reach // s + 1)
    size, out_size = (sizes[2], sizes[3]), (out[0], out[1])
    k, s, p, d = ((pair[0], pair[1]) for pair in (kernel, stride, padding, dilation))
    return ConvShape(sizes[0], sizes[1], out_channels, groups, size, out_size, k, s, p, d)


def index_type(rows: int, block: int) -> tl.dtype:
    """What counts ``rows`` by blocks without overflow; 64 bits cost time in divisions."""
    return tl.int32 if rows + block < 2**31 else tl.int64


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: by TF32 where torch's convolutions may use it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def channels_last(t: Tensor) -> Tensor:
    """``t``, dense, in channels_last; itself if it is, whatever the strides of lengths of one."""
    return t.contiguous(memory_format=torch.channels_last)


def for_writing(result: Tensor) -> Tensor:
    """``result`` if it is dense in channels_last, else something alike that is."""
    if result.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)
