"""bn_scale_shift: ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``."""

import pytest
import torch
from cases import (
    DTYPES,
    EPS,
    HALF,
    LAYOUTS,
    Source,
    around,
    of_tensors,
    over_backends,
    over_dtypes,
    placed,
    shadow,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import functional
from fused_resnet.reference import accumulation_dtype

OP = torch.ops.fused_resnet.bn_scale_shift.default


def inputs(seed, channels, dtype, weight=True, bias=True):
    """All of one dtype, as a module has them."""
    made = of_tensors(lambda t: t.to(dtype), Source(seed, dtype).batch_norm(channels))
    return {
        **made,
        "gamma": made["gamma"] if weight else None,
        "beta": made["beta"] if bias else None,
    }


def ours(mean, var, gamma, beta):
    return torch.stack(functional.bn_scale_shift(mean, var, gamma, beta, EPS))


def eager(mean, var, gamma, beta):
    vectors = (mean, var, gamma, beta)
    if mean.dtype in HALF:
        vectors = of_tensors(torch.Tensor.float, vectors)
    mean, var, gamma, beta = vectors
    scale = torch.rsqrt(var + EPS)
    scale = scale if gamma is None else gamma * scale
    shift = -mean * scale
    return torch.stack([scale, shift if beta is None else beta + shift])


@over_backends("bn_scale_shift", isa=True)
@over_dtypes
@pytest.mark.parametrize("channels", [0, *around(8, 16)])
def test_sizes(channels, dtype, backend):
    verify(backend, ours, eager, lambda seed: inputs(seed, channels, dtype))


@over_backends("bn_scale_shift")
@over_dtypes
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "negative", "expanded"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
def test_affine_and_layouts(weight, bias, layout, dtype, backend):
    def laid_out(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, 11, dtype, weight, bias))

    verify(backend, ours, eager, laid_out)


@over_backends("bn_scale_shift")
def test_dtypes_promote(backend):
    def mixed(seed):
        made = inputs(seed, 7, torch.float16)
        return {**made, "mean": made["mean"].float()}

    verify(backend, ours, eager, mixed)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, affine):
    torch.library.opcheck(OP, (*inputs(0, 5, dtype, affine, affine).values(), EPS))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    channels=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    affine=st.tuples(st.booleans(), st.booleans()),
    eps=st.floats(1e-12, 1.0),
    seed=st.integers(0, 9),
)
def test_fuzz(channels, dtype, layouts, affine, eps, seed):
    made = inputs(seed, channels, dtype, *affine)
    args = tuple(
        of_tensors(LAYOUTS[layout], t) for t, layout in zip(made.values(), layouts, strict=True)
    )
    results = OP(*args, eps)
    mean, var, gamma, beta = of_tensors(torch.Tensor.double, args)
    scale = (1 if gamma is None else gamma) / torch.sqrt(var + eps)
    shift = (0 if beta is None else beta) - mean * scale
    larger = (0 if beta is None else beta.abs()) + (mean * scale).abs()
    within_rounding(results[0], scale, scale.abs(), 4)
    within_rounding(results[1], shift, larger, 6)
    for result, fake in zip(results, OP(*shadow(args), eps), strict=True):
        assert placed(result) == placed(fake)
        assert result.dtype == accumulation_dtype(dtype)
