"""batch_norm_act_maxpool and its fused backward against autograd through torch."""

import pytest
import torch
from cases import EPS, assert_identical, over_dtypes, over_layouts, placed, torch_act
from test_autograd import batch, leaves, over_acts, over_engines, small, wide
from tolerances import judge
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fused_resnet
from fused_resnet import functional

SHAPE = (3, 17, 9, 8)
STEM = {"kernel_size": 3, "stride": 2, "padding": 1}
POOLINGS = [
    STEM,
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 3), "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": (2, 1)},
    {"kernel_size": 1},
]


def ours(x, bn, pooling, act):
    vectors = (bn["mean"], bn["var"], bn["gamma"], bn["beta"])
    return functional.batch_norm_act_maxpool(x, *vectors, 0.1, EPS, act, **pooling)


def torchs(x, bn, pooling, act):
    """Of half types rounded once, after pooling: before, more of a window would be equal."""
    vectors = (bn["mean"], bn["var"], bn["gamma"], bn["beta"])
    y = F.batch_norm(x.to(bn["gamma"].dtype), *vectors, True, 0.1, EPS)
    return F.max_pool2d(torch_act(y, act), **pooling).to(x.dtype)


def run(f, given, pooling, act, frozen=()):
    made, wanted = leaves(given, frozen)
    made.pop("residual")
    y = f(**made, pooling=pooling, act=act)
    grad = given["grad"][:, :, : y.size(2), : y.size(3)]
    grads = torch.autograd.grad(y, list(wanted.values()), grad)
    return [y.detach(), made["bn"]["mean"], made["bn"]["var"], *grads]


def compare(dtype, pooling=STEM, act="relu", layout="contiguous", frozen=()):
    results = []
    for seed in range(3):
        given = batch(seed, dtype, False, SHAPE, layout)
        found = run(ours, given, pooling, act, frozen)
        assert_identical(run(ours, given, pooling, act, frozen), found, "two runs")
        theirs = run(torchs, given, pooling, act, frozen)
        for a, b in zip(found, theirs, strict=True):
            assert placed(a) == placed(b)
        exact = run(torchs, wide(given), pooling, act, frozen)
        results.append(list(zip(found, theirs, exact, strict=True)))
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


@over_dtypes
@over_layouts
@over_acts
def test_dtypes(act, layout, dtype):
    compare(dtype, STEM, act, layout)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_poolings(pooling):
    compare(torch.float32, pooling)


@over_engines
def test_engines(engine):
    with fused_resnet.use_engine(engine):
        compare(torch.float32)


@pytest.mark.parametrize("frozen", [("x",), ("gamma",), ("beta",), ("gamma", "beta")], ids=str)
def test_only_what_is_needed(frozen):
    compare(torch.float32, frozen=frozen)


def test_without_gradients_statistics_follow():
    given = batch(0, torch.float32, False, SHAPE)
    results = []
    for f in (ours, torchs):
        bn = {k: v.clone() for k, v in given["bn"].items()}
        results.append([f(given["x"], bn, STEM, "relu"), bn["mean"], bn["var"]])
    torch.testing.assert_close(*results)


@over_acts
def test_gradcheck(act):
    x, weight, bias, _ = small(shape=(2, 3, 5, 4))

    def f(x, weight, bias):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        return functional.batch_norm_act_maxpool(x, mean, var, weight, bias, act=act, **STEM)

    assert gradcheck(f, (x, weight, bias))
    assert gradgradcheck(f, (x, weight, bias))


def test_gradient_penalty():
    given, results = batch(0, torch.float64, False, SHAPE), []
    for f in (ours, torchs):
        made, wanted = leaves(given)
        y = f(made["x"], made["bn"], STEM, "relu")
        (dx,) = torch.autograd.grad(y.square().sum(), wanted["x"], create_graph=True)
        results.append(torch.autograd.grad(dx.norm() + y.sum(), list(wanted.values())))
    torch.testing.assert_close(*results)


def test_functorch():
    given, found = batch(0, torch.float32, False, SHAPE), []
    for f in (ours, torchs):
        bn = {k: v.clone() for k, v in given["bn"].items()}
        found.append(torch.func.grad(lambda x, f=f, b=bn: f(x, b, STEM, "relu").sum())(given["x"]))
    torch.testing.assert_close(*found)


def test_compile():
    given, results = batch(0, torch.float32, False, SHAPE), []
    for f in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        results.append(run(f, given, STEM, "relu"))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite(value):
    given = batch(0, torch.float32, False, SHAPE)
    given["x"][1, 3, 2, 1] = value
    found, theirs = (run(f, given, STEM, "relu") for f in (ours, torchs))
    for a, b in zip(found, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "pooling", "error"),
    [
        ((17, 9, 8), STEM, ValueError),
        ((1, 17, 1, 1), STEM, ValueError),
        ((3, 16, 9, 8), STEM, RuntimeError),
        (SHAPE, {"kernel_size": 3, "padding": 2}, RuntimeError),
        (SHAPE, {"kernel_size": 0}, RuntimeError),
        (SHAPE, {"kernel_size": 20}, RuntimeError),
    ],
    ids=str,
)
def test_bad_input(shape, pooling, error):
    bn = batch(0, torch.float32)["bn"]
    before = {k: v.clone() for k, v in bn.items()}
    with pytest.raises(error):
        ours(torch.randn(shape), bn, pooling, "relu")
    assert_identical(bn, before)


def test_a_window_of_more_than_a_byte_counts():
    x, bn = torch.randn(2, 17, 18, 18), batch(0, torch.float32)["bn"]
    pooling = {"kernel_size": 16, "stride": 1}
    results = [f(x, {k: v.clone() for k, v in bn.items()}, pooling, "relu") for f in (ours, torchs)]
    torch.testing.assert_close(*results)
