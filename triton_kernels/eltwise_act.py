"""``act(op(coeff_i * input_i))`` over tensors of one layout."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .checks import check_act, check_dtype, check_like, check_sizes, fail, laid_out_as
from .launch import bits, cdiv, launch


@triton.jit
def eltwise_act_kernel(
    inputs, out, coeff, numel, OP: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    result = tiles.load(inputs[0], at, mask)
    if coeff is not None:
        result *= tiles.double(coeff[0]).to(result.dtype)
    for i in tl.static_range(1, len(inputs)):
        term = tiles.load(inputs[i], at, mask)
        if coeff is not None:
            term *= tiles.double(coeff[i]).to(result.dtype)
        if OP == "sum":
            result += term
        elif OP == "prod":
            result *= term
        else:
            result = tiles.maximum(result, term)
    tiles.store(out, at, tiles.activate(result, RELU), mask)


def check_combination(
    name: str, count: int, op: str, coeff: Sequence[float] | None
) -> tuple[int, ...] | None:
    """The coefficients, as kernels take them."""
    if count == 0:
        fail(name, "inputs must hold at least one tensor, got none")
    if op not in ("sum", "prod", "max"):
        fail(name, f'op must be "sum", "prod" or "max", got "{op}"')
    if coeff is None:
        return None
    if op != "sum":
        fail(name, f'coeff is for op "sum" only, got op "{op}"')
    if len(coeff) != count:
        fail(name, f"coeff must hold {count} numbers, one per input, got {len(coeff)}")
    return tuple(map(bits, coeff))


def eltwise_act(
    inputs: Sequence[Tensor], op: str, coeff: Sequence[float] | None, act: str
) -> Tensor:
    name = "eltwise_act"
    coefficients = check_combination(name, len(inputs), op, coeff)
    first = inputs[0]
    check_dtype(name, "inputs[0]", first)
    check_act(name, act)
    for t in inputs:
        check_like(name, "every input", t, first)
        check_sizes(name, "every input", t, first.shape)
    # The first input's layout, made dense; the others are copied where theirs differs.
    out = torch.empty_like(first)
    config = tiles.config_for(out, out.numel())
    launch(
        eltwise_act_kernel,
        (cdiv(out.numel(), config.elements),),
        reads=[tuple(laid_out_as(t, out) for t in inputs)],
        writes=[out],
        numbers=[coefficients, out.numel()],
        OP=op,
        RELU=act == "relu",
        BLOCK=config.elements,
        num_warps=config.num_warps,
    )
    return out
