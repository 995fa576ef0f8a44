"""The fused backwards of eltwise_act and bn_act against autograd through torch."""

import functools

import pytest
import torch
from cases import Source, assert_identical, over_dtypes, over_layouts, per_channel
from test_autograd import batch, over_acts, over_residual, small, wide
from test_eltwise_act import COEFF, COMBINE
from test_eltwise_act import eager as eltwise_of_torch
from tolerances import judge
from torch.autograd import gradcheck, gradgradcheck

from fused_resnet import functional


@over_residual
@over_acts
def test_gradcheck_bn_act(act, residual):
    x, scale, shift, r = small()

    def f(x, scale, shift, r):
        return functional.bn_act(x, scale, shift, r if residual else None, act)

    inputs = (x, scale, shift, r if residual else r.detach())
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@over_acts
@pytest.mark.parametrize(("op", "coeff"), [*zip(COMBINE, [None] * 3, strict=True), ("sum", COEFF)])
def test_gradcheck_eltwise_act(op, coeff, act):
    inputs = tuple(t for t in torch.randn(3, 2, 5).double().requires_grad_().unbind())
    chosen = None if coeff is None else coeff[:3]

    def f(*tensors):
        return functional.eltwise_act(tensors, op, chosen, act)

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@over_dtypes
@over_acts
@pytest.mark.parametrize(("op", "coeff"), [*zip(COMBINE, [None] * 3, strict=True), ("sum", COEFF)])
def test_eltwise_act(op, coeff, act, dtype):
    chosen = None if coeff is None else coeff[:3]
    results = []
    for seed in range(3):
        source = Source(seed, dtype)
        tensors = [source.normal(2, 5, 3, 4) for _ in range(3)]
        tensors[1][0] = tensors[0][0]  # ties
        grad, found = source.normal(2, 5, 3, 4), []
        for given, f in (
            (tensors, lambda t: functional.eltwise_act(t, op, chosen, act)),
            (tensors, functools.partial(eltwise_of_torch, op, chosen, act)),
            ([t.double() for t in tensors], functools.partial(eltwise_of_torch, op, chosen, act)),
        ):
            of = [t.detach().requires_grad_() for t in given]
            y = f(of)
            found.append(torch.autograd.grad(y, of, grad.to(y.dtype)))
        results.append(list(zip(*found, strict=True)))
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


@over_dtypes
@over_layouts
@over_residual
def test_bn_act(residual, layout, dtype):
    results = []
    for seed in range(3):
        given = batch(seed, dtype, residual, layout=layout)
        found = []
        for made, f in (
            (given, lambda x, a, b, r: functional.bn_act(x, a, b, r, "relu")),
            (given, affine_of_torch),
            (wide(given), affine_of_torch),
        ):
            of = [made["x"], made["bn"]["gamma"], made["bn"]["beta"]]
            of = [t.detach().requires_grad_() for t in of]
            r = None if made["residual"] is None else made["residual"].detach().requires_grad_()
            y = f(*of, r)
            found.append(torch.autograd.grad(y, of + ([r] if residual else []), made["grad"]))
        results.append(list(zip(*found, strict=True)))
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


def affine_of_torch(x, scale, shift, residual):
    y = x.to(scale.dtype) * per_channel(scale) + per_channel(shift)
    return (y if residual is None else y + residual).relu().to(x.dtype)


@pytest.mark.parametrize("needed", ["x", "scale", "shift", "residual"])
@over_acts
def test_only_what_is_needed_of_bn_act(act, needed):
    x, scale, shift, residual = small(torch.float32)
    inputs = {"x": x, "scale": scale, "shift": shift, "residual": residual}
    expected = torch.autograd.grad(functional.bn_act(*inputs.values(), act).sum(), inputs[needed])
    alone = {k: t if k == needed else t.detach() for k, t in inputs.items()}
    found = torch.autograd.grad(functional.bn_act(*alone.values(), act).sum(), inputs[needed])
    torch.testing.assert_close(found, expected)


def test_functorch():
    grad = torch.func.grad(lambda x: functional.eltwise_act([x, x], act="relu").sum())
    assert_identical(grad(torch.tensor([1.0, -1.0])), torch.tensor([2.0, 0.0]))
    x, scale, shift, residual = small(torch.float32)
    found = torch.func.grad(lambda x: functional.bn_act(x, scale, shift, residual, "relu").sum())
    expected = torch.autograd.grad(affine_of_torch(x, scale, shift, residual).sum(), x)[0]
    torch.testing.assert_close(found(x.detach()), expected)
