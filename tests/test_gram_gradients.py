"""gram_gradients: the gradient behind statistics of a product, short of matrix products."""

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

OP = torch.ops.fused_resnet.gram_gradients.default
COUNT = 50.0


def inputs(seed, rows, channels, dtype, with_sums=False):
    source, wide = Source(seed, torch.float64), accumulation_dtype(dtype)
    vectors = {name: source.normal(rows).to(wide) for name in ("scale", "mean", "sum_g", "sum_gx")}
    return {
        "weight": source.normal(rows, channels).to(dtype),
        "s": source.normal(rows, channels).to(wide),
        "scale": vectors["scale"],
        "mean": vectors["mean"],
        "invstd": source.uniform(0.5, 2, rows).to(wide),
        "sum_g": vectors["sum_g"],
        "sum_gx": vectors["sum_gx"] if with_sums else None,
    }


def ours(**given):
    return engines.implementation("gram_gradients", engines.wish())(*given.values(), COUNT)


def eager(weight, s, scale, mean, invstd, sum_g, sum_gx):
    w = weight.to(scale.dtype)
    given = sum_gx is not None
    sum_gx = sum_gx.clone() if given else invstd * ((w * s).sum(1) - mean * sum_g)
    b = -scale * invstd * sum_gx / COUNT
    c = -scale * sum_g / COUNT - b * mean
    slopes = torch.cat([b[:, None] * w, c[:, None]], 1)
    results = (sum_gx, scale[:, None] * s, slopes, (scale[:, None] * w).to(weight.dtype))
    return [t.contiguous() for t in results]


@over_backends("gram_gradients", isa=True)
@over_dtypes
@pytest.mark.parametrize("channels", [0, *around(8, 16), 300])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_sizes(rows, channels, dtype, backend):
    verify(backend, ours, eager, lambda seed: inputs(seed, rows, channels, dtype))


@over_backends("gram_gradients")
@over_dtypes
@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "negative", "transposed"])
def test_layouts_and_sums(layout, with_sums, dtype, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, 7, 11, dtype, with_sums))

    verify(backend, ours, eager, make)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(3), "weight must have 2 dimensions"),
        (1, torch.ones(2, 3).half(), "s must be float32, got float16"),
        (1, torch.ones(3, 3), r"s must have shape \[2, 3\], got \[3, 3\]"),
        (2, torch.ones(3), r"scale must have shape \[2\], got \[3\]"),
        (5, torch.ones(2).double(), "sum_g must be float32, got float64"),
        (6, torch.ones(3), r"sum_gx must have shape \[2\], got \[3\]"),
        (7, 0.0, "count must be more than 0, got 0"),
    ],
)
@over_raw("gram_gradients")
def test_bad_input(raw, place, value, words):
    args = [torch.ones(2, 3), torch.ones(2, 3), *(torch.ones(2) for _ in range(5)), COUNT]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"gram_gradients: {words}"):
        raw(*args)


@over_dtypes
def test_opcheck(dtype):
    torch.library.opcheck(OP, (*inputs(0, 5, 7, dtype).values(), COUNT))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 70)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    with_sums=st.booleans(),
    count=st.floats(0.5, 1e6),
    seed=st.integers(0, 9),
)
def test_fuzz(sizes, dtype, layout, with_sums, count, seed):
    args = tuple(of_tensors(LAYOUTS[layout], inputs(seed, *sizes, dtype, with_sums)).values())
    results = dgamma, scaled_s, slopes, scaled_weight = OP(*copied(args), count)
    weight, s, scale, mean, invstd, sum_g, sum_gx = of_tensors(torch.Tensor.double, args)
    steps = 8 + sizes[1]
    if sum_gx is None:
        sum_gx = invstd * ((weight * s).sum(1) - mean * sum_g)
        larger = invstd * ((weight * s).abs().sum(1) + (mean * sum_g).abs())
    else:
        larger = sum_gx.abs()
    within_rounding(dgamma, sum_gx, larger, steps)
    b, most = -scale * invstd * sum_gx / count, scale.abs() * invstd * larger / count
    c = -scale * sum_g / count - b * mean
    within_rounding(slopes[:, :-1], b[:, None] * weight, most[:, None] * weight.abs(), steps)
    more = (scale * sum_g).abs() / count + most * mean.abs()
    within_rounding(slopes[:, -1], c, more, steps)
    within_rounding(scaled_s, scale[:, None] * s, (scale[:, None] * s).abs(), 2)
    exact = scale[:, None] * weight
    within_rounding(scaled_weight, exact, exact.abs(), 2)
    for result, fake in zip(results, OP(*shadow(args), count), strict=True):
        assert placed(result) == placed(fake)
