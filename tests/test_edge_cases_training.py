"""What torch does at the edges of training, and so what our modules do: results and state by the
rule. The numbers are the lines of the list of edge cases."""

import copy

import pytest
import torch
from cases import ENGINES, assert_identical
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from units import CHANNELS, UNITS, alike, batch_norms, build, image, judge_all

import fused_resnet
from fused_resnet import BatchNormAct2d, functional

NAN, INF = float("nan"), float("inf")
over_modules = pytest.mark.parametrize("unit", UNITS)


def gradients(f, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    f(*leaves).backward(torch.ones(()).expand_as(f(*leaves)))
    return [leaf.grad for leaf in leaves]


@over_modules
@pytest.mark.parametrize("train", [False, True])
def test_gradients_follow_torchs(train, unit):
    """Of the input and of every parameter."""
    m, x = build(unit).train(train), image()
    twin, exact = copy.deepcopy(m), copy.deepcopy(m).double()
    weights = torch.randn_like(m(x))
    found = []
    for module, f in ((m, m), (twin, UNITS[unit].plain), (exact, UNITS[unit].plain)):
        given = x.detach().to(next(module.parameters()).dtype).clone().requires_grad_()
        y = f(given) if f is m else f(module, given)
        (y * weights).sum().backward()
        found.append([y, given.grad, *(p.grad for p in module.parameters())])
    for of_one in zip(*found, strict=True):
        # A convolution's bias before batch statistics has a gradient of nothing but rounding.
        if of_one[2].abs().max() > 1e-9:
            judge(*([t] for t in of_one))


def test_line_02_gradient_of_relu_at_nan_is_one():
    x = torch.tensor([[[[NAN, 1.0, -1.0, 0.0]]]])
    (ours,) = gradients(lambda x: functional.eltwise_act([x], act="relu"), x)
    (theirs,) = gradients(torch.relu, x)
    assert_identical(ours, theirs)
    assert ours.tolist() == [[[[1, 1, 0, 0]]]]


def test_line_03_nan_gradient_is_not_passed_where_relu_is_flat():
    x = torch.tensor([[[[-1.0, 0.0, 2.0]]]], requires_grad=True)
    y = functional.bn_act(x, torch.ones(1), torch.zeros(1), act="relu")
    y.backward(torch.full_like(y, NAN))
    assert x.grad[0, 0, 0, :2].tolist() == [0, 0]
    assert x.grad[0, 0, 0, 2].isnan()


def test_line_05_gradient_of_relu_at_infinities():
    x = torch.tensor([[[[INF, -INF]]]])
    (ours,) = gradients(lambda x: functional.eltwise_act([x], act="relu"), x)
    assert ours.tolist() == [[[[1, 0]]]]


@over_modules
@pytest.mark.parametrize("value", [NAN, INF])
def test_line_06_one_bad_value_spoils_its_channel(value, unit):
    x = image()
    x[1, 2, 3, 1] = value
    result = alike(unit, x, train=True)
    assert result.isnan().any()
    if unit == "BatchNormAct2d":
        assert torch.equal(result.isnan().any((0, 2, 3)), torch.arange(CHANNELS) == 2)
        assert torch.equal(result.isnan().all(-1).all(-1).all(0), torch.arange(CHANNELS) == 2)


@over_modules
def test_line_07_one_value_per_channel(unit):
    error = alike(unit, image(1, 1, 1), train=True)
    assert isinstance(error, ValueError)
    assert "Expected more than 1 value per channel when training" in str(error)


def test_line_08_running_variance_is_unbiased():
    m = BatchNormAct2d(1, momentum=1.0, act="none")
    y = m(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    assert m.running_var.item() == 2
    assert torch.allclose(y.flatten(), torch.tensor([-1.0, 1.0]))  # by the biased variance, 1
    alike("BatchNormAct2d", image(2, 1, 1), train=True)


@over_modules
def test_line_09_no_images(unit):
    m = build(unit).train()
    before = [(bn.running_mean.clone(), bn.running_var.clone()) for bn in batch_norms(m)]
    m(image(0)).sum().backward()
    assert all(not bn.weight.grad.any() for bn in batch_norms(m))
    assert_identical([(bn.running_mean, bn.running_var) for bn in batch_norms(m)], before)
    assert [bn.num_batches_tracked.item() for bn in batch_norms(m)] == [1] * len(before)
    alike(unit, image(0), train=True)


def test_line_10_no_channels():
    m = BatchNormAct2d(0)
    with pytest.raises(IndexError):
        m(torch.randn(2, 0, 3, 3))


@over_modules
@pytest.mark.parametrize("eps", [0.0, -1e-3])
def test_line_11_eps_must_be_positive(eps, unit):
    def change(m):
        for bn in batch_norms(m):
            bn.eps = eps

    assert isinstance(alike(unit, image(), change, train=True), ValueError)


@over_modules
def test_line_13_cumulative_mean(unit):
    def change(m):
        for bn in batch_norms(m):
            bn.momentum = None

    alike(unit, image(), change, train=True)
    m = BatchNormAct2d(1, momentum=None)
    for value in (1.0, 2.0, 6.0):
        m(torch.full((2, 1, 2, 2), value))
    assert m.running_mean.item() == 3


@over_modules
@pytest.mark.parametrize("train", [False, True])
def test_line_14_without_running_statistics(train, unit):
    def change(m):
        for bn in batch_norms(m):
            bn.track_running_stats = False
            bn.running_mean = bn.running_var = bn.num_batches_tracked = None

    assert isinstance(alike(unit, image(), change, train=train), Tensor)


def test_line_15_without_affine_parameters():
    m = BatchNormAct2d(CHANNELS, affine=False)
    assert m.weight is None
    assert m.bias is None
    x = image().requires_grad_()
    m(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@over_modules
def test_line_17_evaluation_has_gradients(unit):
    m = build(unit)
    counts = [bn.num_batches_tracked.clone() for bn in batch_norms(m)]
    x = image().requires_grad_()
    m(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in m.parameters())
    assert_identical([bn.num_batches_tracked for bn in batch_norms(m)], counts)


@over_modules
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_line_18_statistics_follow_without_gradients(context, unit):
    m = build(unit)
    with context():
        alike(unit, image(), train=True)
        before = [bn.running_mean.clone() for bn in batch_norms(m)]
        m.train()(image())
    assert all(
        not torch.equal(bn.running_mean, old)
        for bn, old in zip(batch_norms(m), before, strict=True)
    )


@over_modules
def test_line_19_frozen_affine_parameters_follow_statistics(unit):
    def change(m):
        for bn in batch_norms(m):
            bn.weight.requires_grad_(False)

    alike(unit, image(), change, train=True)
    m = build(unit).train()
    change(m)
    old = [bn.running_mean.clone() for bn in batch_norms(m)]
    m(image())
    assert not torch.equal(batch_norms(m)[0].running_mean, old[0])


def test_line_21_gradient_of_a_residual_that_broadcasts():
    x, residual = torch.randn(2, 3, 4, 5), torch.randn(3, 1, 1)
    scale, shift = torch.randn(3), torch.randn(3)
    ours = gradients(lambda x, r: functional.bn_act(x, scale, shift, r, "relu"), x, residual)
    theirs = gradients(
        lambda x, r: torch.relu(x * scale.view(3, 1, 1) + shift.view(3, 1, 1) + r), x, residual
    )
    assert [g.shape for g in ours] == [x.shape, residual.shape]
    torch.testing.assert_close(ours, theirs)


def test_line_22_changed_output_is_noticed_changed_inputs_are_not_needed():
    a, b = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    y = functional.add_act(a * 1, b)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = functional.add_act(a * 1, b)
    b.zero_()
    y.sum().backward()
    assert torch.equal(a.grad, (y > 0).float())


def test_vmap_over_training_is_refused():
    m = BatchNormAct2d(CHANNELS).train()
    with pytest.raises(RuntimeError):
        torch.func.vmap(m)(torch.randn(3, 2, CHANNELS, 4, 4))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
def test_an_engine_asked_for_by_name_does_not_pretend_to_have_a_backward(engine):
    x = image().requires_grad_()
    ones, zeros = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    with fused_resnet.use_engine(engine):
        with pytest.raises(fused_resnet.engines.EngineError, match=r"maxpool.*no backward"):
            functional.bn_act_maxpool(x, ones, zeros, 2)
        assert functional.bn_act_maxpool(x.detach(), ones, zeros, 2).numel()
        with torch.no_grad():
            assert functional.bn_act_maxpool(x, ones, zeros, 2).numel()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("act", ["none", "relu"])
def test_gradcheck(act):
    x, weight = double(2, 4, 5, 4), double(6, 2, 3, 3)
    wide, narrow = (double(6), double(6)), (double(4), double(4))
    var = (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_()
    calls = [
        (lambda *t: functional.eltwise_act(t, "sum", [1.0, -2.0], act), (x, double(2, 4, 5, 4))),
        (lambda *t: functional.eltwise_act(t, "prod", None, act), (x, double(2, 4, 5, 4))),
        (lambda *t: functional.eltwise_act(t, "max", None, act), (x, double(2, 4, 5, 4))),
        (lambda *t: functional.add_act(*t, act), (x, double(4, 1, 1))),
        (functional.bn_scale_shift, (double(4), var, double(4), double(4))),
        (lambda *t: functional.bn_act(*t, act), (x, *narrow, double(2, 4, 5, 4))),
        (lambda *t: functional.bn_act_maxpool(*t, 3, 2, 1, act=act), (x, *narrow)),
        (
            lambda *t: functional.conv_bn_act(*t, (2, 1), 1, groups=2, act=act),
            (x, weight, *wide, double(2, 6, 3, 4)),
        ),
    ]
    for f, inputs in calls:
        assert torch.autograd.gradcheck(f, inputs)


def test_double_backward():
    x, scale, shift = double(2, 3, 4, 4), double(3), double(3)
    assert torch.autograd.gradgradcheck(
        lambda *t: functional.bn_act(*t, act="relu"), (x, scale, shift)
    )


def test_training_mode_is_torchs_forward():
    m = BatchNormAct2d(CHANNELS).train()
    twin, exact = copy.deepcopy(m), copy.deepcopy(m).double()
    x, residual = image(), image()
    results = [(m(x, residual), m.state_dict())]
    for module, kind in ((twin, torch.float32), (exact, torch.float64)):
        y = F.relu(nn.BatchNorm2d.forward(module, x.to(kind)) + residual.to(kind))
        results.append((y, module.state_dict()))
    judge_all(*results)
