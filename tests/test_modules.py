"""ConvBNAct2d, BatchNormAct2d and AddAct against the torch modules they stand for."""

import copy
import pickle

import pytest
import torch
from models import images, runs_fused, settle
from tolerances import judge
from torch import nn
from torch.nn import functional as F
from units import judge_all

from fused_resnet import AddAct, BatchNormAct2d, ConvBNAct2d

ACTS = ("none", "relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fields(seed=0, channels=5, size=9):
    return images(seed, 2, size, channels=channels)


def norm(seed=0, kind=BatchNormAct2d, **kwargs):
    return settle(kind(5, **kwargs), seed, fields(seed + 1))


def plain_norm(module):
    """The BatchNorm2d whose checkpoint ``module`` shares."""
    plain = nn.BatchNorm2d(5, module.eps, module.momentum, module.affine).train(module.training)
    plain.load_state_dict(module.state_dict())
    return plain.to(module.running_mean.dtype)


def finish(y, residual, act):
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_act(affine, act, with_residual, dtype):
    found = []
    for seed in range(3):
        module = BatchNormAct2d(5, affine=affine, act=act)
        module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
        module.eval().to(dtype)
        x = fields(seed).to(dtype)
        residual = fields(seed + 9).to(dtype) if with_residual else None
        plain = plain_norm(module)
        with torch.no_grad():
            assert runs_fused(module, x)
            theirs = finish(plain(x), residual, act)
            wide = None if residual is None else residual.double()
            found.append(
                (module(x, residual), theirs, finish(plain.double()(x.double()), wide, act))
            )
    judge(*zip(*found, strict=True))


def test_batch_norm_act_is_a_batch_norm():
    module, plain = BatchNormAct2d(5), nn.BatchNorm2d(5)
    assert isinstance(module, nn.BatchNorm2d)
    assert list(module.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert "act='relu'" in repr(module)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(module)) is nn.SyncBatchNorm


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_act_trains_as_torch(momentum):
    module = BatchNormAct2d(5, momentum=momentum).train()
    plain = plain_norm(module)
    exact = copy.deepcopy(plain).double()
    results = [[], [], []]
    for seed in range(3):
        x = fields(seed)
        for found, m, t in zip(results, (module, plain, exact), (x, x, x.double()), strict=True):
            leaf = t.clone().requires_grad_()
            y = m(leaf, t) if m is module else finish(m(leaf), t, "relu")
            y.square().sum().backward()
            found.append(leaf.grad)
    for found, m in zip(results, (module, plain, exact), strict=True):
        found += [m.weight.grad, m.bias.grad, *m.buffers()]
    judge_all(*results)


def test_batch_norm_act_gradients_in_eval():
    """Statistics stay, gradients flow to x, weight and bias."""

    def gradients(m, x):
        x.requires_grad_()
        F.relu(m(x)).square().sum().backward()
        return x.grad, m.weight.grad, m.bias.grad

    module = norm()
    plain, before = plain_norm(module), copy.deepcopy(list(module.buffers()))
    exact = gradients(copy.deepcopy(plain).double(), fields().double())
    found = gradients(module, fields()), gradients(plain, fields()), exact
    for one_tensor in zip(*found, strict=True):
        judge(*([t] for t in one_tensor))
    assert all(torch.equal(b, c) for b, c in zip(module.buffers(), before, strict=True))


def test_batch_norm_act_follows_its_tensors():
    module = norm()
    with torch.no_grad():
        before = module(fields())
        module.running_mean.data.add_(1)
        module.weight.data.mul_(2)
        after, theirs = module(fields()), F.relu(plain_norm(module)(fields()))
        exact = F.relu(plain_norm(module).double()(fields().double()))
    assert not torch.equal(before, after)
    judge([after], [theirs], [exact])


def test_batch_norm_act_without_statistics():
    """The batch's own, in eval too; nothing but weight and bias in the checkpoint."""
    module = BatchNormAct2d(5, track_running_stats=False).eval()
    plain = nn.BatchNorm2d(5, track_running_stats=False).eval()
    assert list(module.state_dict()) == ["weight", "bias"]
    with torch.no_grad():
        x = fields()
        truth = F.relu(copy.deepcopy(plain).double()(x.double()))
        judge([module(x)], [F.relu(plain(x))], [truth])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (lambda: fields()[0], ValueError, "expected 4D input"),
        (lambda: fields(channels=4), RuntimeError, "5|4"),
        (lambda: fields().double(), RuntimeError, "."),
        (lambda: fields().int(), (RuntimeError, NotImplementedError), "."),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_act_bad_input(x, error, message, training):
    module = norm().train(training)
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        with pytest.raises(error):
            plain_norm(module)(x())
        with pytest.raises(error, match=message):
            module(x())
    # torch counts a batch before it looks at it.
    assert all(
        torch.equal(v, state[k]) for k, v in module.state_dict().items() if "tracked" not in k
    )


def test_batch_norm_act_needs_more_than_one_value_to_train():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormAct2d(5).train()(torch.ones(1, 5, 1, 1))
    with torch.no_grad():
        assert norm()(torch.ones(1, 5, 1, 1)).shape == (1, 5, 1, 1)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_batch_norm_act_leaves_eps_to_torch(eps):
    def outcome(module):
        try:
            with torch.no_grad():
                return F.relu(module.eval()(fields())).tolist()
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    assert outcome(BatchNormAct2d(5, eps=eps)) == outcome(nn.BatchNorm2d(5, eps=eps))


def test_negative_variance_gives_nan():
    module = norm()
    with torch.no_grad():
        module.running_var[2] = -1
        y = module(fields())
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3, 4]].isnan().any()


def conv(seed=0, **kwargs):
    return settle(ConvBNAct2d(6, 8, 3, **kwargs), seed, fields(seed + 1, 6))


def unfused(module, x, residual=None):
    return finish(module.bn(module.conv(x)), residual, module.act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": 2, "padding": 1, "bias": True},
        {"padding": (2, 0), "dilation": (2, 1), "groups": 2},
        {"act": "none", "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_bn_act(dtype, kwargs, with_residual):
    found = []
    for seed in range(3):
        module, x = conv(seed, **kwargs).to(dtype), fields(seed, 6).to(dtype)
        with torch.no_grad():
            residual = torch.randn_like(module.conv(x)) if with_residual else None
            assert runs_fused(module, x)
            wide = None if residual is None else residual.double()
            exact = unfused(copy.deepcopy(module).double(), x.double(), wide)
            found.append((module(x, residual), unfused(module, x, residual), exact))
    judge(*zip(*found, strict=True))


def test_conv_bn_act_broadcasts_and_promotes_its_residual():
    module, x = conv().bfloat16(), fields(channels=6).bfloat16()
    residual = torch.randn(8, 1, 1)
    with torch.no_grad():
        ours, theirs = module(x, residual), unfused(module, x, residual)
        exact = unfused(copy.deepcopy(module).double(), x.double(), residual.double())
        assert ours.dtype == theirs.dtype == torch.float32
        judge([ours], [theirs], [exact])
        with pytest.raises(RuntimeError, match=r"broadcast|must match"):
            module(x, torch.randn(7, 1, 1))


def test_conv_bn_act_with_a_hook():
    """An obstacle at the call, as in a block."""
    module, calls = conv(), []
    module.bn.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        assert not runs_fused(module, fields(channels=6))
    assert calls == [1]


def test_conv_bn_act_pieces():
    module = conv(bias=True)
    assert type(module.conv) is nn.Conv2d
    assert type(module.bn) is nn.BatchNorm2d
    names = ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean"]
    assert list(module.state_dict()) == [*names, "bn.running_var", "bn.num_batches_tracked"]
    again = pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        assert torch.equal(again(fields(channels=6)), module(fields(channels=6)))


def test_add_act():
    a, b, c = (fields(seed).requires_grad_(seed == 0) for seed in range(3))
    with torch.no_grad():
        assert runs_fused(AddAct(), a, b)
        exact = F.relu(a.double() + b.double() + c.double())
        judge([AddAct()(a, b, c)], [F.relu(a + b + c)], [exact])
        assert torch.equal(AddAct("none")(a, b), a + b)
    AddAct()(a, b).sum().backward()
    assert torch.equal(a.grad, (a + b > 0).float())
    with pytest.raises(RuntimeError, match="broadcast"):
        AddAct()(a, b[:, :3])


@pytest.mark.parametrize(
    "build",
    [
        lambda: AddAct("gelu"),
        lambda: BatchNormAct2d(5, act="gelu"),
        lambda: ConvBNAct2d(3, 4, 1, act="gelu"),
    ],
)
def test_unknown_activation(build):
    with pytest.raises(ValueError, match='act must be "none" or "relu", got \'gelu\''):
        build()


def test_torchs_own_constructor_errors():
    with pytest.raises(TypeError):
        BatchNormAct2d(5, no_such_argument=1)
    with pytest.raises(ValueError, match="divisible by groups"):
        ConvBNAct2d(5, 4, 1, groups=2)
