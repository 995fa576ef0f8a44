"""Modules with a forward of their own: fused where it is proved, left alone where it is not."""

import copy
import functools
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from forwards import (
    CHANNELS,
    Alias,
    Appends,
    Branch,
    Flags,
    Functional,
    Global,
    Helper,
    Inherits,
    Layers,
    Loop,
    NoGrad,
    Options,
    OwnList,
    OwnName,
    OwnProjection,
    Plain,
    PreActivation,
    Random,
    ReadTwice,
    Remembers,
    Statistics,
    Truth,
    Twice,
    TwoInputs,
    WritesBetween,
    WritesInput,
    projection,
)
from models import Ops, double, frozen_layers, images, runs_fused, same, settle
from tolerances import judge
from torch import nn
from torchvision.models.googlenet import BasicConv2d

import fused_resnet

PROVED = {
    "plain": (lambda: Plain(), 2),
    "shortcut": (lambda: Plain(projection()), 3),
    "functional": (lambda: Functional(projection(nn.ReLU())), 3),
    "own projection": (OwnProjection, 2),
    "pre-activation": (PreActivation, 1),
    "two inputs": (TwoInputs, 2),
    "helper": (Helper, 2),
    "flags": (Flags, 2),
    "torchvision's": (lambda: BasicConv2d(CHANNELS, CHANNELS, kernel_size=3), 1),
}


def image(seed=0, dtype=torch.float64):
    return images(seed, 3, 9, channels=CHANNELS).to(dtype)


def inputs_of(model, dtype=torch.float64):
    count = len(inspect.signature(model.forward).parameters)
    return [image(seed, dtype) for seed in range(count)]


@pytest.mark.parametrize(("make", "pairs"), PROVED.values(), ids=PROVED)
def test_proved(make, pairs):
    torch.manual_seed(0)
    plain = make().double()
    model, xs = same(plain, *inputs_of(plain)), inputs_of(plain)
    entries = fused_resnet.report(model)
    assert len(entries) == pairs
    assert not entries.unfused
    assert fused_resnet.fuse(copy.deepcopy(plain), strict=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(model, type(plain))
    with Ops() as ops:
        model.train()(*xs)
    assert ops.names.count("bn_finalize") == pairs


def test_a_sum_is_part_of_the_convolution():
    """And so is a block's ReLU: one op for each convolution, and nothing in between."""
    model = fused_resnet.fuse(settle(Plain(), 0, image(1, torch.float32)))
    with torch.no_grad(), fused_resnet.use_engine("native"), Ops() as ops:
        model(image(dtype=torch.float32))
    assert ops.names == ["bn_scale_shift", "conv_bn_act"] * 2


def test_the_environment_of_a_forward():
    """What is around the function decides, too."""
    factor = 2

    class Closure(Layers):
        def forward(self, x):
            return self.bn1(self.conv1(x)) * factor

    assert "factor" in fused_resnet.report(fused_resnet.fuse(Closure()))[0].reason


LEFT = {
    Branch: "decides by 'x.sum()'",
    Loop: "for _ in range(2):",
    Twice: "called once",
    Remembers: "self.last",
    Appends: "self.seen",
    Random: "torch.rand",
    Global: "SCALE",
    Inherits: "super()",
    Statistics: "self.bn1.running_mean",
    OwnList: "len(self.seen)",
    Options: "positional",
    NoGrad: "decorated",
    OwnName: "'run' of its own",
    functools.partial(Truth, projection()): "decides by 'shortcut'",
    Alias: "another name",
    ReadTwice: "alone",
}


@pytest.mark.parametrize(("kind", "reason"), LEFT.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_left_alone(kind, reason):
    torch.manual_seed(0)
    plain = kind().double()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    entry = next(e for e in fused_resnet.report(model) if e.bn == "bn1")
    assert reason in entry.reason
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        fused_resnet.fuse(plain, strict=True)
    assert type(plain) is type(model)
    for x in (image(), -image()):
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        judge([model(x)], [expected], [expected])


@pytest.mark.parametrize(
    "make",
    [WritesInput, WritesBetween, lambda: Plain(nn.Sequential(nn.ReLU(inplace=True)))],
)
def test_writes_in_place(make):
    """Who reads a tensor before it is written to reads it before, and the caller's is written."""
    torch.manual_seed(0)
    plain = make().double()
    model, found = fused_resnet.fuse(copy.deepcopy(plain)), []
    for m in (model, plain):
        x = image()
        with torch.no_grad():
            found.append([m(x), x])
    assert not torch.equal(x, image())
    judge(*found, found[1])


def test_what_is_called_inside_of_a_chain_is_named():
    entries = fused_resnet.report(fused_resnet.fuse(Plain(nn.Sequential(nn.ReLU(inplace=True)))))
    assert all("shortcut" in e.reason for e in entries)


def no_shortcut(m):
    m.shortcut = None


def another_shortcut(m):
    m.shortcut = nn.AvgPool2d(3, 1, 1)


def sigmoid(m):
    m.relu = nn.Sigmoid()


def another_bn(m):
    torch.manual_seed(2)
    m.bn1 = nn.BatchNorm2d(CHANNELS).double()
    nn.init.uniform_(m.bn1.weight)


def group_norm(m):
    m.bn1 = nn.GroupNorm(2, CHANNELS).double()


def on_the_instance(m):
    m.forward = lambda x: m.bn1(m.conv2(x))


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (no_shortcut, False),
        (another_shortcut, True),
        (sigmoid, False),
        (another_bn, True),
        (group_norm, False),
        (on_the_instance, False),
    ],
)
def test_changed_after_fusing(change, still):
    """The module's own forward says what happens, and says it again to fuse."""
    torch.manual_seed(0)
    plain = Plain(projection()).double().eval()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    change(model)
    change(plain)
    with torch.no_grad():
        judge([model(image())], [plain(image())], [plain(image())])
    if change is not on_the_instance:
        assert (model.obstacle(image()) is None) == still
        assert still or fused_resnet.report(model)[0].reason
        assert type(fused_resnet.fuse(model)) is not Plain
        with torch.no_grad():
            judge([model(image())], [plain(image())], [plain(image())])


def test_flags_changed_after_fusing():
    torch.manual_seed(0)
    plain = Flags().double().eval()
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert model.obstacle(image()) is None
    for change in (lambda m: setattr(m, "power", 3), lambda m: setattr(m, "flag", False)):
        change(plain), change(model)
        assert "is another than when it was fused" in model.obstacle(image())
        with torch.no_grad():
            assert torch.equal(model(image()), plain(image()))
    assert fused_resnet.fuse(model).obstacle(image()) is None
    with torch.no_grad():
        judge([model(image())], [plain(image())], [plain(image())])


def test_class_changed_after_fusing(monkeypatch):
    model = fused_resnet.fuse(Helper()).eval()
    x = image(dtype=torch.float32)
    monkeypatch.setattr(Helper, "_tail", lambda self, y, x: y)
    with torch.no_grad():
        assert torch.equal(model(x), F.relu(model.bn1(model.conv1(x))))
    assert "_tail" in fused_resnet.report(model)[0].reason


@pytest.fixture
def pair():
    plain = settle(nn.Sequential(Plain(), Plain(projection())), 0, image(1, torch.float32))
    return fused_resnet.fuse(copy.deepcopy(plain)), plain


def test_swaps_and_back(pair):
    model, plain = pair
    kinds = [type(m) for m in model.modules()]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again.modules()] == kinds
        with torch.no_grad():
            again[0].conv1.weight.zero_()
            assert model[0].conv1.weight.any()
            assert runs_fused(again, image(dtype=torch.float32))
    fused_resnet.unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert vars(model[0]).keys() == vars(plain[0]).keys()


def test_hooks(pair):
    """On the module they are called; on what is inside, nothing is skipped."""
    model, _ = pair
    x, seen = image(dtype=torch.float32), []
    model[0].register_forward_hook(lambda m, args, y: seen.append("block"))
    with torch.no_grad():
        y = model(x)
        assert seen == ["block"]
        model[0].bn1.register_forward_hook(lambda m, args, y: seen.append("bn1"))
        judge([model(x)], [y], [double(model, x)])
    assert seen[1:3] == ["bn1", "block"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_read_from_outside(pair):
    model, plain = pair
    x = image(dtype=torch.float32)
    traced = torch.fx.symbolic_trace(model)
    assert traced.code == torch.fx.symbolic_trace(plain).code
    with torch.no_grad():
        expected, exact = plain(x), double(plain, x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(model, (x,))
        for m in (traced, torch.jit.script(model), torch.jit.trace(model, x), compiled):
            judge([m(x)], [expected], [exact])
        judge([exported.module()(x)], [expected], [exact])
    assert "fused_resnet.conv_bn_act" in exported.graph_module.code


def test_freeze(pair, tmp_path):
    model, plain = pair
    x = image(dtype=torch.float32)
    frozen = fused_resnet.freeze(model, example=x)
    assert len(frozen_layers(frozen)) == 5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    expected, exact = plain(x), double(plain, x)
    fused_resnet.save_frozen(frozen, tmp_path / "file")
    again = fused_resnet.load_frozen(tmp_path / "file", copy.deepcopy(plain).train())
    for m in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), again):
        judge([m(x)], [expected], [exact])
    assert torch.equal(again(x), frozen(x))
