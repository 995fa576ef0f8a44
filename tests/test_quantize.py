"""quantize: float32 to bytes."""

import pytest
import torch
from cases import (
    LAYOUTS,
    TILE,
    Source,
    around,
    assert_identical,
    at_threads,
    over_backends,
    over_layouts,
    placed,
    shadow,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import UNIT

from fused_resnet import engines, reference_int8

OP = torch.ops.fused_resnet.quantize.default
SHAPES = [
    *((1, n, 1, 1) for n in around(16)),
    (2, 5, 3, 7),
    (1, 3, 1, TILE["kQuantizeGrain"][0]),
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (7,),
    (),
]


def made(seed, shape):
    return Source(seed, torch.float32).normal(*shape) * 40


def check(result, x, scale, zero):
    """A byte is off by half a step at most, but for what lies outside of them all."""
    exact = (x.double() / scale + zero).clamp(0, 255)
    assert result.dtype == torch.uint8
    assert ((result.double() - exact).abs() <= 0.5 + 3 * UNIT[torch.float32] * exact.abs()).all()


@over_backends("quantize", isa=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scale", "zero"), [(0.37, 0), (1.0, 128), (3.1e-3, 17), (1e30, 255)])
def test_shapes(shape, scale, zero, backend):
    x = made(0, shape)
    quantize = engines.implementation("quantize", backend.engine)
    result = quantize(backend.move(x), scale, zero).cpu()
    check(result, x, scale, zero)
    assert_identical(result, reference_int8.quantize(x, scale, zero))
    if backend == ("cpu", "native"):
        assert_identical(at_threads(1, quantize, x, scale, zero), result, "one thread and two")


@over_backends("quantize", isa=True)
def test_rounding(backend):
    """Halves go to even numbers, what is beyond the bytes to their ends, NaN to the least."""
    x = torch.tensor([0.5, 1.5, 2.5, 254.5, 255.5, 1e30, torch.inf, -0.5, -torch.inf, torch.nan])
    quantize = engines.implementation("quantize", backend.engine)
    assert quantize(backend.move(x), 1.0, 0).tolist() == [0, 2, 2, 254, 255, 255, 255, 0, 0, 0]
    assert quantize(backend.move(x), 1.0, 2).tolist() == [2, 4, 4, 255, 255, 255, 255, 2, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout](made(1, (2, 5, 4, 6)))
    result = OP(x, 0.5, 30)
    assert_identical(result, reference_int8.quantize(x, 0.5, 30))
    assert placed(OP(shadow(x), 0.5, 30)) == placed(result)


@over_layouts
def test_opcheck(layout):
    torch.library.opcheck(OP, (LAYOUTS[layout](made(0, (2, 5, 3, 7))), 0.1, 3))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    n=st.integers(0, 70),
    scale=st.floats(1e-3, 1e3),
    zero=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_fuzz(n, scale, zero, seed):
    x = made(seed, (n,))
    check(OP(x, scale, zero), x, scale, zero)
    assert_identical(OP(x, scale, zero), reference_int8.quantize(x, scale, zero))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.ones(2).double(), 1.0, 0), "x must be float32, got float64"),
        ((torch.ones(2), 0.0, 0), "scale must be positive, got 0"),
        ((torch.ones(2), torch.nan, 0), "scale must be positive, got -?nan"),
        ((torch.ones(2), 1.0, 256), "zero must be from 0 to 255, got 256"),
        ((torch.ones(2), 1.0, -1), "zero must be from 0 to 255, got -1"),
    ],
)
def test_bad_input(args, words):
    with pytest.raises(RuntimeError, match=f"quantize: {words}"):
        OP(*args)
