"""Modules beside what torch makes of the same module: for tests of behaviour, not of values."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import ENGINES, assert_identical, placed
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

import fused_resnet
from fused_resnet import BatchNormAct2d, ConvBNAct2d

CHANNELS = 6


class Unit(NamedTuple):
    build: Callable[[], nn.Module]
    plain: Callable[[nn.Module, Tensor], Tensor]  # the module's forward, unfused


def _unfused(m: nn.Module, x: Tensor) -> Tensor:
    return fused_resnet.unfuse(m)(x)


def _projecting(kind: type[nn.Module]) -> nn.Module:
    out = 4 * kind.expansion
    shortcut = nn.Sequential(conv1x1(CHANNELS, out), nn.BatchNorm2d(out))
    return fused_resnet.fuse(kind(CHANNELS, 4, downsample=shortcut))


UNITS = {
    "BatchNormAct2d": Unit(
        lambda: BatchNormAct2d(CHANNELS), lambda m, x: F.relu(nn.BatchNorm2d.forward(m, x))
    ),
    "ConvBNAct2d": Unit(
        lambda: ConvBNAct2d(CHANNELS, 5, 3, padding=1), lambda m, x: F.relu(m.bn(m.conv(x)))
    ),
    "Sequential": Unit(
        lambda: fused_resnet.fuse(
            nn.Sequential(nn.Conv2d(CHANNELS, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        ),
        _unfused,
    ),
    "BasicBlock": Unit(lambda: _projecting(BasicBlock), _unfused),
    "Bottleneck": Unit(lambda: _projecting(Bottleneck), _unfused),
}

#: Engines a module can be asked to run on.
MODULE_ENGINES = ("auto", *ENGINES)


def batch_norms(m: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in m.modules() if isinstance(child, nn.BatchNorm2d)]


def build(name: str) -> nn.Module:
    """A module with statistics, scales and shifts that do something."""
    m = UNITS[name].build()
    with torch.no_grad():
        for bn in batch_norms(m):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            bn.weight.normal_()
            bn.bias.normal_()
    return m.eval()


def image(batch: int = 2, height: int = 5, width: int = 4) -> Tensor:
    return torch.randn(batch, CHANNELS, height, width)


def outcome(f: Callable[[], Any]) -> Any:
    """What ``f`` returns or raises."""
    try:
        return f()
    except Exception as error:
        return error


def judge_all(ours: Any, theirs: Any, truth: Any) -> None:
    """Hold each tensor of a nest against eager torch's by the rule; what counts, exactly."""
    for a, b, exact in zip(*map(tree_leaves, (ours, theirs, truth)), strict=True):
        if a.is_floating_point():
            judge([a], [b], [exact])
        else:
            assert_identical(a, b)


def alike(
    name: str,
    x: Tensor,
    change: Callable[[nn.Module], Any] = lambda m: None,
    engine: str = "auto",
    train: bool = False,
) -> Any:
    """Hold a module against torch on ``x``: the same result or type of error, and the same state.

    Returns:
        The module's output, or the exception.
    """
    m = build(name).train(train)
    change(m)
    twin, exact = copy.deepcopy(m), copy.deepcopy(m).double()
    plain = UNITS[name].plain
    with fused_resnet.use_engine(engine):
        ours = outcome(lambda: m(x))
    theirs = outcome(lambda: plain(twin, x))
    assert isinstance(ours, type(theirs)), (ours, theirs)
    if isinstance(ours, Tensor):
        # The stride of a dimension of one says nothing of the layout; torch's BatchNorm changes it.
        assert placed(ours) == placed(theirs)
        judge([ours], [theirs], [plain(exact, x.double())])
        judge_all(m.state_dict(), twin.state_dict(), exact.state_dict())
    else:
        assert_identical(m.state_dict(), twin.state_dict(), "states")
    return ours
