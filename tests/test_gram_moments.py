"""gram_moments: the covariance of what bn_act_gram has summed, and its moments as one matrix."""

import pytest
import torch
from cases import (
    LAYOUTS,
    Source,
    around,
    copied,
    of_tensors,
    over_backends,
    over_raw,
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines

OP = torch.ops.fused_resnet.gram_moments.default
COUNT = 50.0
over_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inputs(seed, channels, dtype):
    """Of ``COUNT`` positions, about a center."""
    source = Source(seed, torch.float64)
    rows = source.normal(int(COUNT), channels) + source.normal(channels)
    return {
        "gram": rows.T @ rows,
        "sum": rows.sum(0),
        "center": source.normal(channels).to(dtype),
    }


def ours(gram, sum, center):
    return engines.implementation("gram_moments", engines.wish())(
        gram.double(), sum.double(), center, COUNT
    )


def eager(gram, sum, center):
    gram, sum = gram.to(center.dtype), sum.to(center.dtype)
    covariance = gram - torch.outer(sum, sum) / COUNT
    return covariance.contiguous(), torch.cat([gram, sum[:, None]], 1)


@over_backends("gram_moments", isa=True)
@over_types
@pytest.mark.parametrize("channels", [0, *around(8, 16), 300])
def test_sizes(channels, dtype, backend):
    verify(backend, ours, eager, lambda seed: inputs(seed, channels, dtype))


@over_backends("gram_moments")
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "negative", "transposed"])
def test_layouts(layout, backend):
    verify(
        backend,
        ours,
        eager,
        lambda seed: of_tensors(LAYOUTS[layout], inputs(seed, 11, torch.float32)),
    )


@over_backends("gram_moments")
def test_without_positions_nothing_is_known(backend):
    made = of_tensors(lambda t: t.to(backend.device), inputs(0, 3, torch.float32))
    covariance, moments = engines.implementation("gram_moments", backend.engine)(
        made["gram"] * 0, made["sum"] * 0, made["center"], 0.0
    )
    assert covariance.isnan().all()
    assert (moments == 0).all()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(3, 3), "gram must be float64, got float32"),
        (0, torch.ones(2, 3).double(), r"gram must have shape \[3, 3\], got \[2, 3\]"),
        (1, torch.ones(3), "sum must be float64, got float32"),
        (1, torch.ones(4).double(), r"sum must have shape \[3\], got \[4\]"),
        (2, torch.ones(3).half(), "center must be float32 or float64, got float16"),
        (2, torch.ones(3, 3), "center must have 1 dimensions"),
    ],
)
@over_raw("gram_moments")
def test_bad_input(raw, place, value, words):
    args = [torch.ones(3, 3).double(), torch.ones(3).double(), torch.ones(3), COUNT]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"gram_moments: {words}"):
        raw(*args)


@over_types
def test_opcheck(dtype):
    torch.library.opcheck(OP, (*inputs(0, 5, dtype).values(), COUNT))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    channels=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    count=st.floats(0.5, 1e6),
    seed=st.integers(0, 9),
)
def test_fuzz(channels, dtype, layout, count, seed):
    args = tuple(of_tensors(LAYOUTS[layout], inputs(seed, channels, dtype)).values())
    covariance, moments = OP(*copied(args), count)
    gram, total = args[0], args[1]
    taken = torch.outer(total, total) / count
    within_rounding(covariance, gram - taken, gram.abs() + taken.abs(), 4)
    within_rounding(moments[:, :-1], gram, gram.abs(), 1)
    within_rounding(moments[:, -1], total, total.abs(), 1)
    for result, fake in zip((covariance, moments), OP(*shadow(args), count), strict=True):
        assert placed(result) == placed(fake)
