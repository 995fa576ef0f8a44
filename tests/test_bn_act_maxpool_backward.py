"""bn_act_maxpool_backward: through pooling, relu and BatchNorm in one pass over the input."""

import pytest
import torch
from cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    Source,
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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bn_act_backward import batch_sums, magnitude, of_batch_norm
from test_bn_act_maxpool import CASES, pairs
from test_bn_act_maxpool_train import geometry, made
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_maxpool_backward.default
STEM = {"kernel_size": 3, "stride": 2, "padding": 1}


def inputs(seed, shape, dtype, pooling, act="relu", layout="contiguous", statistics="batch"):
    tensors = made(seed, shape, dtype)
    out, argmax = torch.ops.fused_resnet.bn_act_maxpool_train(
        *tensors.values(), *geometry(**pooling), act
    )
    source = Source(seed + 9, dtype)
    vectors = source.batch_norm(shape[1])
    images = {"grad": source.normal(*out.shape), "out": out, "argmax": argmax, "x": tensors["x"]}
    batch = statistics == "batch"
    return {
        **{name: LAYOUTS[layout](t) for name, t in images.items()},
        "scale": tensors["scale"],
        "mean": vectors["mean"] if batch else None,
        "invstd": (vectors["var"] + EPS).rsqrt() if batch else None,
        **batch_sums(seed, shape, dtype, statistics),
    }


def ours(pooling, act, **tensors):
    implementation = engines.implementation("bn_act_maxpool_backward", engines.wish())
    return implementation(*tensors.values(), *geometry(**pooling)[:4], act)


def masked(grad, out, act):
    return torch.ops.aten.threshold_backward(grad, out, 0) if act == "relu" else grad


def places(pooling, argmax, x):
    """The pixels the maxima come from, counted through an image."""
    kernel, stride, padding, dilation, _ = geometry(**pooling)
    rows, columns = (torch.arange(argmax.size(d), device=x.device) for d in (2, 3))
    at = argmax.long()
    h = at // kernel[1] * dilation[0] + (rows * stride[0] - padding[0]).view(-1, 1)
    w = at % kernel[1] * dilation[1] + columns * stride[1] - padding[1]
    return h * x.size(3) + w


def scattered(pooling, act, grad, out, argmax, x, scale, **rest):
    """Pixel by pixel in the accumulation dtype."""
    g = masked(grad, out, act).to(scale.dtype)
    at = places(pooling, argmax.byte(), x).flatten(2)
    spread = scale.new_zeros(*x.shape[:2], x.size(2) * x.size(3))
    return spread.scatter_add(2, at, g.flatten(2)).view(x.shape)


def eager(pooling, act, **given):
    x, scale, *batch = list(given.values())[3:]
    dx = of_batch_norm(scattered(pooling, act, **given), x, scale, *batch)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch_batch_norm(x, zeros, ones, ones, zeros).copy_(dx)


def check(backend, pooling, make, act="relu"):
    verify(backend, lambda **t: ours(pooling, act, **t), lambda **t: eager(pooling, act, **t), make)


@over_backends("bn_act_maxpool_backward", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("shape", "pooling"), CASES, ids=str)
def test_cases(shape, pooling, layout, dtype, backend):
    check(backend, pooling, lambda seed: inputs(seed, shape, dtype, pooling, layout=layout))


@over_backends("bn_act_maxpool_backward")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"negative"}))
def test_layouts(layout, act, dtype, backend):
    def make(seed):
        given = inputs(seed, (2, 17, 9, 8), dtype, STEM, act)
        for name in ("grad", "out", "argmax", "x"):
            if layout != "sliced_channels" or name != "argmax":
                larger = {"sliced": "channels_last", "sliced_channels": "channels_last"}
                of_bytes = larger.get(layout, "contiguous") if name == "argmax" else layout
                given[name] = LAYOUTS[of_bytes](given[name])
        return given

    check(backend, STEM, make, act)


@over_backends("bn_act_maxpool_backward")
@over_layouts
def test_selects(layout, backend):
    def spoilt(seed):
        given = inputs(seed, (2, 20, 9, 8), torch.float32, STEM, layout=layout)
        for c, value in enumerate((torch.nan, torch.inf)):
            given["grad"][0, c, 1, 1], given["out"][0, c, 1, 1] = value, 0
            given["grad"][0, 4 + c, 1, 1], given["out"][0, 4 + c, 1, 1] = value, 1
            given["x"][1, 8 + c, 3, 3] = value
        given["out"][1, 10, 2, 2] = torch.nan
        return given

    check(backend, STEM, spoilt)


@over_backends("bn_act_maxpool_backward")
@over_layouts
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(ratio, layout, backend):
    def far(seed):
        given = inputs(seed, (2, 17, 9, 8), torch.float32, STEM, layout=layout)
        return {**given, "x": given["x"] + ratio, "mean": given["mean"] + ratio}

    check(backend, STEM, far)


@over_backends("bn_act_maxpool_backward")
@over_dtypes
@over_layouts
def test_fixed_statistics(layout, dtype, backend):
    """Then nothing of x comes in."""

    def fixed(seed):
        given = inputs(seed, (2, 17, 9, 8), dtype, STEM, layout=layout, statistics="fixed")
        return {**given, "x": torch.full_like(given["x"], torch.nan)}

    check(backend, STEM, fixed)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(2, 5, 3, 3), "grad must have 4 or 4 positions in dimension 2, got 3"),
        (1, torch.ones(2, 4, 4, 3), "out must have shape"),
        (2, torch.ones(2, 5, 4, 3), "argmax must be uint8"),
        (2, torch.ones(2, 5, 4, 4, dtype=torch.uint8), "argmax must have shape"),
        (3, torch.ones(2, 5, 3), "x must have 4 dimensions"),
        (4, torch.ones(4), r"scale must have shape \[5\], got \[4\]"),
        (5, None, "mean, invstd, sum_g and sum_gx must be given together, got some"),
        (6, torch.ones(5).double(), "invstd must be float32, got float64"),
        (9, 0.0, "count must be more than 0 with sum_g, got 0"),
        (10, [16, 16], "kernel_size must have at most 255 positions"),
    ],
)
@over_raw("bn_act_maxpool_backward")
def test_bad_input(raw, place, value, words):
    args = [*inputs(0, (2, 5, 7, 6), torch.float32, STEM).values(), *geometry(**STEM)[:4], "relu"]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"bn_act_maxpool_backward: {words}"):
        raw(*args)


@over_layouts
@pytest.mark.parametrize("statistics", ["batch", "fixed"])
def test_opcheck(statistics, layout):
    given = inputs(0, (2, 5, 8, 7), torch.float32, STEM, "relu", layout, statistics)
    torch.library.opcheck(OP, (*given.values(), *geometry(**STEM)[:4], "relu"))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    outer=st.tuples(st.integers(0, 3), st.integers(1, 36)),
    size=pairs(1, 12),
    kernel=pairs(1, 4),
    stride=pairs(1, 4),
    padding=pairs(0, 2),
    dilation=pairs(1, 3),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    act=st.sampled_from(["none", "relu"]),
    statistics=st.sampled_from(["batch", "fixed"]),
    seed=st.integers(0, 9),
)
def test_fuzz(
    outer, size, kernel, stride, padding, dilation, ceil_mode, dtype, layout, act, statistics, seed
):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= reach for n, p, reach in zip(size, padding, span, strict=True)))
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    pooling = dict(zip(names, (kernel, stride, padding, dilation, ceil_mode), strict=True))
    tensors = inputs(seed, (*outer, *size), dtype, pooling, act, layout, statistics)
    # A dilated window can lie in the padding altogether; torch takes its gradient out of the image.
    assume(not tensors["out"].isneginf().any())
    args = (*tensors.values(), *geometry(**pooling)[:4], act)
    result = OP(*args)
    assert_identical(at_threads(1, OP, *args), result, "one thread and two")
    exact = of_tensors(torch.Tensor.double, tensors)
    spread = scattered(pooling, act, **{**exact, "grad": exact["grad"].abs()})
    size = magnitude(spread, **dict(list(exact.items())[3:]))
    within_rounding(result, eager(pooling, act, **exact), size, 5 + kernel[0] * kernel[1])
    assert placed(OP(*shadow(args))) == placed(result)
