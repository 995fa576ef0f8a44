"""Files of frozen models: what is saved comes back, and no other file is taken."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from models import basic, bottleneck, frozen_layers, images, small
from test_cli import Trap
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import Bottleneck, ResNet

import fused_resnet
from fused_resnet import engines, load_frozen, save_frozen

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

X = images(0, 2, 33)


@pytest.fixture(scope="module")
def frozen():
    return fused_resnet.freeze(small(), example=X)


@pytest.fixture
def path(tmp_path, frozen):
    save_frozen(frozen, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def described(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fused_resnet"])


def rewrite(path, change=lambda tensors, description: None, key="fused_resnet"):
    """The file with its tensors or its description changed."""
    tensors, description = safetensors.load_file(path), described(path)
    change(tensors, description)
    safetensors.save_file(tensors, path, {key: json.dumps(description)})


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_to_the_bit(tmp_path, dtype):
    frozen = fused_resnet.freeze(small(), example=X, dtype=dtype)
    for i, m in enumerate(frozen_layers(frozen)):
        m.engine = ("native", "vendor")[i % 2]
    save_frozen(frozen, tmp_path / "model")
    again = load_frozen(tmp_path / "model", small(1).train())
    assert torch.equal(again(X.to(dtype)), frozen(X.to(dtype)))
    assert (again.dtype, again.device) == (dtype, frozen.device)
    assert repr(again) == repr(frozen)
    assert again.errors == frozen.errors
    assert not any(m.training for m in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    for (name, ours), theirs in zip(
        again.state_dict().items(), frozen.state_dict().values(), strict=True
    ):
        assert ours.stride() == theirs.stride(), name
    with pytest.raises(RuntimeError, match="cannot be trained"):
        again.train()


def test_the_model_given_is_neither_changed_nor_read(path, frozen):
    model = small(1).train()
    before = copy.deepcopy(model.state_dict())
    again = load_frozen(path, model)
    assert model.training
    assert type(model) is type(small())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_()
    assert torch.equal(again(X), frozen(X))
    assert torch.equal(load_frozen(path, fused_resnet.fuse(model))(X), frozen(X))


def architecture():
    """What ``small`` is, without values worth keeping."""
    return ResNet(Bottleneck, [1] * 4, num_classes=10, width_per_group=16)


def test_a_model_without_memory(path, frozen):
    """Of a model on meta nothing is read, and of the file nothing once it is loaded."""
    again = load_frozen(path, on_meta(architecture))
    path.unlink()
    assert again.device.type == "cpu"
    assert torch.equal(again(X), frozen(X))


def test_a_process_of_its_own(path, frozen, tmp_path, request):
    torch.save((X, frozen(X)), tmp_path / "data.pt")
    code = """
import sys, torch, torchvision, fused_resnet
from torchvision.models.resnet import Bottleneck, ResNet
x, expected = torch.load(sys.argv[2], weights_only=True)
with torch.device("meta"):
    model = ResNet(Bottleneck, [1] * 4, num_classes=10, width_per_group=16)
torch.set_num_threads(1)
print(torch.equal(fused_resnet.load_frozen(sys.argv[1], model)(x), expected))
"""
    command = [sys.executable, "-c", code, path, tmp_path / "data.pt"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=request.config.rootpath
    )
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_layers_and_blocks_that_are_not_frozen(tmp_path):
    """An unfolded layer, a pruned pair, a hooked block's, tied weights, integer buffers."""
    source = nn.Sequential(bottleneck(), nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        source[1].weight[3] *= 1e20
        source[2].weight[3] *= 1e20
    hooked = bottleneck(1)
    hooked.conv1.register_forward_hook(lambda m, args, y: y * 2)
    model = nn.Sequential(nn.Conv2d(24, 24, 1), hooked, source[1:])
    model.insert(0, nn.Conv2d(24, 24, 1))
    model[0].weight = model[1].weight
    frozen = fused_resnet.freeze(model.eval(), example=images(0, 1, 9, channels=24))
    assert [m.folded for m in frozen_layers(frozen)] == [False]
    save_frozen(frozen, tmp_path / "model")
    x = images(1, 2, 9, channels=24) / 1e10
    assert torch.equal(load_frozen(tmp_path / "model", model)(x), frozen(x))


def test_an_engine_that_is_not_here(path):
    def change(tensors, description):
        layers = [*description["layers"].values()][:3]
        for engine, layer in zip(("triton", "cudnn", "warp"), layers, strict=True):
            layer["engine"] = engine

    rewrite(path, change)
    again = load_frozen(path, small())
    why_not = engines.why_not("triton", "conv_bn_act", "cpu", torch.float32)
    first = "native" if why_not else "triton"
    assert [m.engine for m in frozen_layers(again)][:3] == [first, "native", "native"]


def test_what_is_written(path, frozen):
    content = described(path)
    assert content["version"] == fused_resnet.__version__
    assert content["dtype"] == "float32"
    assert content["layers"]["layer1.0.conv2"] == {
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "act": "relu",
        "residual": False,
        "folded": True,
        "engine": frozen.model.layer1[0].conv2.engine,
        "winograd": False,
    }
    assert safetensors.load_file(path).keys() == frozen.model.state_dict().keys()


def test_a_file_is_replaced_at_once(path, frozen, monkeypatch):
    """What fails on the way leaves the old file, and nothing beside it."""
    before = path.read_bytes()
    other = fused_resnet.freeze(small(1), example=X)

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_frozen(other, path)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_frozen(other, path)
    assert os.listdir(path.parent) == [path.name]
    assert torch.equal(load_frozen(path, small())(X), other(X))


def refused(path, model, *words):
    with pytest.raises(RuntimeError) as caught:
        load_frozen(path, model)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 1000, 0.5, 0.999])
def test_a_file_that_is_truncated(path, keep):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(path, small(), "not a safetensors file, or damaged")


def test_a_pickle_is_not_opened(path, tmp_path):
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, path)
    refused(path, small(), "not a safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_somebody_else(path):
    rewrite(path, key="format")
    refused(path, small(), "not a frozen model")


def test_a_file_of_another_format(path):
    rewrite(path, lambda tensors, description: description.update(format=3, version="9.1"))
    refused(path, small(), "format 3 of fused_resnet 9.1", "reads format 2")


DAMAGES = {
    "no-layers": lambda d: d.pop("layers"),
    "no-format": lambda d: d.pop("format"),
    "dtype": lambda d: d.update(dtype="nn"),
    "no-dtype": lambda d: d.update(dtype=7),
    "layers": lambda d: d.update(layers=[1]),
    "layer": lambda d: d["layers"]["conv1"].pop("engine"),
    "errors": lambda d: d.update(errors=3),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_description_that_is_damaged(path, damage):
    rewrite(path, lambda tensors, description: damage(description))
    refused(path, small(), "its description is damaged")


def halved(tensors, description):
    tensors["layer2.0.conv1.shift"] = tensors["layer2.0.conv1.shift"].half()


MISFITS = {
    "missing": (lambda t, d: t.pop("layer2.0.conv1.shift"), "the file has no layer2.0.conv1.shift"),
    "extra": (lambda t, d: t.update(more=t["fc.bias"].clone()), "the model has no more"),
    "shape": (lambda t, d: t.update({"fc.bias": t["fc.bias"][:9].clone()}), "in the file (9,)"),
    "dtype": (halved, "layer2.0.conv1.shift is (32,) of torch.float32, in the file"),
    "stride": (
        lambda t, d: d["layers"]["layer2.0.conv2"].update(stride=[1, 1]),
        "layer2.0.conv2 has stride [2, 2], the file [1, 1]",
    ),
    "act": (lambda t, d: d["layers"]["conv1"].pop("act"), "conv1 has act relu, the file None"),
    "not-folded": (
        lambda t, d: d["layers"]["conv1"].update(folded=False),
        "the file has no conv1.scale",
    ),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit(path, change, words):
    rewrite(path, change)
    refused(path, small(), "does not fit ResNet", words)


def test_another_architecture(path):
    refused(path, small(layers=2), "the file has no layer1.1.conv1.weight", "more")
    refused(path, basic(), "does not fit BasicBlock")
    pruned = small()
    prune.l1_unstructured(pruned.layer2[0].conv1, "weight", 0.5)
    with torch.no_grad():
        pruned(X)
    refused(path, pruned, "the model has no layer2.0.conv1.shift")


def test_a_buffer_that_no_file_holds(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.register_buffer("mean", torch.ones(1), persistent=False)

        def forward(self, x):
            return self.body(x - self.mean)

    frozen = fused_resnet.freeze(Shifted().eval(), example=X)
    save_frozen(frozen, tmp_path / "model")
    assert torch.equal(load_frozen(tmp_path / "model", Shifted())(X), frozen(X))
    refused(tmp_path / "model", on_meta(Shifted), "mean")


class Remembering(nn.Module):
    def forward(self, x):
        return x

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_bad_arguments(path, frozen, tmp_path):
    for wrong in (small(), None, frozen.state_dict()):
        with pytest.raises(TypeError, match="save_frozen: frozen must be what freeze returns, got"):
            save_frozen(wrong, path)
    with pytest.raises(TypeError, match="Module"):
        load_frozen(path, None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_frozen(tmp_path / "nowhere", small())
    with pytest.raises(IsADirectoryError):
        load_frozen(tmp_path, small())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_frozen(frozen, tmp_path / "nowhere" / "model")
    odd = fused_resnet.freeze(nn.Sequential(Remembering()).eval(), example=X)
    with pytest.raises(TypeError, match=r"got dict for '0\._extra_state'"):
        save_frozen(odd, path)


def test_without_safetensors(path, frozen, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for do in (lambda: save_frozen(frozen, path), lambda: load_frozen(path, small())):
        with pytest.raises(ModuleNotFoundError, match=r"pip install fused_resnet\[serve\]"):
            do()
