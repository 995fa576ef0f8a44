"""eltwise_act_backward: the gradients of eltwise_act's inputs."""

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
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
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eltwise_act import COEFF, COMBINE
from test_eltwise_act import eager as forward
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.eltwise_act_backward.default
over_ops = pytest.mark.parametrize("op", COMBINE)
SHAPES = [
    (),
    *((n,) for n in around(8, 16)),
    (TILE["kMapGrain"][0] + 1,),
    (3, 5),
    (2, 5, 3, 4),
    (0,),
    (2, 0, 3, 4),
]


def inputs(seed, shape, dtype, count=2, op="sum", act="relu"):
    source = Source(seed, dtype)
    # Small integers, so that there are ties and zeros.
    tensors = [(2 * source.normal(*shape)).round() for _ in range(count)]
    out = torch.ops.fused_resnet.eltwise_act(tensors, op, None, act)
    return {"grad": source.normal(*shape), "inputs": tensors, "out": out}


def ours(op, coeff, act, grad, inputs, out):
    implementation = engines.implementation("eltwise_act_backward", engines.wish())
    return implementation(grad, inputs, out, op, coeff, act)


def eager(op, coeff, act, grad, inputs, out):
    """autograd's, in the accumulation dtype, of the same mask."""
    if act == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    work = torch.float32 if grad.dtype in HALF else grad.dtype
    leaves = [t.detach().to(work).requires_grad_() for t in inputs]
    y = forward(op, coeff, "none", leaves)
    grads = torch.autograd.grad(y, leaves, grad.to(work))
    like = torch.empty_like(inputs[0])
    return [torch.empty_like(like).copy_(g) for g in grads]


def check(backend, make, op="sum", coeff=None, act="relu"):
    given = (op, coeff, act)
    sides = (lambda **t: ours(*given, **t)), (lambda **t: eager(*given, **t))
    verify(backend, *sides, make, imagined=False)


@over_backends("eltwise_act_backward", isa=True)
@over_dtypes
@over_ops
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, op, dtype, backend):
    check(backend, lambda seed: inputs(seed, shape, dtype, op=op), op)


@over_backends("eltwise_act_backward")
@over_dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(("op", "coeff"), [*zip(COMBINE, [None] * 3, strict=True), ("sum", COEFF)])
def test_counts(op, coeff, act, count, dtype, backend):
    chosen = coeff if coeff is None else coeff[:count]
    check(backend, lambda s: inputs(s, (2, 5, 3, 4), dtype, count, op, act), op, chosen, act)


@over_backends("eltwise_act_backward")
@over_dtypes
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="+".join)
def test_layouts(layouts, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 5, 3, 4), dtype, op="max")
        made["inputs"] = [LAYOUTS[n](t) for n, t in zip(layouts, made["inputs"], strict=True)]
        made["grad"] = LAYOUTS[layouts[1]](made["grad"])
        return made

    check(backend, laid_out, "max")


@over_backends("eltwise_act_backward")
@over_ops
def test_selects(op, backend):
    """NaN and infinities where relu is flat, in the inputs and in the gradient."""

    def spoilt(seed):
        made = inputs(seed, (2, 20, 3, 4), torch.float32, 3, op)
        for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            made["grad"][0, i], made["out"][0, i, 1:] = value, 0
            made["inputs"][0][1, i] = made["inputs"][i][1, 4 + i] = value
            made["inputs"][1][1, 8 + i] = made["inputs"][2][1, 8 + i] = value
        return made

    check(backend, spoilt, op)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("inputs", [], "inputs must hold at least one tensor"),
        ("inputs", [torch.ones(3), torch.ones(4)], "every input must have shape"),
        ("inputs", [torch.ones(3).half()], "every input must be float32 as grad is"),
        ("grad", torch.ones(3, dtype=torch.int32), "grad must be float32"),
        ("out", None, "out must be given"),
        ("out", torch.ones(4), "out must have shape"),
        ("op", "mean", "op must be"),
        ("coeff", [1.0], "coeff must hold 2 numbers"),
        ("act", "gelu", "act must be"),
    ],
)
@over_raw("eltwise_act_backward")
def test_bad_input(raw, name, value, words):
    given = inputs(0, (3,), torch.float32) | {"op": "sum", "coeff": None, "act": "relu"}
    with pytest.raises(RuntimeError, match=f"eltwise_act_backward: {words}"):
        raw(*(given | {name: value}).values())


@over_layouts
@over_ops
def test_opcheck(op, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, 3, op))
    torch.library.opcheck(OP, (*made.values(), op, None, "relu"))
    torch.library.opcheck(OP, (made["grad"], made["inputs"], None, op, None, "none"))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(0, 20), max_size=4),
    count=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    op=st.sampled_from(sorted(COMBINE)),
    coeff=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, count, dtype, layouts, op, coeff, act, seed):
    made = inputs(seed, shape, dtype, count, op, act)
    if shape and shape[0] > 0:
        made["inputs"] = [LAYOUTS[n](t) for n, t in zip(layouts, made["inputs"], strict=False)]
    chosen = list(COEFF[:count]) if coeff and op == "sum" else None
    args = (*made.values(), op, chosen, act)
    result = OP(*args)
    assert_identical(at_threads(1, OP, *args), result, "one thread and two")
    exact = eager(op, chosen, act, **of_tensors(torch.Tensor.double, made))
    positive = None if chosen is None else [abs(c) for c in chosen]
    for got, truth in zip(result, exact, strict=True):
        magnitude = truth.abs() if positive is None else truth.abs() + 1
        within_rounding(got, truth, magnitude, 1 + count)
    for output, fake in zip(result, OP(*shadow(args)), strict=True):
        assert placed(output) == placed(fake)
