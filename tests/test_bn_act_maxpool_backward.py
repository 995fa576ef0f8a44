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
from test_bn_act_maxpool import CASES, pairs
from test_bn_act_maxpool_train import geometry, made
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_maxpool_backward.default
STEM = {"kernel_size": 3, "stride": 2, "padding": 1}


def inputs(seed, shape, dtype, pooling, act="relu", layout="contiguous"):
    tensors = made(seed, shape, dtype)
    out, argmax = torch.ops.fused_resnet.bn_act_maxpool_train(
        *tensors.values(), *geometry(**pooling), act
    )
    source = Source(seed + 9, dtype)
    vectors = source.batch_norm(shape[1])
    images = {"grad": source.normal(*out.shape), "out": out, "argmax": argmax, "x": tensors["x"]}
    return {
        **{name: LAYOUTS[layout](t) for name, t in images.items()},
        "a": vectors["mean"],
        "b": vectors["gamma"],
        "c": (vectors["var"] + EPS).rsqrt(),
    }


def ours(pooling, act, **tensors):
    implementation = engines.implementation("bn_act_maxpool_backward", engines.wish())
    return implementation(*tensors.values(), *geometry(**pooling)[:4], act)


def masked(grad, out, act):
    return torch.ops.aten.threshold_backward(grad, out, 0) if act == "relu" else grad


def places(pooling, argmax, x):
    """The pixels the maxima come from, counted through an image."""
    kernel, stride, padding, dilation, _ = geometry(**pooling)
    rows, columns = (torch.arange(argmax.size(d)) for d in (2, 3))
    at = argmax.long()
    h = at // kernel[1] * dilation[0] + (rows * stride[0] - padding[0]).view(-1, 1)
    w = at % kernel[1] * dilation[1] + columns * stride[1] - padding[1]
    return h * x.size(3) + w


def eager(pooling, act, grad, out, argmax, x, a, b, c):
    """Scattered pixel by pixel in the accumulation dtype."""
    g = masked(grad, out, act).to(a.dtype)
    at = places(pooling, argmax.byte(), x).flatten(2)
    spread = torch.zeros(*x.shape[:2], x.size(2) * x.size(3), dtype=a.dtype)
    spread = spread.scatter_add(2, at, g.flatten(2)).view(x.shape)
    dx = spread * per_channel(a) + x * per_channel(b) + per_channel(c)
    zeros, ones = torch.zeros_like(a), torch.ones_like(a)
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


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(2, 5, 3, 3), "grad must have 4 or 4 positions in dimension 2, got 3"),
        (1, torch.ones(2, 4, 4, 3), "out must have shape"),
        (2, torch.ones(2, 5, 4, 3), "argmax must be uint8"),
        (2, torch.ones(2, 5, 4, 4, dtype=torch.uint8), "argmax must have shape"),
        (3, torch.ones(2, 5, 3), "x must have 4 dimensions"),
        (4, torch.ones(4), r"a must have shape \[5\], got \[4\]"),
        (7, [16, 16], "kernel_size must have at most 255 positions"),
    ],
)
def test_bad_input(place, value, words):
    args = [*inputs(0, (2, 5, 7, 6), torch.float32, STEM).values(), *geometry(**STEM)[:4], "relu"]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"bn_act_maxpool_backward: {words}"):
        OP(*args)


@over_layouts
def test_opcheck(layout):
    given = inputs(0, (2, 5, 8, 7), torch.float32, STEM, layout=layout)
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
    seed=st.integers(0, 9),
)
def test_fuzz(outer, size, kernel, stride, padding, dilation, ceil_mode, dtype, layout, act, seed):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= reach for n, p, reach in zip(size, padding, span, strict=True)))
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    pooling = dict(zip(names, (kernel, stride, padding, dilation, ceil_mode), strict=True))
    tensors = inputs(seed, (*outer, *size), dtype, pooling, act, layout)
    # A dilated window can lie in the padding altogether; torch takes its gradient out of the image.
    assume(not tensors["out"].isneginf().any())
    args = (*tensors.values(), *geometry(**pooling)[:4], act)
    result = OP(*args)
    assert_identical(at_threads(1, OP, *args), result, "one thread and two")
    exact = {k: t if k == "argmax" else t.double() for k, t in tensors.items()}
    positive = {k: t if k in ("argmax", "out") else t.abs() for k, t in exact.items()}
    truth, magnitude = eager(pooling, act, **exact), eager(pooling, act, **positive)
    within_rounding(result, truth, magnitude, 4 + kernel[0] * kernel[1])
    assert placed(OP(*shadow(args))) == placed(result)
