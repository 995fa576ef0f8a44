"""bn_finalize: batch statistics to scale, shift and invstd, and into the running statistics."""

import pytest
import torch
from cases import (
    DTYPES,
    EPS,
    Source,
    around,
    assert_identical,
    backends,
    copied,
    misaligned,
    negative,
    of_tensors,
    over_backends,
    over_dtypes,
    over_raw,
    placed,
    shadow,
    sliced,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import judge, within_rounding
from torch.nn import functional as F

from fused_resnet import engines, use_engine

OP = torch.ops.fused_resnet.bn_finalize.default
SHAPE = (3, 4, 5)  # of the batch the statistics are of, without its channels


def inputs(seed, channels, dtype):
    """Of activations of ``dtype``, whose statistics are in float32 where it is a half type."""
    source = Source(seed, dtype)
    x = source.normal(SHAPE[0], channels, *SHAPE[1:]) + source.normal(channels, 1, 1)
    return x, source.batch_norm(channels)


def arguments(x, bn, running_dtype=None, momentum=0.1):
    mean, m2 = torch.ops.fused_resnet.bn_stats(x)
    running = [bn[name].to(running_dtype or mean.dtype) for name in ("mean", "var")]
    count = float(x.numel() // x.size(1))
    return (mean, m2, count, bn["gamma"], bn["beta"], *running, momentum, EPS)


def run(backend, args):
    """The outputs, and the running statistics as they are afterwards; on the CPU."""
    args = backend.move(copied(args))
    with use_engine(backend.engine):
        outputs = engines.implementation("bn_finalize", engines.wish())(*args)
    return of_tensors(torch.Tensor.cpu, [*outputs, *args[5:7]])


def eager(x, bn, momentum):
    """What torch's BatchNorm keeps of the same batch."""
    running = [bn["mean"].clone(), bn["var"].clone()]
    _, mean, invstd = torch.native_batch_norm(
        x, bn["gamma"], bn["beta"], *running, True, momentum, EPS
    )
    scale = bn["gamma"] * invstd
    return [scale, bn["beta"] - mean * scale, invstd, *running]


@over_backends("bn_finalize", isa=True)
@over_dtypes
@pytest.mark.parametrize("channels", around(8, 16))
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_against_torch(momentum, channels, dtype, backend):
    results = []
    for seed in range(3):
        x, bn = inputs(seed, channels, dtype)
        args = arguments(x, bn, momentum=momentum)
        ours = run(backend, args)
        assert_identical(run(backend, args), ours, "two runs")
        exact = eager(x.double(), of_tensors(torch.Tensor.double, bn), momentum)
        results.append(list(zip(ours, eager(x, bn, momentum), exact, strict=True)))
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


@over_backends("bn_finalize")
@over_dtypes
def test_running_statistics_of_any_dtype(dtype, backend):
    """As after module.half(), or of float32 activations with float64 statistics."""
    x, bn = inputs(0, 9, torch.float32)
    args = arguments(x, bn, dtype)
    *_, mean, var = run(backend, args)
    for got, before, value in (
        (mean, args[5], args[0]),
        (var, args[6], args[1].double() / (args[2] - 1)),
    ):
        before, value = before.double(), value.double()
        truth = 0.9 * before + 0.1 * value
        within_rounding(got, truth, 0.9 * before.abs() + 0.1 * value.abs(), 4)


@over_backends("bn_finalize")
@over_dtypes
def test_parameters_of_any_dtype(dtype, backend):
    x, bn = inputs(0, 9, torch.float32)
    args = list(arguments(x, bn))
    args[3], args[4] = args[3].to(dtype), args[4].to(dtype)
    expected = [t.float() if isinstance(t, torch.Tensor) else t for t in args]
    assert_identical(run(backend, args), run(backend, expected))


@over_backends("bn_finalize")
@pytest.mark.parametrize("layout", [sliced, misaligned, negative])
def test_layouts(layout, backend):
    args = arguments(*inputs(0, 9, torch.float32))
    # What is changed must be in memory as it is: torch hands no op a negated tensor to change.
    changed = () if layout is negative else (5, 6)
    for i in (0, 1, 3, 4, *changed):
        given, expected = backend.move(copied(args)), backend.move(copied(args))
        given = [layout(t) if i == j else t for j, t in enumerate(given)]
        implementation = engines.implementation("bn_finalize", backend.engine)
        assert_identical(implementation(*given), implementation(*expected))
        assert torch.equal(given[5], expected[5])
        assert torch.equal(given[6], expected[6])


@over_backends("bn_finalize")
@pytest.mark.parametrize("left_out", [(3,), (4,), (3, 4), (5, 6)], ids=str)
def test_without(left_out, backend):
    args = list(arguments(*inputs(0, 9, torch.float32)))
    plain = list(args)
    for i in left_out:
        args[i] = None
        plain[i] = torch.ones(9) if i == 3 else torch.zeros(9)
    assert_identical(run(backend, args)[:3], run(backend, plain)[:3])


@pytest.mark.parametrize("backend", backends("bn_finalize"))
def test_few_values(backend):
    """Of one value the unbiased variance is 0 / 0; of none nothing is known."""
    one = run(backend, (torch.ones(3), torch.zeros(3), 1.0, None, None,
                        torch.zeros(3), torch.ones(3), 0.1, EPS))  # fmt: skip
    assert one[4].isnan().all()
    torch.testing.assert_close(one[3], torch.full((3,), 0.1))
    none = run(backend, (torch.full((3,), torch.nan), torch.zeros(3), 0.0, None, None,
                         torch.zeros(3), torch.ones(3), 0.1, EPS))  # fmt: skip
    assert_identical(none[3:], [torch.zeros(3), torch.ones(3)])
    two = run(backend, (*torch.ops.fused_resnet.bn_stats(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)),
                        2.0, None, None, torch.zeros(1), torch.ones(1), 1.0, EPS))  # fmt: skip
    assert two[4].item() == 2


def test_output_of_a_rounded_scale_is_centred():
    """Where the mean is large, rounding the scale alone would move the output."""
    x = torch.randn(4, 6, 9, 9) + 1e4
    args = arguments(x, {name: torch.ones(6) for name in ("mean", "var", "gamma")} | {
        "beta": torch.zeros(6)})  # fmt: skip
    scale, shift, _ = OP(*args)
    y = torch.ops.fused_resnet.bn_act(x, scale, shift, None, "none")
    exact = F.batch_norm(x.double(), None, None, training=True)
    theirs = F.batch_norm(x, None, None, training=True)
    judge([y], [theirs], [exact])


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.ones(3, 1), "mean must have 1 dimensions"),
        (0, torch.ones(3).half(), "mean must be float32 or float64"),
        (1, torch.ones(4), r"m2 must have shape \[3\], got \[4\]"),
        (2, -1.0, "count must be at least 0"),
        (3, torch.ones(2), r"weight must have shape \[3\], got \[2\]"),
        (4, torch.ones(3, dtype=torch.int32), "bias must be float32"),
        (5, None, "given together"),
        (6, torch.ones(3).half(), "running_var must be float32"),
    ],
)
@over_raw("bn_finalize")
def test_bad_input(raw, place, value, words):
    args = [torch.ones(3), torch.ones(3), 5.0, torch.ones(3), torch.ones(3), torch.ones(3),
            torch.ones(3), 0.1, EPS]  # fmt: skip
    args[place] = value
    with pytest.raises(RuntimeError, match=f"bn_finalize: .*{words}"):
        raw(*args)


@pytest.mark.parametrize("running", [True, False])
def test_opcheck(running):
    args = list(arguments(*inputs(0, 5, torch.float32)))
    if not running:
        args[5] = args[6] = None
    torch.library.opcheck(OP, tuple(args))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    channels=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    running_dtype=st.sampled_from(DTYPES),
    count=st.integers(2, 10**7),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_fuzz(channels, dtype, running_dtype, count, momentum, seed):
    source = Source(seed, dtype)
    mean, var, gamma, beta = source.batch_norm(channels).values()
    running = [source.normal(channels).to(running_dtype) for _ in range(2)]
    before = [t.double().clone() for t in running]
    m2 = var * count
    args = (mean, m2, float(count), gamma, beta, *running, momentum, EPS)
    for output, fake in zip(outputs := OP(*args), OP(*shadow(args)), strict=True):
        assert placed(output) == placed(fake)
    wide = mean.double()
    invstd = (m2.double() / count + EPS).rsqrt()
    scale = gamma.double() * invstd
    shift = beta.double() - wide * scale
    for got, truth, magnitude in (
        (outputs[0], scale, scale.abs()),
        (outputs[1], shift, beta.abs().double() + (wide * scale).abs()),
        (outputs[2], invstd, invstd),
    ):
        within_rounding(got, truth, magnitude, 4)
    values = (wide, m2.double() / (count - 1))
    for got, old, new in zip(running, before, values, strict=True):
        kept, added = (1 - momentum) * old, momentum * new
        within_rounding(got, kept + added, kept.abs() + added.abs(), 4)
