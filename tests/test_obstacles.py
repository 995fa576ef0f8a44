"""What can get in the way of a fused block after fusing, and that each call sees it."""

import copy

import pytest
import torch
from models import Ops, bottleneck, double, images, runs_fused
from tolerances import judge
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune

import fused_resnet


def inputs(seed=0, batch=2, size=9):
    return images(seed, batch, size, channels=24)


def hook(register):
    def obstruct(model, calls):
        return register(model)(lambda *args: calls.append(1))

    return obstruct


def own_forward(model, calls):
    forward = model.conv2.forward
    model.conv2.forward = lambda x: (calls.append(1), forward(x))[1]


class CountingConv(nn.Conv2d):
    calls: list[int]

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x)


def own_class(model, calls):
    model.conv1.__class__ = CountingConv
    model.conv1.calls = calls


def reflecting(model, calls):
    model.conv2.padding_mode = "reflect"
    model.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


#: what gets in the way after fusing -> (how, part of the reason given, whether it leaves a trace)
OBSTACLES = {
    "hook": (hook(lambda m: m.conv2.register_forward_hook), "hooks", True),
    "pre-hook": (hook(lambda m: m.bn3.register_forward_pre_hook), "hooks", True),
    "relu-hook": (hook(lambda m: m.relu.register_forward_hook), "hooks", True),
    "shortcut-hook": (hook(lambda m: m.downsample[1].register_forward_hook), "hooks", True),
    "backward-hook": (hook(lambda m: m.conv1.register_full_backward_hook), "hooks", False),
    "backward-pre-hook": (hook(lambda m: m.bn1.register_full_backward_pre_hook), "hooks", False),
    "global-hook": (
        hook(lambda m: nn_module.register_module_forward_hook),
        "global module hooks",
        True,
    ),
    "global-pre-hook": (
        hook(lambda m: nn_module.register_module_forward_pre_hook),
        "global module hooks",
        True,
    ),
    "global-backward-hook": (
        hook(lambda m: nn_module.register_module_full_backward_hook),
        "global module hooks",
        False,
    ),
    "pruned": (lambda m, _: prune.l1_unstructured(m.conv1, "weight", 0.5), "hooks", False),
    "weight-norm": (
        lambda m, _: parametrizations.weight_norm(m.conv3),
        "ParametrizedConv2d",
        False,
    ),
    "silu": (lambda m, _: setattr(m, "relu", nn.SiLU()), "SiLU", False),
    "group-norm": (lambda m, _: setattr(m, "bn2", nn.GroupNorm(2, 8)), "GroupNorm", False),
    "no-norm": (lambda m, _: setattr(m, "bn1", nn.Identity()), "Identity", False),
    "own-forward": (own_forward, "overridden on the instance", True),
    "own-class": (own_class, "CountingConv", True),
    "reflecting": (reflecting, "padding_mode", False),
    "same": (lambda m, _: setattr(m.conv2, "padding", "same"), "padding", False),
}


@pytest.mark.parametrize(("obstruct", "reason", "traces"), OBSTACLES.values(), ids=OBSTACLES)
def test_obstacle(obstruct, reason, traces):
    """Found at the call, whenever it came; the block then does exactly what torchvision's does."""
    calls = []
    model, plain = fused_resnet.fuse(bottleneck()), bottleneck()
    x = inputs()
    handles = [obstruct(m, calls) for m in (plain, model)]
    try:
        with torch.no_grad():
            assert reason in model.obstacle(x)
            expected = plain(x)
            once = len(calls)
            assert (once > 0) == traces
            with Ops() as ops:
                y = model(x)
            assert len(calls) == 2 * once
        assert not ops.names
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        if "global" not in reason:
            found = [entry.reason for entry in fused_resnet.report(model) if not entry.fused]
            assert any(reason in r for r in found), found
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()
    if hasattr(handles[0], "remove"):
        with torch.no_grad():
            assert model.obstacle(x) is None
            assert runs_fused(model, x)


def test_hooks_around_fused_parts():
    """On the block and on its shortcut as a whole, hooks run, and the rest stays fused."""
    model, plain, calls = fused_resnet.fuse(bottleneck()), bottleneck(), []
    for m in (model, model.downsample):
        for register in (m.register_forward_hook, m.register_forward_pre_hook):
            handle = register(lambda *args: calls.append(1))
            with torch.no_grad():
                assert runs_fused(model, inputs())
            handle.remove()
    assert len(calls) == 4
    with torch.no_grad():
        judge([model(inputs())], [plain(inputs())], [double(plain, inputs())])


def test_shortcut_of_another_form():
    """Pooling first, as in ResNet-D: the block and the shortcut are fused one by one."""
    plain = bottleneck(stride=2)
    plain.downsample = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), *plain.downsample)
    plain.downsample[1].stride = (1, 1)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert all(entry.fused for entry in fused_resnet.report(model))
    with torch.no_grad(), Ops() as ops:
        y = model(inputs())
    assert sum(ops.names.count(op) for op in ("bn_scale_shift", "batch_norm_act_")) == 4
    with torch.no_grad():
        judge([y], [plain(inputs())], [double(plain, inputs())])
        model.downsample = None
        with pytest.raises(RuntimeError, match=r"."):
            model(inputs())


def outcome(model, x):
    """What a call gives: its result, or the exception it raises."""
    try:
        with torch.no_grad():
            return model(x)
    except (RuntimeError, ValueError) as error:
        return type(error)


def check_same_outcome(change, x):
    model, plain = fused_resnet.fuse(bottleneck()), bottleneck()
    for m in (model, plain):
        change(m)
    ours, theirs = outcome(model, x), outcome(plain, x)
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        assert ours.dtype == theirs.dtype
        judge([ours], [theirs], [double(plain, x)])


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("norm", DTYPES, ids=str)
@pytest.mark.parametrize("rest", DTYPES, ids=str)
def test_mixed_dtypes(rest, norm):
    """A BatchNorm of another type than its convolution: half with float32 works, as in torch."""

    def change(model):
        model.to(rest)
        model.bn2.to(norm)

    check_same_outcome(change, inputs().to(rest))


@pytest.mark.parametrize("eps", [0.0, -1e-3])
def test_eps_is_left_to_torch(eps):
    check_same_outcome(lambda model: setattr(model.bn2, "eps", eps), inputs())


def test_channels_that_do_not_fit():
    check_same_outcome(lambda model: setattr(model, "bn2", nn.BatchNorm2d(9).eval()), inputs())
