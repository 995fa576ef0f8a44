"""The stem in training: bn_act_maxpool that remembers where its maxima were."""

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    assert_identical,
    at_threads,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    over_raw,
    per_channel,
    placed,
    shadow,
    torch_act,
    verify,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bn_act_maxpool import CASES, inputs, pairs, scale_shift
from torch.nn import functional as F

from fused_resnet import engines

OP = torch.ops.fused_resnet.bn_act_maxpool_train.default
WITHOUT = torch.ops.fused_resnet.bn_act_maxpool.default


def geometry(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    pair = [[n, n] if isinstance(n, int) else list(n) for n in (kernel_size, padding, dilation)]
    steps = [stride, stride] if isinstance(stride, int) else list(stride or pair[0])
    return pair[0], steps, pair[1], pair[2], ceil_mode


def made(seed, shape, dtype):
    given = inputs(seed, shape, dtype)
    scale, shift = scale_shift(**given["bn"])
    return {"x": given["x"], "scale": scale, "shift": shift}


def ours(pooling, act, **tensors):
    implementation = engines.implementation("bn_act_maxpool_train", engines.wish())
    return implementation(*tensors.values(), *geometry(**pooling), act)


def eager(pooling, act, x, scale, shift):
    """torch's maxima and places; of half types before they are rounded, when fewer are equal."""
    wide = x.float() if x.dtype in HALF else x
    y = torch_act(wide * per_channel(scale) + per_channel(shift), act)
    out, place = F.max_pool2d(y, **pooling, return_indices=True)
    kernel, stride, padding, dilation, _ = geometry(**pooling)
    rows, columns = (torch.arange(out.size(d), device=x.device) for d in (2, 3))
    h = place // x.size(3) - (rows * stride[0] - padding[0]).view(-1, 1)
    w = place % x.size(3) - (columns * stride[1] - padding[1])
    argmax = h // dilation[0] * kernel[1] + w // dilation[1]
    layout = F.max_pool2d(x.float(), **pooling)
    return (
        torch.empty_like(layout, dtype=x.dtype).copy_(out),
        torch.empty_like(layout, dtype=torch.uint8).copy_(argmax),
    )


def check(backend, pooling, make, act="relu"):
    def first(f):
        return lambda **t: f(pooling, act, **t)[0]

    verify(backend, first(ours), first(eager), make)
    for seed in range(3):
        given = backend.move(make(seed))
        implementation = engines.implementation("bn_act_maxpool_train", backend.engine)
        out, argmax = implementation(*given.values(), *geometry(**pooling), act)
        expected = eager(pooling, act, **given)[1]
        assert placed(argmax) == placed(expected)
        # Where relu made a window's values equal, all of them have the gradient zero.
        assert torch.equal(argmax.where(out > 0, expected), expected)


@over_backends("bn_act_maxpool_train", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize(("shape", "pooling"), CASES, ids=str)
def test_cases(shape, pooling, layout, dtype, backend):
    check(backend, pooling, lambda seed: of_tensors(LAYOUTS[layout], made(seed, shape, dtype)))


@over_backends("bn_act_maxpool_train")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, backend):
    pooling = {"kernel_size": 3, "stride": 2, "padding": 1}
    check(backend, pooling, lambda s: of_tensors(LAYOUTS[layout], made(s, (2, 17, 9, 8), dtype)))


@over_backends("bn_act_maxpool_train")
@over_layouts
def test_ties_and_nan(layout, backend):
    """The first of equals, the last NaN, the first position where nothing is above -Inf."""
    x = torch.randint(0, 3, (2, 20, 9, 8)).float()
    x[0, 0, 2:5, 3:6] = torch.nan
    x[0, 1] = -torch.inf
    x[0, 2, 4, 4] = torch.inf
    x[1, 3] = torch.nan
    pooling = {"kernel_size": 3, "stride": 2, "padding": 1}
    given = {"x": LAYOUTS[layout](x), "scale": torch.ones(20), "shift": torch.zeros(20)}
    given = backend.move(given)
    implementation = engines.implementation("bn_act_maxpool_train", backend.engine)
    out, argmax = implementation(*given.values(), *geometry(**pooling), "none")
    expected = eager(pooling, "none", **given)
    assert torch.equal(argmax, expected[1])
    assert torch.equal(out.nan_to_num(7), expected[0].nan_to_num(7))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(2, 5, 3), "x must have 4 dimensions"),
        (3, [16, 16], "kernel_size must have at most 255 positions"),
        (3, [2**32, 2**32], "kernel_size must have at most 255 positions"),
        (3, [3, 3, 3], "kernel_size must be two integers"),
        (4, [0, 1], "stride must be two integers of at least 1"),
        (5, [2, 2], "padding must be at most half"),
        (6, [9, 9], "kernel_size .* is larger than the padded input"),
    ],
)
@over_raw("bn_act_maxpool_train")
def test_bad_input(raw, place, value, words):
    args = [*made(0, (2, 5, 7, 6), torch.float32).values(), *geometry(3, 2, 1), "relu"]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"bn_act_maxpool_train: {words}"):
        raw(*args)


@over_layouts
def test_opcheck(layout):
    tensors = of_tensors(LAYOUTS[layout], made(0, (2, 5, 8, 7), torch.float32))
    torch.library.opcheck(OP, (*tensors.values(), *geometry(3, 2, 1), "relu"))


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
    layout=st.sampled_from(sorted(LAYOUTS)),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(outer, size, kernel, stride, padding, dilation, ceil_mode, dtype, layout, act, seed):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= reach for n, p, reach in zip(size, padding, span, strict=True)))
    tensors = of_tensors(LAYOUTS[layout], made(seed, (*outer, *size), dtype))
    args = (*tensors.values(), *map(list, (kernel, stride, padding, dilation)), ceil_mode, act)
    out, argmax = result = OP(*args)
    assert_identical(at_threads(1, OP, *args), result, "one thread and two")
    assert torch.equal(out, WITHOUT(*args))
    pooling = dict(
        zip(("kernel_size", "stride", "padding", "dilation"), args[3:7], strict=True),
        ceil_mode=ceil_mode,
    )
    expected = eager(pooling, act, **tensors)[1]
    assert torch.equal(argmax.where(out > 0, expected), expected)
    for output, fake in zip(result, OP(*shadow(args)), strict=True):
        assert placed(output) == placed(fake)
