"""conv_wgrad: the gradient of a convolution's weight, its input normalised on the way."""

from dataclasses import replace

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
    channels_last,
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
from conv_cases import GEOMETRIES, GPU_TILES, GROUPED, SOME, Conv, convolutions, pointwise
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.conv_wgrad.default

_STEPS, _ROW = TILE["kChunkSteps"][0], TILE["kFlatRow"][0]
#: Tiles in both directions; rows and chunks of them; ranges of chunks; blocks of channels.
TILES = [
    *(pointwise(7, (5, k)) for k in around(*TILE["kTile"])),
    *(pointwise(7, (c, 9)) for c in around(8, 16, 3 * 16)),
    *(pointwise(n, (5, 9)) for n in around(_ROW, _STEPS // 2)),
    *(Conv(1, (5, 9), (3, n)) for n in around(2)),
    *(Conv(1, (17, 9), (n, 64)) for n in around(_STEPS // 64)),
    Conv(3, (16, 8), (9, 8)),
    Conv(2, (16, 8), (8, _STEPS + 1)),
    pointwise(2 * 2 * TILE["kRangeSteps"][0] + 1, (16, 8)),
    Conv(5, (20, 8), (31, 33)),
    Conv(2, (600, 9), (7, 5)),
    Conv(1, (17, 2 * TILE["kMostOutChannels"][0] + 3), (3, 4)),
]
TILES = [replace(case, emulated=False) for case in TILES]
#: The GPU kernel's stages of pixels go round several times, over the ends of rows and of images.
STAGES = [
    Conv(47, (8, 8), (5, 4), kernel=(3, 2), stride=(2, 1), padding=(1, 0)),
    Conv(3, (5, 9), (11, 27), stride=(1, 3), kernel=(1, 1)),
    Conv(1, (72, 136), (11, 13), kernel=(1, 1)),  # in its large tile
]
CASES = sorted({*TILES, *GPU_TILES, *STAGES, *GEOMETRIES, *GROUPED}, key=str)
over_some = pytest.mark.parametrize("case", SOME, ids=str)


def inputs(case, seed, dtype, with_scale=True, act="relu"):
    source = Source(seed, dtype)
    bn = source.batch_norm(case.channels[0])
    return {
        "grad": source.normal(case.batch, case.channels[1], *case.out_size),
        "x": source.normal(case.batch, case.channels[0], *case.size),
        "scale": bn["gamma"] if with_scale else None,
        "shift": bn["beta"] if with_scale else None,
        "act": act,
        "kernel_size": list(case.kernel),
        "stride": list(case.stride),
        "padding": list(case.padding),
        "dilation": list(case.dilation),
        "groups": case.groups,
    }


def ours(**given):
    return engines.implementation("conv_wgrad", engines.wish())(**given)


def normalised(x, scale, shift, act):
    """z as it is defined, in x's dtype."""
    wide = x.float() if x.dtype in HALF else x
    if scale is not None:
        wide = wide * per_channel(scale) + per_channel(shift)
    return torch_act(wide, act).to(x.dtype)


def gradient(grad, z, kernel_size, stride, padding, dilation, groups):
    weight = grad.new_empty(grad.size(1), z.size(1) // groups, *kernel_size)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    result = torch.ops.aten.convolution_backward(
        grad, z, channels_last(weight), None, *geometry, [False, True, False]
    )
    return channels_last(result[1])


def check(backend, make):
    """By the rule. The vendor multiplies half types and returns them; ours are as torch in float32,
    of a z that is rounded by definition, in the truth as well."""
    dtype = make(0)["x"].dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    multiplied = dtype if backend.engine == "vendor" else work

    def eager(grad, x, scale, shift, act, **geometry):
        if x.dtype == torch.float64:
            z = normalised(x.to(dtype), *of_tensors(lambda t: t.to(work), (scale, shift)), act)
            return gradient(grad, z.double(), **geometry)
        z = normalised(x, scale, shift, act)
        return gradient(grad.to(multiplied), z.to(multiplied), **geometry).to(work)

    verify(backend, ours, eager, make)


@over_backends("conv_wgrad", isa=True)
@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype, backend):
    check(backend, lambda seed: of_tensors(channels_last, inputs(case, seed, dtype)))


@over_backends("conv_wgrad")
@over_dtypes
@pytest.mark.parametrize("case", SOME[:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, case, dtype, backend):
    check(backend, lambda seed: of_tensors(LAYOUTS[layout], inputs(case, seed, dtype)))


@over_backends("conv_wgrad")
@over_dtypes
@over_some
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("with_scale", [False, True])
def test_prologues(with_scale, act, case, dtype, backend):
    check(backend, lambda seed: inputs(case, seed, dtype, with_scale, act))


@over_backends("conv_wgrad")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channels(value, backend):
    case = Conv(2, (20, 12), (6, 7))
    made = inputs(case, 0, torch.float32, act="none")
    made["x"][1, 3, 2, 3] = value
    made["grad"][0, 5, 4, 2] = value
    dw = engines.implementation("conv_wgrad", backend.engine)(**backend.move(made)).cpu()
    expected = torch.ones(12, 20, 3, 3, dtype=torch.bool)
    expected[:, 3] = False
    expected[5] = False
    assert torch.equal(dw.isfinite(), expected)


@over_dtypes
@pytest.mark.parametrize(
    "case",
    [Conv(6, (20, 12), (30, 33)), pointwise(4500, (70, 9)), Conv(2, (40, 600), (7, 7))],
    ids=str,
)
def test_the_same_for_any_number_of_threads(case, dtype):
    args = tuple(of_tensors(channels_last, inputs(case, 0, dtype)).values())
    expected = OP(*args)
    for threads in (1, 2, 3, 5):
        assert_identical(at_threads(threads, OP, *args), expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad", torch.ones(2, 9, 6), "grad must have 4 dimensions"),
        (
            "grad",
            torch.ones(2, 9, 6, 6),
            r"grad must have shape \[2, 9, 6, 7\], got \[2, 9, 6, 6\]",
        ),
        ("x", torch.ones(2, 5, 6), "x must have 4 dimensions"),
        ("x", torch.ones(2, 5, 6, 7).half(), "x must be float32 as grad is, got float16"),
        ("scale", None, "scale and shift must be given together"),
        ("shift", torch.ones(4), r"shift must have shape \[5\], got \[4\]"),
        ("act", "gelu", 'act must be "none" or "relu"'),
        ("kernel_size", [3], "kernel_size must be two integers of at least 1"),
        ("kernel_size", [9, 3], r"kernel \[9, 3\] .* is larger than the padded input"),
        ("stride", [0, 1], "stride must be two integers of at least 1"),
        ("padding", [-1, 1], "padding must be two integers of at least 0"),
        ("dilation", [1, 0], "dilation must be two integers of at least 1"),
        ("groups", 2, "groups must be positive and divide the channels 5 and 9, got 2"),
    ],
)
def test_bad_input(name, value, words):
    made = {**inputs(Conv(), 0, torch.float32), name: value}
    with pytest.raises(RuntimeError, match=f"conv_wgrad: {words}"):
        OP(*made.values())


@over_layouts
@over_some
@pytest.mark.parametrize("with_scale", [False, True])
def test_opcheck(with_scale, case, layout):
    made = of_tensors(LAYOUTS[layout], inputs(case, 0, torch.float32, with_scale))
    torch.library.opcheck(OP, tuple(made.values()))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    case=convolutions(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    with_scale=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(case, dtype, layouts, with_scale, act, seed):
    made = inputs(case, seed, dtype, with_scale, act)
    for name, layout in zip(("grad", "x"), layouts, strict=True):
        made[name] = LAYOUTS[layout](made[name])
    result = OP(*made.values())
    geometry = {k: made[k] for k in ("kernel_size", "stride", "padding", "dilation", "groups")}
    grad, z = made["grad"].double(), normalised(*(made[k] for k in ("x", "scale", "shift", "act")))
    # Beside its own, each product has the roundings of z; they count in units of the largest.
    size = z.double().abs()
    if with_scale:
        x, scale, shift = of_tensors(
            lambda t: t.double().abs(), (made["x"], made["scale"], made["shift"])
        )
        size = x * per_channel(scale) + per_channel(shift)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    exact = gradient(grad, z.double(), **geometry)
    within_rounding(
        result,
        exact.to(work).double(),
        gradient(grad.abs(), size, **geometry),
        8 + case.batch * case.out_size[0] * case.out_size[1],
    )
    fake = OP(*shadow(tuple(made.values())))
    assert placed(fake) == placed(result)
