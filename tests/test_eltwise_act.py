"""eltwise_act: ``act(op(coeff_i * input_i))``, and add_act, its sum of two."""

import functools
import itertools

import pytest
import torch
from cases import (
    CUDA_TILE,
    DTYPES,
    LAYOUTS,
    TILE,
    Source,
    around,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    placed,
    shadow,
    torch_act,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import functional

OP = torch.ops.fused_resnet.eltwise_act.default
COMBINE = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum}
COEFF = (1.0, -0.5, 3.0, 0.1)
over_ops = pytest.mark.parametrize("op", COMBINE)

_GRAIN = TILE["kGrain"][0]
#: Elements of float32 that a block of the CUDA kernel takes at once; of a half type, twice that.
_BLOCK = CUDA_TILE["kThreads"][0] * CUDA_TILE["kThreadBytes"][0] // 4
SHAPES = [
    (),
    *((n,) for n in around(8, 16)),
    *((n,) for n in around(_BLOCK)),
    (2 * 2 * CUDA_TILE["kMaxBlocksPerMultiprocessor"][0] * _BLOCK + 5,),  # blocks go round
    (_GRAIN - 1,),
    (2 * _GRAIN + 1,),
    (3, 5),
    (2, 3, 4),
    (2, 5, 3, 4),
    (2, 3, 2, 5, 2),
    (0,),
    (2, 0, 3, 4),
]


def inputs(seed, shapes, dtype):
    source = Source(seed, dtype)
    return {"tensors": [source.normal(*shape) for shape in shapes]}


def ours(op, coeff, act, tensors):
    return functional.eltwise_act(tensors, op, coeff, act)


def eager(op, coeff, act, tensors):
    if coeff is None:  # a single tensor is computed with too, not handed through
        terms = tensors if len(tensors) > 1 else [1 * tensors[0]]
    else:
        terms = [t * c for t, c in zip(tensors, coeff, strict=True)]
    return torch_act(functools.reduce(COMBINE[op], terms), act)


def check(backend, make, op="sum", coeff=None, act="relu"):
    settings = (op, coeff, act)
    verify(backend, lambda **t: ours(*settings, **t), lambda **t: eager(*settings, **t), make)


@over_backends("eltwise_act", isa=True)
@over_dtypes
@over_ops
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, op, dtype, backend):
    check(backend, lambda seed: inputs(seed, [shape] * 2, dtype), op)


@over_backends("eltwise_act")
@over_dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(("op", "coeff"), [*zip(COMBINE, [None] * 3, strict=True), ("sum", COEFF)])
def test_counts(op, coeff, act, count, dtype, backend):
    chosen = coeff if coeff is None else coeff[:count]
    check(backend, lambda seed: inputs(seed, [(2, 5, 3, 4)] * count, dtype), op, chosen, act)


@over_backends("eltwise_act")
@over_dtypes
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="+".join)
def test_layouts(layouts, dtype, backend):
    def laid_out(seed):
        tensors = inputs(seed, [(2, 5, 3, 4)] * 2, dtype)["tensors"]
        return {"tensors": [LAYOUTS[n](t) for n, t in zip(layouts, tensors, strict=True)]}

    check(backend, laid_out)


@over_backends("eltwise_act")
@over_layouts
@over_ops
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 5, 3, 4), (5, 1, 1)],
        [(5, 1, 1), (2, 5, 3, 4)],
        [(2, 5, 3, 4), ()],
        [(), (2, 5, 3, 4)],
        [(2, 1, 3, 4), (1, 5, 3, 4), (2, 5, 1, 1)],
        [(2, 5, 3, 4), (2, 1, 1, 1)],
        [(1, 4), (3, 1)],
    ],
    ids=str,
)
def test_shapes_broadcast(shapes, op, layout, backend):
    def laid_out(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, shapes, torch.float32))

    check(backend, laid_out, op)


@over_backends("eltwise_act")
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_dtypes_promote(dtypes, backend):
    def mixed(seed):
        tensors = inputs(seed, [(2, 5, 3, 4)] * 2, torch.float64)["tensors"]
        return {"tensors": [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]}

    check(backend, mixed)


@over_backends("eltwise_act")
@over_dtypes
def test_add_act(dtype, backend):
    verify(
        backend,
        lambda tensors: functional.add_act(*tensors),
        lambda tensors: torch.relu(tensors[0] + tensors[1]),
        lambda seed: inputs(seed, [(2, 5, 3, 4)] * 2, dtype),
    )


@over_layouts
@over_ops
def test_opcheck(op, layout):
    tensors = of_tensors(LAYOUTS[layout], inputs(0, [(2, 5, 3, 4)] * 3, torch.float32))["tensors"]
    torch.library.opcheck(OP, (tensors, op, None, "relu"))
    torch.library.opcheck(OP, (tensors[:2], "sum", [0.5, 2.0], "none"))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4),
    op=st.sampled_from(sorted(COMBINE)),
    coeff=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, layouts, op, coeff, dtype, act, seed):
    tensors = inputs(seed, [shape] * len(layouts), dtype)["tensors"]
    if shape:
        tensors = [LAYOUTS[name](t) for name, t in zip(layouts, tensors, strict=True)]
    chosen = list(COEFF[: len(tensors)]) if coeff and op == "sum" else None
    result = OP(tensors, op, chosen, act)
    exact = of_tensors(torch.Tensor.double, tensors)
    positive = None if chosen is None else [abs(c) for c in chosen]
    magnitude = eager(op, positive, "none", of_tensors(torch.abs, exact))
    # Every input may be multiplied by its coefficient, itself rounded, and then combined.
    within_rounding(result, eager(op, chosen, act, exact), magnitude, 2 + len(tensors))
    fake = OP(shadow(tensors), op, chosen, act)
    assert placed(fake) == placed(result)
    assert placed(result) == placed(eager(op, chosen, act, tensors))
