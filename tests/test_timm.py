"""timm's ResNets, fused and frozen; another module's classes, imported only when timm is."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import ENGINES, LAYOUTS, SEEDS, double, images, on, runs_fused, settle
from tolerances import judge
from torch import nn

import fused_resnet

timm = pytest.importorskip("timm", reason="timm is not installed")

#: name -> how many conv/BatchNorm pairs stay unfused
NAMES = {"resnet18": 0, "resnet26": 0, "resnet26d": 1, "resnext50_32x4d": 0, "seresnet18": 19}


def network(name, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=10)
    return settle(model, seed, images(seed + 100, 8, 64))


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    """Fused and frozen, in both layouts, by the rule; what is timm's own is named in the report."""
    found = {"fused": [], **{engine: [] for engine in ENGINES}}
    for seed in SEEDS:
        plain = network(name, seed)
        model = fused_resnet.fuse(copy.deepcopy(plain))
        frozen = fused_resnet.freeze(plain, example=images(9, 1, 33))
        assert len(fused_resnet.report(model).unfused) == NAMES[name]
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
        m.set_grad_checkpointing()
    with torch.no_grad():
        judge([model(x)], [plain(x)], [double(plain, x)])
    reasons = {entry.conv: entry.reason for entry in fused_resnet.report(model)}
    assert "SiLU" in reasons["layer1.0.conv1"]
    assert "Dropout" in reasons["layer2.0.conv2"]
    assert reasons["layer3.0.conv1"] is None


def test_import_stays_away_from_timm(request):
    code = "import sys, fused_resnet as f, torch; f.fuse(torch.nn.ReLU())"
    code += "; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)
