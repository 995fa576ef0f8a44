"""global_avg_pool: the mean of each image's channel."""

import pytest
import torch
from cases import (
    DTYPES,
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
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding
from torch.nn import functional as F

from fused_resnet import functional

OP = torch.ops.fused_resnet.global_avg_pool.default
#: Channels about a vector's length, pixels about a block's, and the ends of ResNets.
SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(*TILE["kLeastBlockRows"])),
    (1, 5, 3, TILE["kBlockPixels"][0]),
    (1, 64, 40, 40),
    (2, 72, 7, 7),
    (3, 512, 7, 7),
    (2, 5, 1, 1),
    (1, 1, 1, 1),
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (2, 3, 4, 0),
]


def inputs(seed, shape, dtype):
    return {"x": Source(seed, dtype).normal(*shape) + 0.5}


def eager(x):
    return F.adaptive_avg_pool2d(x, 1)


@over_backends("global_avg_pool", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    verify(
        backend,
        functional.global_avg_pool,
        eager,
        lambda seed: of_tensors(LAYOUTS[layout], inputs(seed, shape, dtype)),
    )


@over_backends("global_avg_pool")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, backend):
    verify(
        backend,
        functional.global_avg_pool,
        eager,
        lambda seed: of_tensors(LAYOUTS[layout], inputs(seed, (2, 16, 9, 8), dtype)),
    )


@over_backends("global_avg_pool")
@over_layouts
def test_nan_and_infinity_stay_in_their_channel(layout, backend):
    def spoilt(seed):
        made = inputs(seed, (2, 16, 7, 7), torch.float32)
        for c, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            made["x"][0, 3 * c, 2, 3] = value
        made["x"][1, 4, 0, :2] = torch.tensor([torch.inf, -torch.inf])
        return of_tensors(LAYOUTS[layout], made)

    verify(backend, functional.global_avg_pool, eager, spoilt)


def test_sums_of_half_types_do_not_overflow():
    x = torch.full((1, 8, 9, 9), 60000.0, dtype=torch.float16)
    assert torch.equal(functional.global_avg_pool(x), x[..., :1, :1])


@over_layouts
def test_gradient_is_torchs(layout):
    x = LAYOUTS[layout](torch.randn(2, 5, 4, 3, dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(functional.global_avg_pool, x)
    torch.autograd.gradgradcheck(functional.global_avg_pool, x)


@over_layouts
def test_opcheck(layout):
    torch.library.opcheck(OP, (LAYOUTS[layout](torch.randn(2, 5, 4, 3)),))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), *[st.integers(1, 24)] * 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layout, seed):
    x = LAYOUTS[layout](inputs(seed, shape, dtype)["x"])
    result = OP(x)
    assert_identical(at_threads(1, OP, x), result, "one thread and two")
    exact = x.double()
    within_rounding(result, eager(exact), eager(exact.abs()), shape[2] * shape[3])
    assert placed(result) == placed(eager(x))
    assert placed(OP(shadow(x))) == placed(result)
