"""bn_act_gram: the Gram matrix and the sum of centered activations, from which a 1x1 convolution's
statistics follow."""

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
    per_channel,
    placed,
    shadow,
    torch_act,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_gram.default

_ROWS = TILE["kMostGramRows"][0]
#: (shape, stride): register tiles in both directions, blocks of rows, nothing.
CASES = [
    *(((2, n, 3, 5), 1) for n in around(*set(TILE["kGramRows"]), 3 * 16)),
    *(((1, 5, 1, n), 1) for n in (7, 8, 9, _ROWS - 1, _ROWS, _ROWS + 1)),
    ((1, 150, 21, 30), 1),
    ((2, 20, 7, 9), 2),
    ((2, 20, 8, 5), 3),
    ((60, 16, 3, 4), 2),  # many images in a stage of the GPU's, and
    ((3, 9, 19, 7), 1),  # rows
    ((2, 9, 1, 1), 2),
    ((1, 1, 1, 1), 1),
    ((0, 3, 4, 5), 1),
    ((2, 3, 0, 5), 2),
    ((2, 0, 3, 4), 1),
]


def inputs(seed, shape, dtype, with_scale=True, act="relu", stride=1):
    source = Source(seed, dtype)
    bn = source.batch_norm(shape[1])
    center = source.normal(shape[1]).relu().to(bn["mean"].dtype)
    return {
        "x": source.normal(*shape),
        "scale": bn["gamma"] if with_scale else None,
        "shift": bn["beta"] if with_scale else None,
        "center": center,
        "act": act,
        "stride": stride,
    }


def ours(**given):
    """What is returned in float64, for the sake of what is done with it, is judged as what it was
    accumulated in."""
    work = torch.float64 if given["x"].dtype == torch.float64 else torch.float32
    results = engines.implementation("bn_act_gram", engines.wish())(**given)
    assert all(t.dtype == torch.float64 for t in results)
    return [t.to(work) for t in results]


def centered(x, scale, shift, center, act, stride):
    """zc as it is defined: z in x's dtype, centered in the accumulation dtype. [pixel, channel]"""
    z = x[:, :, ::stride, ::stride]
    wide = z.float() if z.dtype in HALF else z
    if scale is not None:
        wide = (wide * per_channel(scale) + per_channel(shift)).to(x.dtype).to(wide.dtype)
    return (torch_act(wide, act) - per_channel(center)).movedim(1, -1).flatten(0, -2)


def eager(**given):
    """A matrix product of torch's in the accumulation dtype."""
    zc = centered(**given)
    return zc.T @ zc, zc.sum(0)


@over_backends("bn_act_gram", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("shape", "stride"), CASES, ids=str)
def test_cases(shape, stride, layout, dtype, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, shape, dtype, stride=stride))

    verify_rounded(backend, make)


def verify_rounded(backend, make):
    """As ``verify``; z is rounded to x's dtype by definition, in the truth as well."""
    dtype = make(0)["x"].dtype

    def truth_too(**given):
        if dtype in HALF and given["x"].dtype == torch.float64:
            zc = centered(**{k: narrow(k, v) for k, v in given.items()}).double()
            return zc.T @ zc, zc.sum(0)
        return eager(**given)

    def narrow(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype if name == "x" else torch.float32)

    verify(backend, ours, truth_too, make)


@over_backends("bn_act_gram")
@over_dtypes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, stride, dtype, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, (2, 17, 5, 6), dtype, stride=stride))

    verify_rounded(backend, make)


@over_backends("bn_act_gram")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("with_scale", [False, True])
def test_activations(with_scale, act, dtype, backend):
    verify_rounded(backend, lambda seed: inputs(seed, (2, 17, 5, 6), dtype, with_scale, act))


@over_backends("bn_act_gram")
@over_dtypes
@pytest.mark.parametrize("ratio", [3, 100, 3000])
def test_a_center_far_from_zero(ratio, dtype, backend):
    """What is centered has bits that z's type has not; matrix units take it in two parts."""

    def make(seed):
        given = inputs(seed, (2, 17, 9, 10), dtype, with_scale=False)
        x = (given["x"] + ratio).to(dtype)
        center = torch.full_like(given["center"], ratio) + given["center"].to(torch.bfloat16)
        return given | {"x": x, "center": center.to(torch.bfloat16).to(center.dtype)}

    verify_rounded(backend, make)


@over_backends("bn_act_gram", emulated=False)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, _ROWS, TILE["kGramRanges"][0] + 1),  # more blocks than ranges
        (1, TILE["kGramBlockBytes"][0] // 4 // TILE["kLeastGramRows"][0] + 1, 1, 3),  # short blocks
    ],
)
def test_large(shape, backend):
    verify_rounded(backend, lambda seed: inputs(seed, shape, torch.float32))


@over_backends("bn_act_gram")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(value, backend):
    given = inputs(0, (2, 20, 5, 6), torch.float32, act="none")
    given["x"][1, 3, 2, 1] = value
    results = engines.implementation("bn_act_gram", backend.engine)(**backend.move(given))
    gram, total = (t.cpu() for t in results)
    others = torch.arange(20) != 3
    assert not gram[3].isfinite().any()
    assert not gram[:, 3].isfinite().any()
    assert gram[others][:, others].isfinite().all()
    assert torch.equal(total.isfinite(), others)


@over_dtypes
def test_is_symmetric_and_the_same_for_any_number_of_threads(dtype):
    for shape in ((1, 70, 40, 40), (1, 900, 3, 3)):
        args = tuple(inputs(0, shape, dtype).values())
        gram, total = OP(*args)
        assert torch.equal(gram, gram.T)
        for threads in (1, 2, 3):
            assert_identical(at_threads(threads, OP, *args), (gram, total))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.ones(2, 5, 3), "x must have 4 dimensions"),
        ("scale", None, "scale and shift must be given together"),
        ("shift", torch.ones(4), r"shift must have shape \[5\], got \[4\]"),
        ("center", torch.ones(5).half(), "center must be float32, got float16"),
        ("stride", 0, "stride must be at least 1, got 0"),
        ("act", "gelu", 'act must be "none" or "relu"'),
    ],
)
def test_bad_input(name, value, words):
    given = {**inputs(0, (2, 5, 3, 4), torch.float32), name: value}
    with pytest.raises(RuntimeError, match=f"bn_act_gram: {words}"):
        OP(*given.values())


@over_layouts
@pytest.mark.parametrize("with_scale", [False, True])
def test_opcheck(with_scale, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, with_scale))
    torch.library.opcheck(OP, tuple(made.values()))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    with_scale=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    stride=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layout, with_scale, act, stride, seed):
    made = inputs(seed, shape, dtype, with_scale, act, stride)
    made["x"] = LAYOUTS[layout](made["x"])
    gram, total = result = OP(*made.values())
    work = torch.float64 if dtype == torch.float64 else torch.float32
    exact = centered(**made).double()
    # Beside its own, each value has the roundings of z; they count in units of the largest.
    magnitude = centered(**of_tensors(torch.abs, made)).double().abs()
    magnitude = magnitude + 2 * made["center"].abs().double()
    steps = 8 + exact.size(0)
    near = (exact.T @ exact).to(work), exact.sum(0).to(work)
    within_rounding(gram.to(work), near[0].double(), magnitude.T @ magnitude, steps)
    within_rounding(total.to(work), near[1].double(), magnitude.sum(0), steps)
    for output, fake in zip(result, OP(*shadow(tuple(made.values()))), strict=True):
        assert placed(output) == placed(fake)
