"""The gradients of eltwise_act's inputs."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .checks import check_act, check_dtype, check_like, check_sizes, fail, laid_out_as
from .eltwise_act import check_combination
from .launch import cdiv, launch


@triton.jit
def eltwise_act_backward_kernel(
    grad,
    out,
    inputs,
    grads,
    coeff,
    numel,
    OP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    g = tiles.load(grad, at, mask)
    if out is not None:
        g = tiles.relu_backward(tiles.load(out, at, mask), g)
    if OP == "sum":
        for k in tl.static_range(len(grads)):
            d = g
            if coeff is not None:
                d = g * tiles.double(coeff[k]).to(g.dtype)
            tiles.store(grads[k], at, d, mask)
    elif OP == "prod":
        # Multiplied out: dividing the product by an input would fail at zero.
        for k in tl.static_range(len(grads)):
            d = g
            for j in tl.static_range(len(grads)):
                if j != k:
                    d *= tiles.load(inputs[j], at, mask)
            tiles.store(grads[k], at, d, mask)
    else:
        # From the last maximum of two back to the first; a NaN is neither less nor greater.
        for back in tl.static_range(len(grads) - 1):
            first = tiles.load(inputs[0], at, mask)
            for j in tl.static_range(1, len(grads) - 1 - back):
                first = tiles.maximum(first, tiles.load(inputs[j], at, mask))
            second = tiles.load(inputs[len(grads) - 1 - back], at, mask)
            share = tl.where(first == second, g * 0.5, g)
            tiles.store(
                grads[len(grads) - 1 - back], at, tl.where(first > second, 0.0, share), mask
            )
            g = tl.where(first < second, 0.0, share)
        tiles.store(grads[0], at, g, mask)


def eltwise_act_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    out: Tensor | None,
    op: str,
    coeff: Sequence[float] | None,
    act: str,
) -> list[Tensor]:
    name = "eltwise_act_backward"
    check_dtype(name, "grad", grad)
    check_act(name, act)
    coefficients = check_combination(name, len(inputs), op, coeff)
    if out is None and act == "relu":
        fail(name, 'out must be given with act "relu", got none')
    for t in inputs:
        check_like(name, "every input", t, grad, "grad")
        check_sizes(name, "every input", t, grad.shape)
    if out is not None:
        check_like(name, "out", out, grad, "grad")
        check_sizes(name, "out", out, grad.shape)
    # All in the layout the forward's output has.
    grads = [torch.empty_like(inputs[0]) for _ in inputs]
    layout = grads[0]
    config = tiles.config_for(layout, layout.numel())
    launch(
        eltwise_act_backward_kernel,
        (cdiv(layout.numel(), config.elements),),
        reads=[
            laid_out_as(grad, layout),
            laid_out_as(out, layout) if out is not None and act == "relu" else None,
            None if op == "sum" else tuple(laid_out_as(t, layout) for t in inputs),
        ],
        writes=[tuple(grads)],
        numbers=[coefficients, layout.numel()],
        OP=op,
        BLOCK=config.elements,
        num_warps=config.num_warps,
    )
    return grads
