"""batch_norm_act and its fused backward against autograd through torch."""

import copy

import pytest
import torch
from cases import (
    EPS,
    HALF,
    LAYOUTS,
    Source,
    assert_identical,
    of_tensors,
    over_dtypes,
    over_layouts,
    placed,
    torch_act,
)
from tolerances import judge
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fused_resnet
from fused_resnet import BatchNormAct2d, engines, functional

SHAPE = (3, 17, 5, 6)
over_acts = pytest.mark.parametrize("act", ["none", "relu"])
over_training = pytest.mark.parametrize("training", [True, False], ids=["training", "fixed"])
over_residual = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
over_engines = pytest.mark.parametrize("engine", ["auto", "native", "reference", "vendor"])


def batch(seed, dtype, residual=True, shape=SHAPE, layout="contiguous"):
    source = Source(seed, dtype)
    bn = source.batch_norm(shape[1])
    images = {"x": source.normal(*shape), "residual": source.normal(*shape) if residual else None}
    grad = LAYOUTS[layout](source.normal(*shape))
    return {**of_tensors(LAYOUTS[layout], images), "bn": bn, "grad": grad}


def ours(x, residual, bn, training, act):
    vectors = (bn["mean"], bn["var"], bn["gamma"], bn["beta"])
    return functional.batch_norm_act(x, *vectors, residual, training, 0.1, EPS, act)


def torchs(x, residual, bn, training, act):
    vectors = (bn["mean"], bn["var"], bn["gamma"], bn["beta"])
    y = F.batch_norm(x, *vectors, training, 0.1, EPS)
    return torch_act(y if residual is None else y + residual, act)


def leaves(given, frozen=()):
    """Copies that require grad, but for the running statistics and what is named."""
    bn = {k: v.clone() for k, v in given["bn"].items()}
    made = {"x": given["x"].detach(), "residual": given["residual"], "bn": bn}
    wanted = {"x": made["x"], "gamma": bn["gamma"], "beta": bn["beta"]}
    if given["residual"] is not None:
        wanted["residual"] = given["residual"]
    wanted = {k: v.detach().requires_grad_() for k, v in wanted.items() if k not in frozen}
    for name, leaf in wanted.items():
        (bn if name in bn else made)[name] = leaf
    return made, wanted


def run(f, given, training, act, frozen=()):
    """Output, running statistics and gradients."""
    made, wanted = leaves(given, frozen)
    y = f(**made, training=training, act=act)
    grads = torch.autograd.grad(y, list(wanted.values()), given["grad"]) if wanted else ()
    return [y.detach(), made["bn"]["mean"], made["bn"]["var"], *grads]


def wide(given):
    return of_tensors(torch.Tensor.double, given)


def compare(make, training, act, frozen=()):
    results = []
    for seed in range(3):
        given = make(seed)
        found = run(ours, given, training, act, frozen)
        assert_identical(run(ours, given, training, act, frozen), found, "two runs")
        theirs = run(torchs, given, training, act, frozen)
        exact = run(torchs, wide(given), training, act, frozen)
        for a, b in zip(found, theirs, strict=True):
            assert placed(a) == placed(b)
        results.append(list(zip(found, theirs, exact, strict=True)))
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


@over_dtypes
@over_layouts
@over_acts
@over_training
@over_residual
def test_batch_norm_act(residual, training, act, layout, dtype):
    compare(lambda s: batch(s, dtype, residual, layout=layout), training, act)


@over_engines
@over_training
@over_acts
def test_engines(act, training, engine):
    with fused_resnet.use_engine(engine):
        compare(lambda seed: batch(seed, torch.float32), training, act)


@over_training
@over_acts
@pytest.mark.parametrize(
    "needed", [("x",), ("gamma",), ("beta",), ("residual",), ("x", "gamma"), ("x", "residual")]
)
def test_only_what_is_needed(needed, act, training):
    frozen = {"x", "gamma", "beta", "residual"} - set(needed)
    compare(lambda seed: batch(seed, torch.float32), training, act, frozen)
    if "residual" not in needed:
        compare(lambda seed: batch(seed, torch.float32, False), training, act, frozen)


def saved_by(f):
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(t.dim() == 4 for t in saved)


@pytest.mark.parametrize(
    ("training", "residual", "needed", "images"),
    [
        (True, False, ("x", "gamma", "beta"), 1),  # eager keeps x and the activation
        (True, True, ("x", "gamma", "beta", "residual"), 2),
        (True, True, ("residual",), 1),
        (True, False, ("beta",), 1),
        (False, False, ("x",), 1),
        (False, False, ("gamma",), 1),
        (False, False, ("x", "gamma"), 1),
    ],
)
def test_nothing_is_kept_that_is_not_needed(training, residual, needed, images):
    frozen = {"x", "gamma", "beta", "residual"} - set(needed)
    made, _ = leaves(batch(0, torch.float32, residual), frozen)
    assert saved_by(lambda: ours(**made, training=training, act="relu")) == images


@pytest.mark.parametrize("layout", LAYOUTS)
@over_training
def test_layouts(training, layout):
    def make(seed):
        given = batch(seed, torch.float32)
        for name in ("x", "residual", "grad"):
            given[name] = LAYOUTS[layout](given[name])
        return given

    compare(make, training, "relu")


@over_layouts
@pytest.mark.parametrize("ratio", [0, 100, 10000])
def test_a_mean_far_from_zero_costs_no_digits(ratio, layout):
    """Of x's gradient. The incoming one has much of x in it, or the term of x would be small; and
    past a relu, the output's rounding would decide what arrives."""

    def far(seed):
        given = batch(seed, torch.float32, False)
        given["grad"], given["x"] = given["grad"] + given["x"], given["x"] + ratio
        return of_tensors(LAYOUTS[layout], given)

    compare(far, True, "none", frozen=("gamma", "beta", "residual"))


@over_training
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_what_is_not_finite(where, value, training):
    def make(seed):
        given = batch(seed, torch.float32, residual=where == "grad")
        given[where][1, 3, 2, 1] = value
        return given

    for seed in range(3):
        given = make(seed)
        found, exact = (run(f, given, training, "relu") for f in (ours, torchs))
        for a, b in zip(found, exact, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            # What an infinite gradient makes of its channel in training depends on the order of
            # the terms: infinity, or infinity less infinity.
            if (where, training) != ("grad", True):
                assert torch.equal(a.isnan(), b.isnan())
            torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()])


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
@over_training
def test_without_parameters(training, affine):
    given = batch(0, torch.float32)
    results = []
    for f in (functional.batch_norm_act, None):
        made, wanted = leaves(given)
        gamma, beta = (
            made["bn"][n] if a else None for n, a in zip(("gamma", "beta"), affine, strict=True)
        )
        vectors = (made["bn"]["mean"], made["bn"]["var"], gamma, beta)
        if f is None:
            y = F.batch_norm(made["x"], *vectors, training, 0.1, EPS).relu()
        else:
            y = f(made["x"], *vectors, None, training, 0.1, EPS)
        grads = [wanted["x"], *(v for v in (gamma, beta) if v is not None)]
        results.append([y.detach(), *torch.autograd.grad(y, grads, given["grad"])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@over_training
def test_parameters_in_half(training, dtype):
    """module.half(): running statistics and parameters of x's own type."""

    def make(seed):
        given = batch(seed, dtype)
        given["bn"] = {k: v.to(dtype) for k, v in given["bn"].items()}
        return given

    compare(make, training, "relu")


def small(dtype=torch.float64, shape=(2, 3, 2, 3)):
    """Away from where relu bends."""
    torch.manual_seed(3)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    residual = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(shape[1], dtype=dtype, requires_grad=True) for _ in range(2))
    return x, weight, bias, residual


@over_training
@over_residual
@over_acts
def test_gradcheck_batch_norm_act(act, residual, training):
    x, weight, bias, r = small()
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def f(x, weight, bias, r):
        statistics = (mean.clone(), var.clone())
        return functional.batch_norm_act(
            x, *statistics, weight, bias, r if residual else None, training, 0.1, EPS, act
        )

    inputs = (x, weight, bias, r if residual else r.detach())
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@over_training
def test_gradient_penalty(training):
    """A loss of a gradient's norm, differentiated on to the parameters."""
    given = batch(0, torch.float64)
    results = []
    for f in (ours, torchs):
        made, wanted = leaves(given)
        y = f(**made, training=training, act="relu")
        (dx,) = torch.autograd.grad(y.square().sum(), wanted["x"], create_graph=True)
        penalty = (dx.norm() - 1) ** 2 + y.sum()
        results.append(torch.autograd.grad(penalty, list(wanted.values())))
    torch.testing.assert_close(*results)


@over_training
def test_functorch(training):
    given = batch(0, torch.float32)
    found = []
    for f in (ours, torchs):
        made, _ = leaves(given, frozen=("x", "gamma", "beta", "residual"))

        def loss(x, f=f, made=made):
            return f(**{**made, "x": x}, training=training, act="relu").square().sum()

        found.append(torch.func.grad(loss)(made["x"]))
    assert_identical(*found)
    grad = torch.func.grad(lambda x: functional.eltwise_act([x, x], act="relu").sum())
    assert_identical(grad(torch.tensor([1.0, -1.0])), torch.tensor([2.0, 0.0]))


def test_forward_mode():
    given = batch(0, torch.float32)
    tangent, found = torch.randn(SHAPE), []
    for f in (ours, torchs):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(given["x"], tangent)
            y = f(x, given["residual"], given["bn"], False, "relu")
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found)


@over_training
def test_compile(training):
    def step(x, residual, bn):
        y = ours(x, residual, bn, training, "relu")
        return functional.eltwise_act([y, x], "max", None, "relu").square().sum()

    given = batch(0, torch.float32)
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        made, wanted = leaves(given)
        loss = f(**made)
        grads = torch.autograd.grad(loss, list(wanted.values()))
        results.append([loss.detach(), made["bn"]["mean"], made["bn"]["var"], *grads])
    torch.testing.assert_close(*results)


def test_what_was_changed_in_place_is_seen():
    made, _ = leaves(batch(0, torch.float32))
    y = ours(**made, training=True, act="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.randn(1, 17, 1, 1), "residual": None}, ValueError),
        ({"x": torch.randn(3, 16, 5, 6), "residual": None}, RuntimeError),
        ({"x": torch.randn(SHAPE).double()}, RuntimeError),
        ({"x": torch.ones(SHAPE, dtype=torch.int32)}, NotImplementedError),
        ({"residual": torch.randn(3, 16, 5, 6)}, RuntimeError),
    ],
    ids=["one_value", "channels", "dtype", "integers", "residual"],
)
def test_torchs_errors(change, error):
    given = {**batch(0, torch.float32), **change}
    given.pop("grad")
    for f in (ours, torchs):
        with pytest.raises(error):
            f(**given, training=True, act="relu")


def test_activation_is_checked():
    with pytest.raises(ValueError, match="batch_norm_act: act must be"):
        functional.batch_norm_act(torch.randn(SHAPE), None, None, act="gelu")


def test_residual_broadcasts_and_promotes():
    given = batch(0, torch.bfloat16)
    results = []
    for f in (ours, torchs):
        made, _ = leaves({**given, "residual": torch.randn(17, 1, 1)})
        residual = made["residual"].detach().requires_grad_()
        torch.manual_seed(0)
        y = f(**{**made, "residual": residual}, training=True, act="relu")
        assert y.dtype == torch.float32
        results.append(torch.autograd.grad(y.sum(), residual)[0].shape)
    assert results[0] == results[1]


def test_module_trains_fused():
    counted = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(str(func))
            return func(*args, **(kwargs or {}))

    module = BatchNormAct2d(17)
    x = torch.randn(SHAPE, requires_grad=True)
    with Count():
        module(x).sum().backward()
    assert "fused_resnet.bn_stats.default" in counted
    assert "fused_resnet.bn_act_backward.default" in counted
    assert not [name for name in counted if "native_batch_norm" in name]


def test_module_learns_as_torch_does():
    ours = BatchNormAct2d(17)
    theirs = copy.deepcopy(ours)
    results = []
    for m, f in ((ours, ours), (theirs, lambda x: F.relu(torch.nn.BatchNorm2d.forward(theirs, x)))):
        optimizer, losses = torch.optim.SGD(m.parameters(), 0.1), []
        for seed in range(5):
            x = Source(seed, torch.float32).normal(*SHAPE)
            loss = (f(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *m.state_dict().values()])
    torch.testing.assert_close(*results)


def test_engine_is_that_of_the_forward():
    made, wanted = leaves(batch(0, torch.float32))
    with fused_resnet.use_engine("native"):
        y = ours(**made, training=True, act="relu")
    with fused_resnet.use_engine("reference"):
        found = torch.autograd.grad(y.sum(), list(wanted.values()))
    assert engines.wish() == "auto"
    made, wanted = leaves(batch(0, torch.float32))
    y = ours(**made, training=True, act="relu")
    assert_identical(torch.autograd.grad(y.sum(), list(wanted.values())), found)
