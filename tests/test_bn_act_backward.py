"""bn_act_backward: ``a * g + b * x + c``, g being what relu let through, and its in-place form."""

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    TILE,
    around,
    assert_identical,
    at_threads,
    bits,
    copied,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    per_channel,
    placed,
    shadow,
    torch_batch_norm,
    verify,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bn_act_backward_reduce import MASKS, masked
from test_bn_act_backward_reduce import inputs as reduced
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_backward.default
IN_PLACE = torch.ops.fused_resnet.bn_act_backward_.default

_GRAIN = TILE["kMapGrain"][0]
SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(8, 16)),
    (2, 2, 1, _GRAIN + 1),
    (2, _GRAIN // 8 + 1, 3, 3),
    (2, 9, 1, 1),
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
]


def inputs(seed, shape, dtype, mask="out", with_x=True):
    made = reduced(seed, shape, dtype, mask)
    act, mean, invstd = made.pop("act"), made.pop("mean"), made.pop("invstd")
    made["x"] = made["x"] if with_x else None
    return {**made, "a": made["scale"], "b": mean, "c": invstd, "act": act}


def ours(**given):
    return engines.implementation("bn_act_backward", engines.wish())(**given)


def eager(grad, x, out, scale, shift, a, b, c, act):
    g = masked(grad, x, out, scale, shift, act)
    wide = g.float() if g.dtype in HALF else g
    dx = wide * per_channel(a) + per_channel(c)
    if x is not None:
        dx = dx + x * per_channel(b)
    # In the layout torch's BatchNorm gives its input's gradient.
    zeros, ones = torch.zeros(grad.size(1)).to(b), torch.ones(grad.size(1)).to(b)
    like = torch_batch_norm(grad if x is None else x, zeros, ones, ones, zeros)
    return like.copy_(dx)


@over_backends("bn_act_backward", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    verify(backend, ours, eager, lambda s: of_tensors(LAYOUTS[layout], inputs(s, shape, dtype)))


@over_backends("bn_act_backward")
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("mask", "with_x"), [*((m, True) for m in MASKS), ("none", False),
                                              ("out", False)])  # fmt: skip
def test_masks(mask, with_x, layout, dtype, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, (3, 19, 5, 7), dtype, mask, with_x))

    verify(backend, ours, eager, make)


@over_backends("bn_act_backward")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["grad", "x", "out", "a", "b", "c"])
def test_layouts(which, layout, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 17, 5, 6), dtype)
        return {**made, which: LAYOUTS[layout](made[which])}

    verify(backend, ours, eager, laid_out)


@over_backends("bn_act_backward")
def test_without_x_nothing_of_it_comes_in(backend):
    """torch's backward of fixed statistics does not read x either."""
    made = inputs(0, (2, 5, 3, 4), torch.float32, "out", with_x=False)
    result = engines.implementation("bn_act_backward", backend.engine)(**made)
    g = masked(made["grad"], None, made["out"], None, None, "relu")
    expected = g * per_channel(made["a"]) + per_channel(made["c"])
    torch.testing.assert_close(result, expected)


@over_layouts
@over_dtypes
@over_backends("bn_act_backward")
def test_selects(backend, dtype, layout):
    def spoilt(seed):
        made = inputs(seed, (2, 20, 3, 4), dtype)
        for c, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            made["out"][0, c, 1, 1], made["grad"][0, c, 1, 1] = 0, value
            made["out"][0, 4 + c, 1, 1], made["grad"][0, 4 + c, 1, 1] = 1, value
        made["out"][1, 9, 2, 2] = torch.nan
        made["x"][1, 10, 2, 2] = torch.nan
        return of_tensors(LAYOUTS[layout], made)

    verify(backend, ours, eager, spoilt)


@over_dtypes
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
@pytest.mark.parametrize("shape", SHAPES[::4], ids=str)
def test_in_place_gives_the_same_bits(shape, layout, dtype):
    args = tuple(of_tensors(LAYOUTS[layout], inputs(0, shape, dtype)).values())
    expected = OP(*args)
    for threads in (1, 2):
        given = copied(args)
        assert at_threads(threads, IN_PLACE, *given) is None
        assert torch.equal(bits(given[0]), bits(expected))
        assert given[0].stride() == args[0].stride()
        assert_identical(given[1:], args[1:], "inputs")


def test_in_place_is_seen_by_autograd():
    given = tuple(inputs(0, (2, 5, 3, 4), torch.float32).values())
    leaf = torch.randn(2, 5, 3, 4, requires_grad=True)
    y = torch.relu(leaf)
    IN_PLACE(y.detach(), *given[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad", torch.ones(2, 5, 3), "grad must have 4 dimensions"),
        ("grad", torch.ones(2, 5, 3, 4, dtype=torch.int32), "grad must be float32"),
        ("x", torch.ones(2, 5, 3, 3), "x must have shape"),
        ("x", torch.ones(2, 5, 3, 4).half(), "x must be float32 as grad is, got float16"),
        ("out", torch.ones(2, 5, 3, 4).double(), "out must be float32 as grad is, got float64"),
        ("a", torch.ones(4), r"a must have shape \[5\], got \[4\]"),
        ("b", torch.ones(5).double(), "b must be float32, got float64"),
        ("act", "gelu", 'act must be "none" or "relu"'),
    ],
)
@pytest.mark.parametrize("op", [OP, IN_PLACE], ids=["out_of_place", "in_place"])
def test_bad_input(op, name, value, words):
    given = {**inputs(0, (2, 5, 3, 4), torch.float32), name: value}
    with pytest.raises(RuntimeError, match=f"bn_act_backward_?: {words}"):
        op(*given.values())


def test_a_mask_needs_something_to_be_known_from():
    given = inputs(0, (2, 5, 3, 4), torch.float32, "x", with_x=False)
    for engine in ("native", "reference"):
        with pytest.raises(RuntimeError, match="out must be given"):
            engines.implementation("bn_act_backward", engine)(**given)


@over_layouts
@pytest.mark.parametrize("op", [OP, IN_PLACE], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize(("mask", "with_x"), [("out", True), ("x", True), ("out", False)])
def test_opcheck(mask, with_x, op, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, mask, with_x))
    torch.library.opcheck(op, tuple(made.values()))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 20)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    mask=st.sampled_from(MASKS),
    with_x=st.booleans(),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layouts, mask, with_x, seed):
    assume(with_x or mask != "x")
    made = inputs(seed, shape, dtype, mask, with_x)
    for name, layout in zip(("grad", "x", "out"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    args = tuple(made.values())
    result = OP(*args)
    g = masked(*(made[k] for k in ("grad", "x", "out", "scale", "shift", "act"))).double()
    x = torch.zeros_like(g) if made["x"] is None else made["x"].double()
    a, b, c = (per_channel(made[k].double()) for k in "abc")
    magnitude = (g * a).abs() + (x * b).abs() + c.abs()
    within_rounding(result, g * a + x * b + c, magnitude, 3)
    assert placed(OP(*shadow(args))) == placed(result)
    if layouts[0] != "expanded":
        grad = copied(args[0])
        assert IN_PLACE(grad, *args[1:]) is None
        assert torch.equal(bits(grad), bits(result))
