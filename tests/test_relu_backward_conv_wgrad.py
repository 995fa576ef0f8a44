"""What the last ReLU of a chain lets through of a gradient, and the weight's gradient for it."""

import pytest
import torch
from cases import LAYOUTS, Source, channels_last, of_tensors, over_backends, over_dtypes, verify
from conv_cases import Conv, pointwise
from test_chain_ops import NOT_FINITE, vectors

from fused_resnet import engines, reference_chain

OP = "relu_backward_conv_wgrad"
#: A tile and less, several ranges of pixels, several tiles that read the same gradient; then the
#: like by whole vectors, and nothing.
CASES = [
    pointwise(7, (5, 9)),
    pointwise(300, (17, 20)),
    pointwise(20, (70, 130)),
    pointwise(600, (8, 16)),
    pointwise(40, (72, 136)),
    Conv(0, (5, 9), (1, 7), (1, 1), padding=(0, 0)),
]


def given(case, source, whole):
    """``whole``: of normalised values about a centre."""
    grad, out = (source.normal(case.batch, case.channels[1], *case.size) for _ in range(2))
    x = source.normal(case.batch, case.channels[0], *case.size)
    prologue = [None, None, None, "none"]
    if whole:
        prologue = [*vectors(source, case.channels[0], "gamma", "beta", "mean"), "relu"]
    return [grad, torch.relu(out), x, *prologue]


def check(backend, make):
    def ours(args):
        return engines.implementation(OP, engines.wish())(*args)

    def eager(args):
        return reference_chain.relu_backward_conv_wgrad(*args)

    verify(backend, ours, eager, lambda seed: {"args": make(seed)})


@over_backends(OP)
@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_cases(whole, case, dtype, backend):
    check(backend, lambda s: of_tensors(channels_last, given(case, Source(s, dtype), whole)))


@over_backends(OP)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "negative"])
def test_layouts(layout, backend):
    made = LAYOUTS[layout]
    check(backend, lambda s: of_tensors(made, given(CASES[1], Source(s, torch.float32), True)))


@over_backends(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("at", range(6))
def test_what_is_not_finite_comes_out(at, dtype, backend):
    def make(seed):
        made = given(CASES[3], Source(seed, dtype), True)
        made[at].view(-1)[made[at].numel() // 2] = NOT_FINITE[seed]
        return of_tensors(channels_last, made)

    check(backend, make)


@over_backends(OP)
def test_nan_stays_out_where_relu_is_flat(backend):
    grad, out, *rest = of_tensors(channels_last, given(CASES[1], Source(0, torch.float32), True))
    grad[out == 0] = torch.nan
    args = backend.move([grad, out, *rest])
    assert all(t.isfinite().all() for t in engines.implementation(OP, backend.engine)(*args))


@over_backends(OP)
@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (1, torch.ones(1, 20, 1, 299), "out must have shape"),
        (2, torch.ones(1, 17, 1, 299), "grad must have shape"),
        (3, None, "scale and shift must be given together"),
        (5, torch.ones(16), "center must have shape"),
        (6, "gelu", 'act must be "none" or "relu"'),
    ],
)
def test_bad_input(at, value, words, backend):
    if backend.engine == "reference":
        return
    args = given(CASES[1], Source(0, torch.float32), True)
    args[at] = value
    with pytest.raises(RuntimeError, match=f"{OP}: {words}"):
        engines.implementation(OP, backend.engine)(*backend.move(args))
