"""timm's ResNets, fused and frozen; another module's classes, imported only when timm is."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import (
    ENGINES,
    LAYOUTS,
    SEEDS,
    Ops,
    away_from_zero,
    double,
    images,
    on,
    runs_fused,
    settle,
)
from tolerances import judge
from torch import nn

import fused_resnet

timm = pytest.importorskip("timm", reason="timm is not installed")

NAMES = ("resnet18", "resnet26d", "resnext50_32x4d", "seresnet18")

#: name -> what is not its default. What they have beside a ResNet: a deep stem and an average pool
#: in the shortcut, attention, a stem without pooling, anti-aliasing, random depth, dropped blocks.
SMALL = {"layers": (1, 2, 1, 1), "channels": (16, 24, 32, 40)}
VARIANTS = {
    "wide_resnet50_2": {},
    "resnet26t": {},
    "seresnext26d_32x4d": {},
    "ecaresnet26t": {},
    "resnetrs50": {},
    "seresnetaa50d": {},
    "resnetblur50": {},
    "resnet50c": {"drop_path_rate": 0.5},
    "resnet34d": {"drop_block_rate": 0.2},
    "resnetaa34d": {"drop_block_rate": 0.2, "drop_path_rate": 0.2},
}


def network(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=10, **kwargs)
    return settle(model, seed, images(seed + 100, 8, 64))


def variant(name, seed=0):
    return away_from_zero(network(name, seed, **SMALL, **VARIANTS[name]))


def step(model, x):
    """The output and the gradients of a training step, whatever is random in it being the same."""
    torch.manual_seed(0)
    y = model.train()(x.to(model.fc.weight.dtype))
    y.square().sum().backward()
    return [y], [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    """Fused and frozen, in both layouts, by the rule; what is timm's own is named in the report."""
    found = {"fused": [], **{engine: [] for engine in ENGINES}}
    for seed in SEEDS:
        plain = network(name, seed)
        model = fused_resnet.fuse(copy.deepcopy(plain))
        frozen = fused_resnet.freeze(plain, example=images(9, 1, 33))
        assert not fused_resnet.report(model).unfused
        for layout in LAYOUTS:
            x = images(seed, 2, 49).contiguous(memory_format=layout)
            with torch.no_grad():
                assert runs_fused(model, x)
                rest = plain(x), double(plain, x)
                found["fused"].append((model(x), *rest))
                for engine in ENGINES:
                    found[engine].append((on(frozen, engine)(x), *rest))
    for outputs in found.values():
        judge(*zip(*outputs, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    """Everything is fused around what is timm's own."""
    found = [[] for _ in range(5)]
    for seed in SEEDS:
        plain = variant(name, seed)
        models = fused_resnet.fuse(copy.deepcopy(plain)), plain, copy.deepcopy(plain).double()
        assert not fused_resnet.report(models[0]).unfused
        x = images(seed, 4, 65)
        frozen = fused_resnet.freeze(plain, example=x[:1])
        with torch.no_grad():
            outputs = [m(x.to(m.fc.weight.dtype)) for m in models]
            found[0].append(outputs)
            found[1].append((frozen(x), *outputs[1:]))
        # In float64 no rounding decides on which side of a ReLU a value falls.
        models[0].double()
        with Ops() as ops:
            steps = [step(models[0], x)]
        assert ops.names.count("bn_finalize") == len(fused_resnet.report(models[0]))
        steps += [step(models[2], x)]
        for i in (0, 1):
            found[2 + i] += (
                (ours, exact, exact) for ours, exact in zip(*(s[i] for s in steps), strict=True)
            )
        assert models[0].state_dict().keys() == plain.state_dict().keys()
        moved = ([b for b in m.buffers() if b.is_floating_point()] for m in models[::2])
        found[4] += ((ours, exact, exact) for ours, exact in zip(*moved, strict=True))
    for results in found:
        judge(*zip(*results, strict=True))


def test_report_names_the_deep_stem():
    model = fused_resnet.fuse(network("resnet26d", **SMALL))
    entries = {e.conv: e.bn for e in fused_resnet.report(model)}
    assert [entries[f"conv1.{i}"] for i in (0, 3, 6)] == ["conv1.1", "conv1.4", "bn1"]
    model.conv1.register_forward_hook(lambda *args: calls.append(1))
    calls, x = [], images(0, 1, 65)
    with torch.no_grad():
        model(x)
    assert calls == [1]
    model.conv1[2] = nn.SiLU()
    reasons = {e.conv: e.reason for e in fused_resnet.report(model)}
    assert "SiLU" in reasons["conv1.6"]


@pytest.mark.parametrize("act", [nn.ReLU, nn.Identity, nn.SiLU])
def test_conv_norm_act(act):
    """A BatchNorm that holds its activation."""
    found = [[], []]
    for seed in SEEDS:
        torch.manual_seed(seed)
        plain = timm.layers.ConvNormAct(3, 8, 3, act_layer=act)
        settle(plain, seed, images(seed + 100, 4, 9))
        models = fused_resnet.fuse(copy.deepcopy(plain)), plain, copy.deepcopy(plain).double()
        (entry,) = fused_resnet.report(models[0])
        assert (entry.conv, entry.bn) == ("conv", "bn")
        assert entry.fused == (act is not nn.SiLU)
        x = images(seed, 2, 9)
        with torch.no_grad():
            assert runs_fused(models[0], x) == entry.fused
        for results, train in zip(found, (False, True), strict=True):
            outputs = [m.train(train)(x.to(m.conv.weight.dtype)) for m in models]
            for m, y in zip(models, outputs, strict=True):
                m.zero_grad()
                y.square().sum().backward()
            results.append(outputs)
            results += zip(*([p.grad for p in m.parameters()] for m in models), strict=True)
    for results in found:
        judge(*zip(*results, strict=True))


def test_blocks_of_batch_norms_with_an_activation():
    """The last would put its ReLU before the sum: such blocks run as they are, and are named."""
    norm = timm.layers.BatchNormAct2d
    plain = network("resnet18", norm_layer=norm, **SMALL)
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), images(0, 1, 65)
    entries = fused_resnet.report(model)
    assert all("BatchNormAct2d" in e.reason for e in entries)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_swaps_and_back():
    model, plain = network("resnet18"), network("resnet18")
    kinds = [type(m) for m in model.modules()]
    fused_resnet.fuse(model)
    assert isinstance(model, timm.models.resnet.ResNet)
    assert list(model.state_dict()) == list(plain.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert [type(m) for m in fused_resnet.unfuse(model).modules()] == kinds


def test_features():
    """timm's other ways in."""
    plain, x = network("resnet18"), images(0, 2, 49)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    models = model, plain, copy.deepcopy(plain).double()
    with torch.no_grad():
        for layout in LAYOUTS:
            y = x.contiguous(memory_format=layout)
            outputs = [m.forward_features(y.to(m.fc.weight.dtype)) for m in models]
            assert outputs[0].stride() == outputs[1].stride()
            judge(*([y] for y in outputs))
        found = [m.forward_intermediates(x.to(m.fc.weight.dtype))[1] for m in models]
    assert len(found[0]) == 5
    judge(*found)


def test_training():
    ours, plain, exact = (network("resnet18").train() for _ in range(3))
    fused_resnet.fuse(ours), exact.double()
    for m in (ours, plain, exact):
        x = images(0, 4, 65).to(next(m.parameters()).dtype)
        m(x).square().sum().backward()
    judge(*([p.grad for p in m.parameters()] for m in (ours, plain, exact)))


def test_obstacles():
    model, plain = fused_resnet.fuse(network("resnet18")), network("resnet18")
    x = images(0, 1, 33)
    for m in (model, plain):
        m.layer1[0].act1 = nn.SiLU()
        m.layer2[0].drop_path = nn.Dropout(0.5).eval()
        m.layer3[0].se = nn.Sigmoid()
        m.set_grad_checkpointing()
    with torch.no_grad():
        judge([model(x)], [plain(x)], [double(plain, x)])
    reasons = {entry.conv: entry.reason for entry in fused_resnet.report(model)}
    assert "SiLU" in reasons["layer1.0.conv1"]
    assert reasons["layer2.0.conv2"] is None
    assert reasons["layer3.0.conv1"] is None


def test_import_stays_away_from_timm(request):
    code = "import sys, fused_resnet as f, torch; f.fuse(torch.nn.ReLU())"
    code += "; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)


def test_the_first_network_of_a_process(request):
    """Its root is looked at before anything else has brought the twins in."""
    code = "import sys, timm, fused_resnet as f; m = f.fuse(timm.create_model('resnet18'))"
    code += "; sys.exit(type(m).__module__ != 'fused_resnet.timm_blocks')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)
