"""Chains of every kind, fused and not: the same outputs, gradients and statistics, in float64.

There no rounding decides on which side of a ReLU a value falls: what differs is a mistake.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import double, runs_fused, same
from tolerances import judge
from torch import nn, optim
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

import fused_resnet

CHANNELS = 4


def conv(into=CHANNELS, out=CHANNELS, kernel=3, **kwargs):
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **kwargs)


def bn():
    return nn.BatchNorm2d(CHANNELS)


def shared_conv():
    shared = conv()
    return nn.Sequential(shared, bn(), nn.ReLU(), shared, bn(), nn.ReLU())


def shared_bn():
    shared = bn()
    return nn.Sequential(conv(), shared, nn.ReLU(), conv(bias=False), shared)


def shared_inside_a_block():
    block = BasicBlock(CHANNELS, CHANNELS)
    block.conv2, block.bn2 = block.conv1, block.bn1
    return nn.Sequential(block, block)


def hooked():
    model = nn.Sequential(conv(), bn(), nn.ReLU())
    model[1].register_forward_hook(lambda m, args, y: 2 * y)
    return model


def normed():
    return nn.Sequential(parametrizations.weight_norm(conv()), bn())


def cumulative_mean():
    model = nn.Sequential(conv(), bn(), nn.ReLU())
    model[1].momentum = None
    return model


#: how to make it -> why its pairs are not fused, None where they are; () where it has no pair.
CHAINS = {
    "shared conv": (shared_conv, None),
    "shared bn": (shared_bn, None),
    "shared inside a block": (shared_inside_a_block, None),
    "cumulative mean": (cumulative_mean, None),
    "bn before conv": (lambda: nn.Sequential(bn(), nn.ReLU(), conv()), ()),
    "no norm": (lambda: nn.Sequential(conv(), nn.Identity(), nn.ReLU()), ()),
    "group norm": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, CHANNELS)), "GroupNorm"),
    "instance norm": (
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(CHANNELS, affine=True)),
        "InstanceNorm2d",
    ),
    "hook": (hooked, "bn: it has hooks"),
    "weight norm": (normed, "ParametrizedConv2d"),
}


def image(batch=3, size=9):
    return torch.randn(batch, CHANNELS, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("make", "reason"), CHAINS.values(), ids=CHAINS)
def test_chain(make, reason):
    torch.manual_seed(0)
    plain = make().double()
    entries = fused_resnet.report(same(plain, image().double()))
    assert bool(entries) == (reason != ())
    if not reason:
        assert not entries.unfused
        assert fused_resnet.fuse(plain, strict=True) is plain
        return
    assert all(reason in e.reason for e in entries)
    with pytest.raises(RuntimeError, match=reason):
        fused_resnet.fuse(plain, strict=True)


layers = st.lists(
    st.fixed_dictionaries(
        {
            "kernel": st.sampled_from([1, 3]),
            "stride": st.sampled_from([1, 2]),
            "groups": st.sampled_from([1, 2]),
            "bias": st.booleans(),
            "norm": st.booleans(),
            "after": st.sampled_from([[], [nn.ReLU()], [nn.ReLU(inplace=True)], [nn.Tanh()]]),
            "block": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(layers=layers, seed=st.integers(0, 9), size=st.sampled_from([17, 40]))
def test_random_graph(layers, seed, size):
    """Convolutions with and without what follows them, blocks with their sums between them."""
    torch.manual_seed(seed)
    steps = []
    for layer in layers:
        kinds = ("kernel", "stride", "groups", "bias")
        steps.append(conv(**{name: layer[name] for name in kinds}))
        steps += [bn()] if layer["norm"] else []
        steps += copy.deepcopy(layer["after"])
        steps += [BasicBlock(CHANNELS, CHANNELS)] if layer["block"] else []
    same(nn.Sequential(*steps, nn.Tanh()).double(), image(2, size).double())


def test_lazy_modules():
    torch.manual_seed(0)
    model = fused_resnet.fuse(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()))
    (entry,) = fused_resnet.report(model)
    assert "LazyConv2d" in entry.reason
    model(image())
    fused_resnet.fuse(model)
    assert not fused_resnet.report(model).unfused
    with torch.no_grad():
        assert runs_fused(model.eval(), image())


def test_meta_device():
    with torch.device("meta"):
        model = fused_resnet.fuse(nn.Sequential(conv(), bn(), nn.ReLU()))
        assert model(torch.empty(2, CHANNELS, 5, 5)).shape == (2, CHANNELS, 5, 5)
    assert not fused_resnet.report(model).unfused


def replace_bn(model):
    model[1] = bn().eval()
    model[1].weight.fill_(2)


def load(assign):
    def change(model):
        torch.manual_seed(1)
        model.load_state_dict(nn.Sequential(conv(), bn(), nn.ReLU()).state_dict(), assign=assign)

    return change


CHANGES = {
    "load": load(False),
    "assign": load(True),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "another bn": replace_bn,
    "data": lambda m: m[0].weight.data.mul_(-2),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(-m[0].weight.detach())),
    "statistics": lambda m: m[1].running_mean.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_live_parameters(change):
    """What comes out after a change is made of what is there after it."""
    torch.manual_seed(0)
    model = fused_resnet.fuse(nn.Sequential(conv(), bn(), nn.ReLU())).eval()
    with torch.no_grad():
        before = model(image())
        change(model)
        x = image().to(model[0].weight.dtype)
        y = model(x)
        assert runs_fused(model, x)
        plain = fused_resnet.unfuse(copy.deepcopy(model))
        judge([y], [plain(x)], [double(model, x)])
    if change is not CHANGES["channels_last"]:
        assert not torch.equal(y, before)


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=False),
    "SGD foreach": lambda p: optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, 0.1, foreach=False),
    "Adam fused": lambda p: optim.Adam(p, 0.1, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, 0.1, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, 0.1, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, 0.1, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, 10.0),
    "Adamax": lambda p: optim.Adamax(p, 0.1),
    "ASGD": lambda p: optim.ASGD(p, 0.1),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=3),
    "NAdam": lambda p: optim.NAdam(p, 0.1),
    "RAdam": lambda p: optim.RAdam(p, 0.1),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer(make):
    """However it writes to parameters: evaluations and steps after a step are of what it left."""
    torch.manual_seed(0)
    plain = nn.Sequential(conv(bias=False), bn(), nn.ReLU(), BasicBlock(CHANNELS, CHANNELS))
    plain.append(nn.Tanh()).double()
    x, found = image().double(), []
    for m in (fused_resnet.fuse(copy.deepcopy(plain)), plain):
        optimizer, outputs = make(m.parameters()), []

        def loss(m=m, optimizer=optimizer):
            optimizer.zero_grad()
            value = (m.train()(x) - 0.3).pow(2).mean()
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(loss)
            with torch.no_grad():
                outputs.append(m.eval()(x))
                assert runs_fused(m, x) == (m is not plain)
        assert not torch.equal(*outputs[-2:])
        found.append(outputs)
    judge(*found, found[1])


@pytest.mark.parametrize("away", ["0", "1", "3.conv2"])
def test_devices_that_differ(away):
    """They cannot run as one."""
    model = nn.Sequential(conv(), bn(), nn.ReLU(), BasicBlock(CHANNELS, CHANNELS)).eval()
    model.get_submodule(away).to("meta")
    entries = fused_resnet.report(fused_resnet.fuse(model)).unfused
    assert [e.conv for e in entries] == (["3.conv1", "3.conv2"] if away[0] == "3" else ["0"])
    assert all("on different devices: cpu, meta" in e.reason for e in entries)
    with pytest.raises(RuntimeError, match="on different devices: cpu, meta"):
        fused_resnet.fuse(model, strict=True)
    with pytest.raises(RuntimeError, match="one device"):
        fused_resnet.freeze(model, example=image())


def test_hook_added_after_fusing():
    torch.manual_seed(0)
    model = fused_resnet.fuse(nn.Sequential(conv(), bn(), nn.ReLU())).eval()
    with torch.no_grad():
        y = model(image())
        model[0].register_forward_hook(lambda m, args, out: -out)
        assert not runs_fused(model, image())
        assert not torch.equal(model(image()), y)
