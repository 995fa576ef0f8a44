"""Kernels with each of the faults that tests/aot.py looks for."""

import torch
import triton
import triton.language as tl
from fused_resnet.triton_kernels.launch import Launch, launch, recording


@triton.jit
def loses_nan(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.maximum(tl.load(x + at), 0.0))


@triton.jit
def moves_little(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * 2))


@triton.jit
def spills(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    first = tl.load(x + at)
    total = tl.sum(first, 0)
    second = tl.load(x + BLOCK + at)
    total += tl.sum(second * total, 0)
    tl.store(out + at, first * total + second)


@triton.jit
def multiplies_by_one_warp(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    at = at[:, None] * BLOCK + at[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tl.dot(tile, tile))


@triton.jit
def takes_no_one(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at * n.to(tl.int64), tl.load(x + at))


def planted() -> list[Launch]:
    x, half = (torch.empty(1 << 16, dtype=d, device="meta") for d in (torch.float32, torch.float16))
    with recording() as launches:
        launch(loses_nan, (1,), [x], [x], BLOCK=1024, num_warps=4)
        launch(moves_little, (1,), [x], [x], BLOCK=1024, num_warps=4)
        launch(spills, (1,), [x], [x], BLOCK=16384, num_warps=2)
        launch(multiplies_by_one_warp, (1,), [half], [x], BLOCK=64, num_warps=1)
        launch(takes_no_one, (1,), [x], [x], [1], BLOCK=1024, num_warps=4)
    return launches
