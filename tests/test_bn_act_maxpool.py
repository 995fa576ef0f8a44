"""bn_act_maxpool: ``max_pool2d(act(x * scale + shift))``."""

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    Source,
    around,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    per_channel,
    placed,
    scale_shift,
    shadow,
    torch_act,
    torch_batch_norm,
    verify,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import within_rounding
from torch.nn import functional as F

from fused_resnet import functional

OP = torch.ops.fused_resnet.bn_act_maxpool.default

STEM = {"kernel_size": 3, "stride": 2, "padding": 1}
#: (shape, pooling): channels about a vector's length, then every way a window can lie.
CASES = [
    *(((2, n, 7, 6), STEM) for n in around(8, 16)),
    *(((1, 3, 5, n), STEM) for n in around(8, 16)),
    ((2, 5, 7, 6), {"kernel_size": 2}),
    ((2, 5, 7, 6), {"kernel_size": 2, "ceil_mode": True}),
    ((2, 5, 8, 9), {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True}),
    ((2, 5, 9, 7), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)}),
    ((2, 5, 9, 9), {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": (2, 3)}),
    ((2, 5, 6, 5), {"kernel_size": 3, "stride": 4, "dilation": 2, "ceil_mode": True}),
    ((2, 5, 3, 3), {"kernel_size": 1, "stride": 3}),
    ((2, 5, 4, 4), {"kernel_size": 4, "stride": 1, "padding": 2}),
    ((2, 9, 1, 1), STEM),
    ((1, 1, 1, 1), {"kernel_size": 1}),
    ((3, 1, 4, 5), STEM),
    ((1, 24, 33, 40), STEM),
    ((0, 3, 4, 5), STEM),
]


def inputs(seed, shape, dtype):
    source = Source(seed, dtype)
    return {"x": source.normal(*shape), "bn": source.batch_norm(shape[1])}


def ours(pooling, x, bn, act="relu"):
    return functional.bn_act_maxpool(x, *scale_shift(**bn), **pooling, act=act)


def eager(pooling, x, bn, act="relu"):
    return F.max_pool2d(torch_act(torch_batch_norm(x, **bn), act), **pooling)


def check(backend, pooling, make, act="relu"):
    verify(
        backend,
        lambda **t: ours(pooling, **t, act=act),
        lambda **t: eager(pooling, **t, act=act),
        make,
    )


@over_backends("bn_act_maxpool", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("shape", "pooling"), CASES, ids=str)
def test_cases(shape, pooling, layout, dtype, backend):
    check(backend, pooling, lambda seed: of_tensors(LAYOUTS[layout], inputs(seed, shape, dtype)))


@over_backends("bn_act_maxpool")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, act, dtype, backend):
    def laid_out(seed):
        return of_tensors(LAYOUTS[layout], inputs(seed, (2, 17, 9, 8), dtype))

    check(backend, STEM, laid_out, act)


def raw_arguments(x, bn, kernel, stride, padding, dilation, ceil_mode=False, act="relu"):
    pooling = [list(pair) for pair in (kernel, stride, padding, dilation)]
    return (x, *scale_shift(**bn), *pooling, ceil_mode, act)


@over_layouts
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_opcheck(ceil_mode, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 8, 7), torch.float32))
    torch.library.opcheck(
        OP,
        raw_arguments(
            **made,
            kernel=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
            dilation=(1, 1),
            ceil_mode=ceil_mode,
        ),
    )


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    outer=st.tuples(st.integers(0, 3), st.integers(1, 36)),
    room=pairs(0, 9),
    kernel=pairs(1, 4),
    stride=pairs(1, 4),
    padding=pairs(0, 2),
    dilation=pairs(1, 3),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(outer, room, kernel, stride, padding, dilation, ceil_mode, dtype, layout, act, seed):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(max(1, n - 2 * p + r) for n, p, r in zip(span, padding, room, strict=True))
    assume(all(n + 2 * p >= reach for n, p, reach in zip(size, padding, span, strict=True)))
    made = of_tensors(LAYOUTS[layout], inputs(seed, (*outer, *size), dtype))
    args = raw_arguments(
        **made,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil_mode,
        act=act,
    )
    result = OP(*args)

    def pool(y):
        return F.max_pool2d(y, kernel, stride, padding, dilation, ceil_mode=ceil_mode)

    x, scale, shift = of_tensors(torch.Tensor.double, args[:3])
    exact = x * per_channel(scale) + per_channel(shift)
    magnitude = x.abs() * per_channel(scale.abs()) + per_channel(shift.abs())
    within_rounding(result, pool(torch_act(exact, act)), pool(magnitude), 2)
    fake = OP(*shadow(args))
    assert placed(fake) == placed(result)
    assert placed(result) == placed(pool(torch_batch_norm(made["x"], **made["bn"])))
