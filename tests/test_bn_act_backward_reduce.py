"""bn_act_backward_reduce: the gradients of BatchNorm's bias and weight behind a relu."""

import pytest
import torch
from cases import (
    DTYPES,
    EPS,
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
    over_raw_backends,
    per_channel,
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_backward_reduce.default

_PIXELS, _ROWS = TILE["kBlockPixels"][0], TILE["kMostBlockRows"][0]
SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(8, 16, 64)),
    *((1, 5, 1, n) for n in around(TILE["kRowsAtOnce"][0])),
    (2, 2, 1, _PIXELS + 1),
    (2, 17, 1, _ROWS + 1),
    (40, 600, 1, 2),
    *SPLIT_SHAPES,
    (2, 9, 1, 1),
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
    (2, 0, 3, 4),
]
#: How the mask is known: there is none, from the activation, or from x.
MASKS = ("none", "out", "x")


def inputs(seed, shape, dtype, mask="out"):
    source = Source(seed, dtype)
    bn = source.batch_norm(shape[1])
    invstd = (bn["var"] + EPS).rsqrt()
    x = source.normal(*shape)
    scale = bn["gamma"] * invstd
    shift = bn["beta"] - bn["mean"] * scale
    out = torch.ops.fused_resnet.bn_act(x, scale, shift, None, "relu")
    return {
        "grad": source.normal(*shape),
        "x": x,
        "out": out if mask == "out" else None,
        "scale": scale,
        "shift": shift,
        "mean": bn["mean"],
        "invstd": invstd,
        "act": "none" if mask == "none" else "relu",
    }


def ours(**given):
    return engines.implementation("bn_act_backward_reduce", engines.wish())(**given)


def masked(grad, x, out, scale, shift, act):
    if act == "none":
        return grad
    if out is None:
        wide = x.float() if x.dtype in HALF else x
        out = (wide * per_channel(scale) + per_channel(shift)).to(x.dtype)
    return torch.ops.aten.threshold_backward(grad, out, 0)


def eager(grad, x, out, scale, shift, mean, invstd, act):
    """torch's BatchNorm backward, handed the statistics as if it had saved them."""
    g = masked(grad, x, out, scale, shift, act)
    if not g.numel():  # torch divides by zero
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        g, x, torch.ones_like(mean), None, None, mean, invstd, True, EPS, [False, True, True]
    )
    return bias, weight


def check(backend, make):
    verify(backend, ours, eager, make)


@over_backends("bn_act_backward_reduce", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    check(backend, lambda s: of_tensors(LAYOUTS[layout], inputs(s, shape, dtype)))


@over_backends("bn_act_backward_reduce")
@over_dtypes
@over_layouts
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, layout, dtype, backend):
    check(backend, lambda s: of_tensors(LAYOUTS[layout], inputs(s, (3, 19, 5, 7), dtype, mask)))


@over_backends("bn_act_backward_reduce")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["grad", "x", "out", "scale", "mean", "invstd"])
def test_layouts(which, layout, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 17, 5, 6), dtype)
        return {**made, which: LAYOUTS[layout](made[which])}

    check(backend, laid_out)


@over_backends("bn_act_backward_reduce")
@over_layouts
@over_dtypes
def test_selects(dtype, layout, backend):
    """NaN and infinities of a gradient are not passed where relu is flat, and are where it is NaN;
    what is not finite stays in its channel."""

    def spoilt(seed):
        made = inputs(seed, (2, 20, 3, 4), dtype)
        for c, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            made["out"][0, c, 1, 1], made["grad"][0, c, 1, 1] = 0, value
            made["out"][0, 4 + c, 1, 1], made["grad"][0, 4 + c, 1, 1] = 1, value
        made["out"][1, 9, 2, 2] = torch.nan
        made["x"][1, 10, 2, 2] = torch.nan
        return of_tensors(LAYOUTS[layout], made)

    check(backend, spoilt)


@over_layouts
@pytest.mark.parametrize("mask", MASKS)
def test_opcheck(mask, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, mask))
    torch.library.opcheck(OP, tuple(made.values()))


@over_raw_backends("bn_act_backward_reduce")
@over_dtypes
def test_mask_of_x_is_that_of_the_stored_activation(dtype, backend):
    """Also where rounding makes a positive number zero."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, -1.0]).to(dtype).view(1, 1, 1, 5)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = torch.full((1,), least / 4, dtype=work), torch.zeros(1, dtype=work)
    vectors = (scale, shift, torch.zeros(1, dtype=work), torch.ones(1, dtype=work))
    x, *vectors = backend.move((x, *vectors))
    out = engines.implementation("bn_act", backend.engine)(x, *vectors[:2], None, "relu")
    op = engines.implementation("bn_act_backward_reduce", backend.engine)
    grad = torch.ones_like(x)
    assert_identical(op(grad, x, None, *vectors, "relu"), op(grad, x, out, *vectors, "relu"))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layouts, mask, seed):
    made = inputs(seed, shape, dtype, mask)
    for name, layout in zip(("grad", "x", "out"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    result = OP(*made.values())
    assert_identical(at_threads(1, OP, *made.values()), result, "one thread and two")
    g = masked(*(made[k] for k in ("grad", "x", "out", "scale", "shift", "act"))).double()
    centered = made["x"].double() - per_channel(made["mean"].double())
    wide = g * centered * per_channel(made["invstd"].double())
    steps = 12 + made["x"][:, 0].numel()
    within_rounding(result[0], g.sum((0, 2, 3)), g.abs().sum((0, 2, 3)), steps)
    within_rounding(result[1], wide.sum((0, 2, 3)), wide.abs().sum((0, 2, 3)), steps)
    for output, fake in zip(result, OP(*shadow(tuple(made.values()))), strict=True):
        assert placed(output) == placed(fake)
