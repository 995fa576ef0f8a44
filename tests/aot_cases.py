"""What tests/aot.py compiles: each op called on meta tensors, in every form that makes another
kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = (torch.channels_last, torch.contiguous_format)


class Case(NamedTuple):
    op: str
    args: tuple[Any, ...]
    wide: bool = False  # every access of global memory is of 16 bytes


def image(*shape: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def vector(n: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.empty(n, dtype=wide, device="meta")


CASES: list[Case] = []


def add(op: str, *args: Any, wide: bool = False) -> None:
    CASES.append(Case(op, args, wide))


def add_maps_and_sums(x: Tensor, pooled: Tensor, pool: tuple[list[int], ...], wide: bool) -> None:
    """The ops of an image tensor and vectors of one number per channel."""
    c = vector(x.size(1), x.dtype)
    add("bn_act", x, c, c, x, "relu", wide=wide)
    add("bn_act_", x, c, c, None, "none", wide=wide)
    add("bn_stats", x, wide=wide)
    batch = (c, c, c, c, 100352.0)
    for mask, act in ((x, "relu"), (None, "relu"), (None, "none")):
        add("bn_act_backward_reduce", x, x, mask, c, c, c, c, act, wide=wide)
        add("bn_act_backward", x, x, mask, c, c, *batch, act, wide=wide)
    add("bn_act_backward_", x, None, x, c, c, *[None] * 4, 0.0, "relu", wide=wide)
    add("relu_backward_reduce", x, x, wide=wide)
    add("global_avg_pool", x)
    argmax = torch.empty_like(pooled, dtype=torch.uint8)
    for op in ("bn_act_maxpool", "bn_act_maxpool_train"):
        add(op, x, c, c, *pool, False, "relu")
    add("bn_act_maxpool_backward_reduce", pooled, pooled, argmax, x, c, c, *pool, "relu")
    add("bn_act_maxpool_backward", pooled, pooled, argmax, x, c, *batch, *pool, "relu")


# Channels in and out, pixels along a side, kernel, stride, groups: ResNets', and what divides by 8.
CONVOLUTIONS = (
    (128, 128, 28, 3, 1, 1),
    (64, 256, 56, 1, 1, 1),
    (128, 128, 56, 3, 1, 32),
    (64, 64, 56, 3, 1, 1),
    (256, 512, 56, 1, 2, 1),
    (128, 128, 28, 3, 2, 1),
    (3, 64, 224, 7, 2, 1),
    (256, 256, 28, 3, 1, 32),
    (24, 40, 14, 3, 1, 1),
)
WIDE = (128, 512, 28, 1, 1, 1)  # large tiles in a weight's gradient as well


def add_convolution(
    dtype: torch.dtype,
    c: int,
    k: int,
    side: int,
    kernel: int,
    stride: int,
    groups: int,
    batch: int = 32,
) -> None:
    out = (side - 1) // stride + 1
    x, y = (
        image(batch, n, s, s, dtype=dtype, layout=torch.channels_last)
        for n, s in ((c, side), (k, out))
    )
    weight = image(k, c // groups, kernel, kernel, dtype=dtype, layout=torch.channels_last)
    padding = [kernel // 2] * 2
    geometry = ([stride, stride], padding, [1, 1], groups)
    into, of = vector(c, dtype), vector(k, dtype)
    # Vectors of one number per channel are read by less than 16 bytes.
    add("conv_bn_act", x, weight, of, of, y, *geometry, "relu")
    wide = (c // groups) % 8 == 0 and (k // groups) % 8 == 0 and dtype.itemsize == 2
    add("conv_bn_act", x, weight, None, None, None, *geometry, "none", wide=wide)
    add("conv_dgrad", y, weight, None, [side, side], *geometry, wide=wide)
    add("conv_dgrad_", y, weight, x, [side, side], *geometry, wide=wide)
    add("conv_wgrad", y, x, into, into, "relu", [kernel] * 2, *geometry)
    add("conv_wgrad", y, x, None, None, "none", [kernel] * 2, *geometry, wide=wide)


def add_chain(
    dtype: torch.dtype,
    c: int,
    k: int,
    side: int,
    kernel: int,
    stride: int,
    groups: int,
    batch: int = 32,
) -> None:
    x, y = (image(batch, n, side, side, dtype=dtype, layout=torch.channels_last) for n in (c, k))
    weight = image(k, c // groups, kernel, kernel, dtype=dtype, layout=torch.channels_last)
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], groups)
    into, of = vector(c, dtype), vector(k, dtype)
    prologue, gradient = (into, into, "relu"), (y, y, of, of, of)
    add("bn_act_conv_stats", x, *prologue, weight, *geometry)
    add("bn_act_conv_bn_act", x, *prologue, weight, of, of, y, *geometry, "relu")
    for step in (1, 2):
        x2 = image(batch, 2 * c, step * side, step * side, dtype=dtype, layout=torch.channels_last)
        weight2 = image(k, 2 * c, 1, 1, dtype=dtype, layout=torch.channels_last)
        second = (x2, weight2, of, [step, step])
        add("bn_act_conv_bn_act", x, *prologue, weight, of, of, None, *geometry, "relu", *second)
    mask = (x, into, into, into, into)
    add("bn_backward_conv_dgrad", *gradient, weight, x, *mask, [side, side], *geometry)
    half = -(-side // 2)
    part = image(batch, c, half, half, dtype=dtype, layout=torch.channels_last)
    nothing = [None] * 5
    add("bn_backward_conv_dgrad", *gradient, weight, part, *nothing, [side, side], *geometry, 2)
    source = (x, into, into, into, "relu")
    add("bn_backward_conv_wgrad", *gradient, *source, [kernel] * 2, *geometry)
    if kernel == 1:
        add("relu_backward_conv_wgrad", y, y, *source)
        matrix = torch.empty(c, c, dtype=dtype, device="meta")
        rest = (into, "relu", matrix, into, None, into, into)
        add("bn_act_gram_backward", y, weight, x, into, into, *rest)
        wide = image(batch, c, 2 * side, 2 * side, dtype=dtype, layout=torch.channels_last)
        rest = (into, "none", matrix, into, None, None, None, 2)
        add("bn_act_gram_backward", y, weight, wide, None, None, *rest)


def add_stem(
    dtype: torch.dtype, x: tuple[int, ...], k: int, kernel: int, stride: int, size: int, step: int
) -> None:
    image_of = image(*x, dtype=dtype, layout=torch.channels_last)
    weight = image(k, x[1], kernel, kernel, dtype=dtype, layout=torch.channels_last)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1])
    pool = ([size] * 2, [step] * 2, [size // 2] * 2, [1, 1])
    of = vector(k, dtype)
    add("conv_bn_act_maxpool", image_of, weight, of, of, *geometry, *pool, False, "relu")


def add_end(dtype: torch.dtype, c: int, k: int, side: int, kernel: int, batch: int = 32) -> None:
    x, y = (image(batch, n, side, side, dtype=dtype, layout=torch.channels_last) for n in (c, k))
    weight = image(k, c, kernel, kernel, dtype=dtype, layout=torch.channels_last)
    of, geometry = vector(k, dtype), ([1, 1], [kernel // 2] * 2, [1, 1], 1)
    add("conv_bn_act_avgpool", x, weight, of, of, y, *geometry, "relu")


def add_type(
    dtype: torch.dtype,
    convolutions: Sequence[tuple[int, ...]],
    chains: Sequence[tuple[int, ...]],
) -> None:
    """Every op, on tensors of a type."""
    for layout in LAYOUTS:
        last = layout == torch.channels_last
        x, pooled = (image(32, 64, side, side, dtype=dtype, layout=layout) for side in (56, 28))
        add_maps_and_sums(x, pooled, ([3, 3], [2, 2], [1, 1], [1, 1]), last)
        # Channels that divide by 8 and not by 16, pixels that divide by nothing.
        ragged = image(3, 24, 7, 7, dtype=dtype, layout=layout)
        add("bn_act", ragged, *[vector(24, dtype)] * 2, None, "relu", wide=last)
    x = image(32, 64, 56, 56, dtype=dtype, layout=torch.channels_last)
    for op, coeff in (("sum", None), ("sum", [1.0, 0.5]), ("prod", None), ("max", None)):
        add("eltwise_act", [x, x], op, coeff, "relu", wide=True)
    stored = torch.empty(64, dtype=dtype, device="meta")
    add("bn_scale_shift", *[stored] * 4, 1e-5)
    add("bn_scale_shift", stored, stored, None, None, 1e-5)
    many = [x] * 3
    for op, coeff in (("sum", [1.0, 0.5, 2.0]), ("prod", None), ("max", None)):
        add("eltwise_act_backward", x, many, x, op, coeff, "relu", wide=True)
    c = vector(64, dtype)
    add("bn_finalize", c, c, 100.0, stored.to(c.dtype), c, stored, stored, 0.1, 1e-5)
    add("bn_finalize", c, c, 100.0, None, None, None, None, 0.1, 1e-5)
    weight = torch.empty(c.numel(), c.numel(), dtype=dtype, device="meta")
    gram = torch.empty(c.numel(), c.numel(), dtype=torch.float64, device="meta")
    add("gram_moments", gram, gram[0], c, 100.0)
    product = gram.to(c.dtype)
    add("gram_stats", weight, product, gram[0], c, 100.0)
    add("gram_gradients", weight, product, c, c, c, c, None, 100.0)
    add("gram_gradients", weight, product, c, c, c, c, c, 100.0)
    add_end(dtype, 512, 2048, 7, 1)
    add_end(dtype, 512, 512, 7, 3)
    add_stem(dtype, (32, 3, 224, 224), 64, 7, 2, 3, 2)
    for convolution in convolutions:
        add_convolution(dtype, *convolution)
    for convolution in chains:
        add_chain(dtype, *convolution)
    x = image(32, 64, 56, 56, dtype=dtype, layout=torch.channels_last)
    centre = vector(64, dtype)
    add("bn_act_gram", x, centre, centre, centre, "relu", 1)
    ragged = image(32, 24, 56, 56, dtype=dtype, layout=torch.channels_last)
    centre = vector(24, dtype)
    add("bn_act_gram", ragged, None, None, centre, "none", 2)


add_type(torch.bfloat16, CONVOLUTIONS, (*CONVOLUTIONS[:3], WIDE))
add_type(torch.float32, CONVOLUTIONS[:3], CONVOLUTIONS[:3])

# Lengths of one, which Triton compiles as constants: of batches, images, channels, groups, ranges.
dtype = torch.bfloat16
for layout in LAYOUTS:
    for sizes in ((1, 64, 7, 7), (1, 64, 1, 1), (1, 1, 1, 1)):
        x = image(*sizes, dtype=dtype, layout=layout)
        add_maps_and_sums(x, x, ([3, 3], [1, 1], [1, 1], [1, 1]), False)
        add("bn_act_gram", x, None, None, vector(sizes[1], dtype), "none", 1)
        add("bn_act_gram", x, None, None, vector(sizes[1], dtype), "none", 2)
x, one = torch.empty(1, dtype=dtype, device="meta"), vector(1, dtype)
for coeff in (None, [5e-324]):  # whose bits are a one
    add("eltwise_act", [x], "sum", coeff, "none")
    add("eltwise_act_backward", x, [x], None, "sum", coeff, "none")
add_stem(dtype, (1, 1, 1, 1), 1, 1, 1, 1, 1)
add_end(dtype, 1, 1, 1, 1, batch=1)
add("bn_finalize", one, one, 5e-324, *[one] * 4, 5e-324, 5e-324)
add("bn_scale_shift", one, one, one, one, 5e-324)
for convolution in (
    (64, 64, 7, 3, 1, 1),
    (64, 64, 1, 1, 1, 1),
    (64, 64, 1, 3, 1, 4),
    (64, 64, 8, 3, 2, 1),
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 3, 2, 2),
):
    add_convolution(dtype, *convolution, batch=1)
    if convolution[4] == 1:
        add_chain(dtype, *convolution, batch=1)

#: What ``make test`` compiles; the rest differs from it by the name of a type.
USUAL = tuple(CASES)
for dtype in (torch.float16, torch.float64):
    add_type(dtype, CONVOLUTIONS[:3], CONVOLUTIONS[1:2])
for convolution in CONVOLUTIONS[3:]:
    add_convolution(torch.float32, *convolution)
