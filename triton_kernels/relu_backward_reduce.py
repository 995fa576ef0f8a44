"""What relu lets through of grad, and its sum by channels."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image, memory_format

from . import reductions, tiles
from .checks import check_dim, check_dtype, check_like, check_sizes
from .launch import launch


@triton.jit
def relu_backward_reduce_kernel(
    grad,
    out,
    g,
    sums,
    images,
    channels,
    inner,
    tiles_a_run,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channels, inner = tiles.aligned(channels, inner, LAST, ALIGN)
    positions = tl.cast(images, tl.int64) * inner
    run, channel = reductions.run_of(channels, BC)
    begin = run.to(tl.int64) * tiles_a_run * BP
    total = tl.zeros([BP, BC], tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32)
    for i in range(tiles_a_run):
        position = begin + i * BP + tl.arange(0, BP)
        at = tiles.offsets(position, channel, channels, inner, LAST)
        mask = tiles.inside(position, channel, positions, channels)
        passed = tiles.relu_backward(tiles.load(out, at, mask), tiles.load(grad, at, mask))
        tiles.store(g, at, passed, mask)
        total += passed
    reductions.put(sums, run, channel, channels, reductions.total(total))


def relu_backward_reduce(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    op = "relu_backward_reduce"
    check_dim(op, "grad", grad, 4)
    check_dtype(op, "grad", grad)
    check_like(op, "out", out, grad, "grad")
    check_sizes(op, "out", out, grad.shape)
    layout = memory_format(grad)
    g = empty_image(grad, grad.shape, grad)
    plan = reductions.plan(g)
    partials = plan.partials(grad, 1)
    launch(
        relu_backward_reduce_kernel,
        plan.grid,
        reads=[grad.contiguous(memory_format=layout), out.contiguous(memory_format=layout)],
        writes=[g, *partials],
        numbers=plan.numbers,
        **plan.meta,
    )
    sum_g = grad.new_empty(grad.size(1), dtype=accumulation_dtype(grad.dtype))
    reductions.finish(partials, [sum_g])
    return g, sum_g
