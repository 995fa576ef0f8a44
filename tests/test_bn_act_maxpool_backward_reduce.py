"""bn_act_maxpool_backward_reduce: BatchNorm's gradients, over the pooled positions."""

import pytest
import torch
from cases import (
    DTYPES,
    assert_identical,
    at_threads,
    over_backends,
    over_dtypes,
    over_layouts,
    over_raw,
    per_channel,
    placed,
    shadow,
    verify,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bn_act_maxpool import CASES, pairs
from test_bn_act_maxpool_backward import STEM, masked, places
from test_bn_act_maxpool_backward import inputs as backward_inputs
from test_bn_act_maxpool_train import geometry
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_maxpool_backward_reduce.default


def inputs(*args, **kwargs):
    made = backward_inputs(*args, **kwargs)
    return {k: made[k] for k in ("grad", "out", "argmax", "x", "mean", "invstd")}


def ours(pooling, act, **tensors):
    implementation = engines.implementation("bn_act_maxpool_backward_reduce", engines.wish())
    return implementation(*tensors.values(), *geometry(**pooling)[:4], act)


def terms(pooling, act, grad, out, argmax, x, mean, invstd):
    g = masked(grad, out, act).to(mean.dtype)
    at = places(pooling, argmax.byte(), x)
    taken = x.to(mean.dtype).flatten(2).gather(2, at.flatten(2)).view_as(g)
    return g, g * (taken - per_channel(mean)) * per_channel(invstd)


def eager(pooling, act, **tensors):
    return [t.sum((0, 2, 3)) for t in terms(pooling, act, **tensors)]


# Not of one channel: its sum may cancel, and an error is measured by the largest of all sums.
def check(backend, pooling, make, act="relu"):
    verify(backend, lambda **t: ours(pooling, act, **t), lambda **t: eager(pooling, act, **t), make)


@over_backends("bn_act_maxpool_backward_reduce", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("shape", "pooling"), [c for c in CASES if c[0][1] > 1], ids=str)
def test_cases(shape, pooling, layout, dtype, backend):
    check(backend, pooling, lambda seed: inputs(seed, shape, dtype, pooling, layout=layout))


@over_backends("bn_act_maxpool_backward_reduce")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
def test_activations(act, dtype, backend):
    check(backend, STEM, lambda seed: inputs(seed, (2, 17, 9, 8), dtype, STEM, act), act)


@over_backends("bn_act_maxpool_backward_reduce")
@over_layouts
def test_selects(layout, backend):
    def spoilt(seed):
        given = inputs(seed, (2, 20, 9, 8), torch.float32, STEM, layout=layout)
        for c, value in enumerate((torch.nan, torch.inf)):
            given["grad"][0, c, 1, 1], given["out"][0, c, 1, 1] = value, 0
            given["grad"][0, 4 + c, 1, 1], given["out"][0, 4 + c, 1, 1] = value, 1
        given["out"][1, 10, 2, 2] = torch.nan
        given["grad"][1, 10, 2, 2] = torch.nan
        return given

    check(backend, STEM, spoilt)


@over_layouts
def test_an_argmax_that_is_none_reads_nothing_else(layout):
    """Positions outside the window or the image; the result means nothing, the process lives."""
    given = inputs(0, (2, 5, 7, 6), torch.float32, STEM, layout=layout)
    given["argmax"].fill_(255)
    OP(*given.values(), *geometry(**STEM)[:4], "relu")
    given["argmax"].fill_(0)
    OP(*given.values(), *geometry(**STEM)[:4], "relu")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(2, 5, 3, 3), "grad must have 4 or 4 positions in dimension 2, got 3"),
        (2, torch.ones(2, 5, 4, 3), "argmax must be uint8"),
        (4, torch.ones(4), r"mean must have shape \[5\], got \[4\]"),
        (6, [16, 16], "kernel_size must have at most 255 positions"),
    ],
)
@over_raw("bn_act_maxpool_backward_reduce")
def test_bad_input(raw, place, value, words):
    args = [*inputs(0, (2, 5, 7, 6), torch.float32, STEM).values(), *geometry(**STEM)[:4], "relu"]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"bn_act_maxpool_backward_reduce: {words}"):
        raw(*args)


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
    for got, values, fake in zip(
        result, terms(pooling, act, **exact), OP(*shadow(args)), strict=True
    ):
        magnitude = values.abs().sum((0, 2, 3))
        within_rounding(got, values.sum((0, 2, 3)), magnitude, 6 + values[:, 0].numel())
        assert placed(fake) == placed(got)
