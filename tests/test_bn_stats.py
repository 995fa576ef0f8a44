"""bn_stats: each channel's mean and sum of squared deviations."""

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
    over_raw_backends,
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_stats.default

_PIXELS, _ROWS = TILE["kBlockPixels"][0], TILE["kMostBlockRows"][0]
#: Vectors of channels and of pixels; rows that are added up at once; several blocks; nothing.
SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(8, 16, 64)),
    *((1, 5, 1, n) for n in around(TILE["kRowsAtOnce"][0])),
    (3, 2, 1, _PIXELS + 1),
    (2, 2, 1, 2 * _PIXELS),
    (3, 17, 1, _ROWS - 1),
    (2, 17, 3, _ROWS),
    (1, TILE["kBlockElements"][0] // _ROWS * 2 + 1, 2, _ROWS),
    (70, 600, 1, 1),
    *SPLIT_SHAPES,
    (2, 9, 1, 1),
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
    (2, 0, 3, 4),
]


def inputs(seed, shape, dtype):
    source = Source(seed, dtype)
    offset, spread = source.normal(shape[1], 1, 1), source.uniform(0.25, 4, shape[1], 1, 1)
    return {"x": source.normal(*shape) * spread + offset}


def ours(x):
    return engines.implementation("bn_stats", engines.wish())(x)


def eager(x):
    y = x.float() if x.dtype in HALF else x
    count = x.size(0) * x.size(2) * x.size(3)
    mean = y.mean((0, 2, 3))
    return mean, y.var((0, 2, 3), correction=0) * count if y.numel() else torch.zeros_like(mean)


@over_backends("bn_stats", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    verify(backend, ours, eager, lambda s: of_tensors(LAYOUTS[layout], inputs(s, shape, dtype)))


@over_backends("bn_stats")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, backend):
    verify(
        backend,
        ours,
        eager,
        lambda s: of_tensors(LAYOUTS[layout], inputs(s, (2, 17, 5, 6), dtype)),
    )


@over_backends("bn_stats")
@over_layouts
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_mean_far_from_zero_costs_no_digits(ratio, layout, backend):
    """What E[x^2] - E[x]^2 would lose."""

    def far(seed):
        source = Source(seed, torch.float32)
        return {"x": LAYOUTS[layout](source.normal(3, 20, 31, 33) + ratio)}

    verify(backend, ours, eager, far)


@over_backends("bn_stats")
@over_dtypes
@over_layouts
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_channel(value, layout, dtype, backend):
    def spoilt(seed):
        x = inputs(seed, (3, 20, 5, 6), dtype)["x"]
        x[1, 3, 2, 1] = value
        return {"x": LAYOUTS[layout](x)}

    verify(backend, ours, eager, spoilt)


@over_raw_backends("bn_stats")
@over_dtypes
@over_layouts
def test_equal_values_deviate_by_nothing(layout, dtype, backend):
    """In many channels, since joining parts of one only sometimes rounds their mean away."""
    values = backend.move(torch.linspace(0.1, 1, 20, dtype=torch.float64).to(dtype))
    x = LAYOUTS[layout](values.view(1, -1, 1, 1).expand(3, -1, 31, 33))
    mean, m2 = engines.implementation("bn_stats", backend.engine)(x)
    assert_identical(m2, torch.zeros_like(m2))
    assert_identical(mean, values.to(mean.dtype))


@over_layouts
def test_opcheck(layout):
    torch.library.opcheck(OP, (LAYOUTS[layout](inputs(0, (2, 5, 3, 4), torch.float32)["x"]),))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layout, seed):
    x = LAYOUTS[layout](inputs(seed, shape, dtype)["x"])
    mean, m2 = result = OP(x)
    assert_identical(at_threads(1, OP, x), result, "one thread and two")
    exact, pixels = x.double(), (0, 2, 3)
    truth = exact.mean(pixels)
    deviations = (exact - truth.view(-1, 1, 1)).square()
    steps = 8 + x[:, 0].numel()
    within_rounding(mean, truth, exact.abs().mean(pixels), steps)
    within_rounding(m2, deviations.sum(pixels), deviations.sum(pixels), steps + 4)
    for output, fake in zip(result, OP(shadow(x)), strict=True):
        assert placed(output) == placed(fake)
