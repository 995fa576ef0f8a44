"""gram_stats: the statistics of a product from those of its input."""

import pytest
import torch
from cases import (
    LAYOUTS,
    Source,
    around,
    copied,
    of_tensors,
    over_backends,
    over_dtypes,
    over_raw,
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines
from fused_resnet.engines import DTYPES
from fused_resnet.reference import accumulation_dtype

OP = torch.ops.fused_resnet.gram_stats.default
COUNT = 50.0


def inputs(seed, rows, channels, dtype):
    source = Source(seed, torch.float64)
    weight = source.normal(rows, channels).to(dtype)
    wide = accumulation_dtype(dtype)
    z = source.normal(int(COUNT), channels)
    covariance = (z - z.mean(0)).T @ (z - z.mean(0))
    return {
        "weight": weight,
        "product": (weight.double() @ covariance).to(wide),
        "sum": z.sum(0),
        "center": source.normal(channels).to(wide),
    }


def ours(weight, product, sum, center):
    return engines.implementation("gram_stats", engines.wish())(
        weight, product, sum.double(), center, COUNT
    )


def eager(weight, product, sum, center):
    w = weight.to(center.dtype)
    about = w @ (sum.to(center.dtype) / COUNT)
    return about + w @ center, about, (w * product).sum(1)


@over_backends("gram_stats", isa=True)
@over_dtypes
@pytest.mark.parametrize("channels", [0, *around(8, 16), 300])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_sizes(rows, channels, dtype, backend):
    verify(backend, ours, eager, lambda seed: inputs(seed, rows, channels, dtype))


@over_backends("gram_stats")
@over_dtypes
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "negative", "transposed"])
def test_layouts(layout, dtype, backend):
    verify(
        backend, ours, eager, lambda seed: of_tensors(LAYOUTS[layout], inputs(seed, 7, 11, dtype))
    )


@over_backends("gram_stats")
def test_squares_are_not_negative(backend):
    """Whose rounding alone would be, and what is not a number is not hidden."""
    op = engines.implementation("gram_stats", backend.engine)
    product = torch.tensor([[-1e-9, 0.0], [torch.nan, 0.0]], device=backend.device)
    weight, center = torch.ones_like(product), torch.zeros_like(product[0])
    mean, about, m2 = op(weight, product, center.double(), center, COUNT)
    assert m2[0] == 0
    assert m2[1].isnan()
    assert (mean == 0).all()
    assert (about == 0).all()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(3), "weight must have 2 dimensions"),
        (0, torch.ones(2, 3).int(), "weight must be float32"),
        (1, torch.ones(2, 3).half(), "product must be float32, got float16"),
        (1, torch.ones(3, 3), r"product must have shape \[2, 3\], got \[3, 3\]"),
        (2, torch.ones(3), "sum must be float64, got float32"),
        (3, torch.ones(2), r"center must have shape \[3\], got \[2\]"),
    ],
)
@over_raw("gram_stats")
def test_bad_input(raw, place, value, words):
    args = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(3).double(), torch.ones(3), COUNT]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"gram_stats: {words}"):
        raw(*args)


@over_dtypes
def test_opcheck(dtype):
    torch.library.opcheck(OP, (*inputs(0, 5, 7, dtype).values(), COUNT))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 70)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    count=st.floats(0.5, 1e6),
    seed=st.integers(0, 9),
)
def test_fuzz(sizes, dtype, layout, count, seed):
    args = tuple(of_tensors(LAYOUTS[layout], inputs(seed, *sizes, dtype)).values())
    mean, about, m2 = OP(*copied(args), count)
    weight, product, total, center = (t.double() for t in args)
    steps = 4 + sizes[1]
    near = weight @ total / count
    larger = weight.abs() @ total.abs() / count
    within_rounding(about, near, larger, steps)
    more = larger + weight.abs() @ center.abs()
    within_rounding(mean, near + weight @ center, more, steps)
    squares = (weight * product).sum(1).clamp_min(0)
    within_rounding(m2, squares, (weight * product).abs().sum(1), steps)
    for result, fake in zip((mean, about, m2), OP(*shadow(args), count), strict=True):
        assert placed(result) == placed(fake)
