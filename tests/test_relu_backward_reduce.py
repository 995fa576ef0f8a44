"""relu_backward_reduce: what relu lets through of a gradient, and its sum by channels."""

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    SPLIT_SHAPES,
    TILE,
    Source,
    around,
    assert_identical,
    at_threads,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    over_raw,
    placed,
    shadow,
    torch_batch_norm,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.relu_backward_reduce.default

SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(8, 16, 64)),
    *((1, 5, 1, n) for n in around(TILE["kRowsAtOnce"][0])),
    (2, 2, 1, TILE["kBlockPixels"][0] + 1),
    (2, 17, 1, TILE["kMostBlockRows"][0] + 1),
    *SPLIT_SHAPES,
    (2, 9, 1, 1),
    (3, 1, 4, 5),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
]


def inputs(seed, shape, dtype):
    source = Source(seed, dtype)
    return {"grad": source.normal(*shape), "out": source.normal(*shape).relu()}


def ours(grad, out):
    return engines.implementation("relu_backward_reduce", engines.wish())(grad, out)


def eager(grad, out):
    g = torch.ops.aten.threshold_backward(grad, out, 0)
    channels = grad.size(1)
    zeros, ones = torch.zeros(channels).to(grad), torch.ones(channels).to(grad)
    like = torch_batch_norm(grad, zeros, ones, ones, zeros)  # in the layout torch would give
    return like.copy_(g), g.sum((0, 2, 3), dtype=torch.float32 if g.dtype in HALF else None)


@over_backends("relu_backward_reduce", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    verify(backend, ours, eager, lambda s: of_tensors(LAYOUTS[layout], inputs(s, shape, dtype)))


@over_backends("relu_backward_reduce")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["grad", "out"])
def test_layouts(which, layout, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 17, 5, 6), dtype)
        return {**made, which: LAYOUTS[layout](made[which])}

    verify(backend, ours, eager, laid_out)


@over_backends("relu_backward_reduce")
@over_dtypes
@over_layouts
def test_selects(layout, dtype, backend):
    def spoilt(seed):
        made = inputs(seed, (2, 20, 3, 4), dtype)
        for c, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            made["out"][0, c, 1, 1], made["grad"][0, c, 1, 1] = 0, value
            made["out"][0, 4 + c, 1, 1], made["grad"][0, 4 + c, 1, 1] = 1, value
        made["out"][1, 9, 2, 2] = torch.nan
        return of_tensors(LAYOUTS[layout], made)

    verify(backend, ours, eager, spoilt)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad", torch.ones(2, 5, 3), "grad must have 4 dimensions"),
        ("out", torch.ones(2, 5, 3, 3), "out must have shape"),
        ("out", torch.ones(2, 5, 3, 4).half(), "out must be float32 as grad is, got float16"),
    ],
)
@over_raw("relu_backward_reduce")
def test_bad_input(raw, name, value, words):
    given = {**inputs(0, (2, 5, 3, 4), torch.float32), name: value}
    with pytest.raises(RuntimeError, match=f"relu_backward_reduce: {words}"):
        raw(*given.values())


@over_layouts
def test_opcheck(layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32))
    torch.library.opcheck(OP, tuple(made.values()))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layouts, seed):
    made = inputs(seed, shape, dtype)
    args = [LAYOUTS[name](t) for name, t in zip(layouts, made.values(), strict=True)]
    g, total = result = OP(*args)
    assert_identical(at_threads(1, OP, *args), result, "one thread and two")
    exact = torch.ops.aten.threshold_backward(*args, 0)
    assert torch.equal(g, exact)
    exact = exact.double()
    steps = 9 + exact[:, 0].numel()
    within_rounding(total, exact.sum((0, 2, 3)), exact.abs().sum((0, 2, 3)), steps)
    for output, fake in zip(result, OP(*shadow(args)), strict=True):
        assert placed(output) == placed(fake)
