"""bn_act_backward: BatchNorm's gradient behind a relu, and its in-place form."""

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
    bits,
    copied,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    over_raw,
    over_raw_backends,
    per_channel,
    placed,
    shadow,
    torch_batch_norm,
    verify,
)
from hypothesis import given, settings
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


#: Of the batch or fixed; x then makes nothing but the mask.
STATISTICS = ("batch", "fixed", "without_x")
CASES = [(m, s) for m in MASKS for s in STATISTICS if (m, s) != ("x", "without_x")]
BATCH = ("mean", "invstd", "sum_g", "sum_gx")
over_cases = pytest.mark.parametrize(("mask", "statistics"), CASES)


def batch_sums(seed, shape, dtype, statistics="batch"):
    """sum_g, sum_gx and count. Any sums will do; these have terms as large as g's own."""
    if statistics != "batch":
        return {"sum_g": None, "sum_gx": None, "count": 0.0}
    source = Source(seed + 5, torch.float32 if dtype in HALF else dtype)
    count = max(1, shape[0] * shape[2] * shape[3])
    sums = {name: source.normal(shape[1]) * count for name in ("sum_g", "sum_gx")}
    return {**sums, "count": float(count)}


def inputs(seed, shape, dtype, mask="out", statistics="batch"):
    made = reduced(seed, shape, dtype, mask)
    act = made.pop("act")
    if statistics != "batch":
        made["mean"] = made["invstd"] = None
    if statistics == "without_x":
        made["x"] = None
    return {**made, **batch_sums(seed, shape, dtype, statistics), "act": act}


def ours(**given):
    return engines.implementation("bn_act_backward", engines.wish())(**given)


def of_batch_norm(g, x, scale, mean, invstd, sum_g, sum_gx, count):
    if sum_g is None:
        return per_channel(scale) * g
    inner = g - per_channel(sum_g / count)
    inner = inner - (x - per_channel(mean)) * per_channel(invstd * sum_gx / count)
    return per_channel(scale) * inner


def magnitude(g, **given):
    """The same with every term in its absolute value."""
    given = of_tensors(torch.Tensor.abs, given)
    subtracted = ("mean", "sum_g", "sum_gx")
    return of_batch_norm(
        g.abs(), **{k: -t if k in subtracted and t is not None else t for k, t in given.items()}
    )


def eager(grad, x, out, scale, shift, mean, invstd, sum_g, sum_gx, count, act):
    g = masked(grad, x, out, scale, shift, act)
    dx = of_batch_norm(g, x, scale, mean, invstd, sum_g, sum_gx, count)
    # In the layout torch's BatchNorm gives its input's gradient.
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
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
@over_cases
def test_cases(mask, statistics, layout, dtype, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, (3, 19, 5, 7), dtype, mask, statistics))

    verify(backend, ours, eager, make)


@over_backends("bn_act_backward")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["grad", "x", "out", "scale", "mean", "invstd", "sum_gx"])
def test_layouts(which, layout, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 17, 5, 6), dtype)
        return {**made, which: LAYOUTS[layout](made[which])}

    verify(backend, ours, eager, laid_out)


@over_backends("bn_act_backward")
@over_layouts
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(ratio, layout, backend):
    def far(seed):
        made = inputs(seed, (2, 17, 5, 6), torch.float32)
        made["x"], made["mean"] = made["x"] + ratio, made["mean"] + ratio
        return of_tensors(LAYOUTS[layout], made)

    verify(backend, ours, eager, far)


@over_backends("bn_act_backward")
@pytest.mark.parametrize("mask", MASKS)
def test_of_fixed_statistics_x_makes_nothing_but_the_mask(mask, backend):
    """torch's backward does not read x there either; its relu lets pass what arrives at NaN."""
    made = backend.move(inputs(0, (2, 5, 3, 4), torch.float32, mask, "fixed"))
    made["x"] = torch.full_like(made["x"], torch.nan)
    result = engines.implementation("bn_act_backward", backend.engine)(**made)
    given = {**made, "x": None, "act": "relu" if mask == "out" else "none"}
    assert_identical(result, engines.implementation("bn_act_backward", backend.engine)(**given))
    assert result.isfinite().all()


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


@over_raw_backends("bn_act_backward")
@over_dtypes
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
@pytest.mark.parametrize("shape", SHAPES[::4], ids=str)
def test_in_place_gives_the_same_bits(shape, layout, dtype, backend):
    op, in_place = (
        engines.implementation(f"bn_act_backward{form}", backend.engine) for form in ("", "_")
    )
    args = tuple(of_tensors(LAYOUTS[layout], inputs(0, shape, dtype)).values())
    args = backend.move(args)
    expected = op(*args)
    for threads in (1, 2):
        given = copied(args)
        assert at_threads(threads, in_place, *given) is None
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
        ("x", None, "x must be given with sum_g, got none"),
        ("scale", torch.ones(4), r"scale must have shape \[5\], got \[4\]"),
        ("mean", torch.ones(4), r"mean must have shape \[5\], got \[4\]"),
        ("invstd", torch.ones(5).double(), "invstd must be float32, got float64"),
        ("sum_g", torch.ones(5).half(), "sum_g must be float32, got float16"),
        ("sum_gx", torch.ones(5, 1), r"sum_gx must have shape \[5\], got \[5, 1\]"),
        *((name, None, "mean, invstd, sum_g and sum_gx must be given together") for name in BATCH),
        ("count", 0.0, "count must be more than 0 with sum_g, got 0"),
        ("count", -1.0, "count must be more than 0 with sum_g, got -1"),
        ("count", torch.nan, "count must be more than 0 with sum_g, got"),
        ("act", "gelu", 'act must be "none" or "relu"'),
    ],
)
@over_raw("bn_act_backward", "bn_act_backward_")
def test_bad_input(raw, name, value, words):
    given = {**inputs(0, (2, 5, 3, 4), torch.float32), name: value}
    with pytest.raises(RuntimeError, match=f"bn_act_backward_?: {words}"):
        raw(*given.values())


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("name", ["x", *BATCH, "count"])
def test_batch_statistics_are_given_whole_or_not_at_all(name, engine):
    op = engines.implementation("bn_act_backward", engine)
    whole, none = (inputs(0, (2, 5, 3, 4), torch.float32, "out", s) for s in ("batch", "fixed"))
    op(**whole), op(**none)
    with pytest.raises(RuntimeError, match="must be"):
        op(**{**whole, name: 0.0 if name == "count" else None})
    if name != "x":
        with pytest.raises(RuntimeError, match="must be"):
            op(**{**none, name: whole[name]})


def test_a_mask_needs_something_to_be_known_from():
    given = inputs(0, (2, 5, 3, 4), torch.float32, "x", "without_x")
    for engine in ("native", "reference"):
        with pytest.raises(RuntimeError, match="out must be given"):
            engines.implementation("bn_act_backward", engine)(**given)


@over_layouts
@pytest.mark.parametrize("op", [OP, IN_PLACE], ids=["out_of_place", "in_place"])
@over_cases
def test_opcheck(mask, statistics, op, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, mask, statistics))
    torch.library.opcheck(op, tuple(made.values()))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 20)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layouts, case, seed):
    made = inputs(seed, shape, dtype, *case)
    for name, layout in zip(("grad", "x", "out"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    args = tuple(made.values())
    result = OP(*args)
    g = masked(*(made[k] for k in ("grad", "x", "out", "scale", "shift", "act"))).double()
    rest = {k: made[k] for k in ("x", "scale", *BATCH, "count")}
    exact = of_tensors(torch.Tensor.double, rest)
    within_rounding(result, of_batch_norm(g, **exact), magnitude(g, **exact), 5)
    assert placed(OP(*shadow(args))) == placed(result)
    if layouts[0] != "expanded":
        grad = copied(args[0])
        assert IN_PLACE(grad, *args[1:]) is None
        assert torch.equal(bits(grad), bits(result))
