"""report, check, tune and freeze: which network is meant, what they find, how they fail."""

import copy
import sys
from types import SimpleNamespace

import given_times
import pytest
import torch
import torchvision
from models import double, frozen_layers
from tolerances import judge
from torch import nn

import fused_resnet
from fused_resnet import cli, sources, variants
from fused_resnet.frozen_conv import FrozenConv
from fused_resnet.int8 import Int8Conv

FILE = """
import torch
from torch import nn
import neighbour

CHANNELS = 8


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 9),
    )


def own():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(9))


class Several(nn.Module):
    def forward(self, x):
        return {"x": x}


def infinite():
    model = build()
    model[0].weight.data[:] = torch.inf
    return model


def broken():
    return neighbour.nothing


def number():
    return 3


def deep():
    return nn.Sequential(*build()[:3], nn.Conv2d(CHANNELS, 8, 1), nn.BatchNorm2d(8), *build()[3:])
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "networks.py").write_text(FILE)
    (tmp_path / "neighbour.py").touch()
    return f"{tmp_path}/networks.py"


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail: its message, after checking that it is one line."""

    def run(*args):
        assert cli.main([*map(str, args)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("fused-resnet: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err

    return run


SMALL = ("--input", "3x20x20")


def test_report(file, capsys):
    assert cli.main(["report", "--strict", "--model", "torchvision:resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["conv1", "fused"]
    assert lines[-1] == "20 of 20 conv/BatchNorm pairs fused"
    own = ("--model", f"{file}:own")
    assert cli.main(["report", *own]) == 0
    text = capsys.readouterr().out
    assert "bn: it has another number of channels than conv" in text
    assert cli.main(["report", *own, "--strict"]) == 1
    assert capsys.readouterr().out == text


def test_report_on_timm(capsys, fails):
    pytest.importorskip("timm", reason="timm is not installed")
    assert cli.main(["report", "--model", "timm:resnet18"]) == 0
    assert "20 of 20 conv/BatchNorm pairs fused" in capsys.readouterr().out
    assert "timm has no resnet18x; did you mean resnet18" in fails(
        "report", "--model", "timm:resnet18x"
    )


WRONG = {
    "resnet50": "did you mean torchvision:resnet50?",
    "resnet": sources.FORMS,
    "": sources.FORMS,
    "torchvision:": sources.FORMS,
    "torchvision:resnet51": "torchvision has no resnet51; did you mean resnet50",
    "torchvision:zzzzzz": "torchvision has no zzzzzz\n",
    "keras:resnet50": sources.FORMS,
    "nowhere.py:build": "there is no such file",
    "FILE": "name a function of it",
    "FILE:biuld": "no such function; did you mean build?",
    "FILE:CHANNELS": "no such function",
    "FILE:broken": "AttributeError: module 'neighbour' has no attribute 'nothing' (line 33)",
    "FILE:number": "must give a torch.nn.Module, got int",
}


@pytest.mark.parametrize(("model", "words"), WRONG.items(), ids=WRONG)
def test_a_model_that_is_none(file, fails, model, words):
    for command in (("report",), ("check",), ("tune",), ("freeze", "--output", "unwritten")):
        message = fails(*command, "--model", model.replace("FILE", file))
        assert f"--model {model.replace('FILE', file)}: " in message
        assert words in message


def test_a_file_that_fails(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "half.py").write_text("import torch\n\ndef build(:\n")
    assert "SyntaxError" in fails("report", "--model", f"{tmp_path}/half.py:build")
    (tmp_path / "lost.py").write_text("import torch\nimport nothing_of_that_name\n")
    message = fails("report", "--model", f"{tmp_path}/lost.py:build")
    assert "No module named 'nothing_of_that_name' (line 2)" in message


def test_a_file_with_the_name_of_a_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "import dataclasses, torch\n\n@dataclasses.dataclass\nclass Size:\n    n: 'int' = 4\n\n"
    text += "def build():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, Size().n, 1))\n"
    (tmp_path / "copy.py").write_text(text)
    assert cli.main(["report", "--model", f"{tmp_path}/copy.py:build"]) == 0
    assert sys.modules["copy"] is copy


def test_caffe(monkeypatch, tmp_path, fails, capsys):
    """Its weights are not a state_dict; what it lacks, it says."""
    calls = []

    def load(prototxt, caffemodel=None):
        calls.append((prototxt, caffemodel))
        return torchvision.models.resnet18()

    monkeypatch.setitem(sys.modules, "fused_resnet.caffe", SimpleNamespace(load=load))
    weights = tmp_path / "net.caffemodel"
    command = ("report", "--model", "caffe:a/deploy.prototxt")
    assert cli.main([*command]) == 0
    assert cli.main([*command, "--weights", str(weights)]) == 0
    assert calls == [("a/deploy.prototxt", None), ("a/deploy.prototxt", weights)]

    def lacking(prototxt, caffemodel=None):
        raise ImportError("pip install fused_resnet[caffe]")

    monkeypatch.setitem(sys.modules, "fused_resnet.caffe", SimpleNamespace(load=lacking))
    assert "pip install fused_resnet[caffe]" in fails(*command)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check(file, capsys, dtype):
    assert cli.main(["check", "--model", f"{file}:build", *SMALL, "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 conv/BatchNorm pairs fused" in text
    assert text.count("within the rule") == 2
    assert "32 images" in text  # of nine outputs each


def test_check_of_an_architecture(capsys):
    command = ["check", "--model", "torchvision:resnet18", "--input", "3x64x64", "--seed", "3"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "weights: seed 3" in text
    assert "20 of 20" in text


@pytest.mark.parametrize("train", [False, True])
def test_tune(file, capsys, monkeypatch, tmp_path, train):
    folder = given_times.keep_in(monkeypatch, tmp_path)
    given_times.prefer(monkeypatch, "eager")
    command = ["tune", "--model", f"{file}:build", *SMALL, "--batch", "2", "--dtype", "bf16"]
    assert cli.main([*command, *(["--train"] if train else [])]) == 0
    first, summary, choice, kept = capsys.readouterr().out.splitlines()
    assert first.split() == ["0", "eager", "fused"]
    assert summary == "1 of 1 conv/BatchNorm pairs fused"
    assert choice.startswith(f"{'Sequential' if train else 'conv_bn_act'} 2x3x20x20 * 8x3x3x3 ")
    (path,) = folder.glob("tuned-*.json")
    assert kept == f"kept in {path}"


@pytest.mark.parametrize("name", ["fuse", "freeze"])
def test_check_finds_an_error(file, capsys, monkeypatch, name):
    right = getattr(variants, name)

    def wrong(model, **kwargs):
        model = copy.deepcopy(model)
        model[-1].weight.data *= 1.001
        return right(model, **kwargs)

    monkeypatch.setattr(variants, name, wrong)
    assert cli.main(["check", "--model", f"{file}:build", *SMALL]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    ours = {"fuse": "fused", "freeze": "frozen"}[name]
    other = {"fused": "frozen", "frozen": "fused"}[ours]
    assert lines[ours].endswith("OUTSIDE THE RULE")
    assert lines[other].endswith("within the rule")


def test_a_network_that_cannot_be_checked(file, fails):
    message = fails("check", "--model", f"{file}:build", "--input", "4x20x20")
    assert "on images of 4x20x20 (--input): " in message
    assert "4 channels" in message
    assert "must return one tensor, got dict" in fails("check", "--model", f"{file}:Several")
    assert "NaN or infinity" in fails("check", "--model", f"{file}:infinite", *SMALL)


def test_freeze(file, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    output = tmp_path / "net.safetensors"
    command = ["freeze", "--model", f"{file}:build", *SMALL, "--output", str(output)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert f"{output}: " in text
    assert "1 of 1" in text
    assert "NOT TRAINED" not in text
    source = sources.load(f"{file}:build", None).model
    frozen = fused_resnet.load_frozen(output, source)
    x = torch.rand(4, 3, 20, 20)
    with torch.no_grad():
        judge([frozen(x)], [source(x)], [double(source, x)])


def test_freeze_in_8_bits(file, tmp_path, capsys, fails):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    photos, output = tmp_path / "photos", tmp_path / "net"
    photos.mkdir()
    command = ["freeze", "--model", f"{file}:deep", *SMALL, "--dtype", "int8"]
    command += ["--output", str(output)]
    assert "--dtype int8 needs --calibration" in fails(*command)
    assert "--calibration is for --dtype int8" in fails(*command, "--dtype", "fp32",
                                                        "--calibration", photos)  # fmt: skip
    assert f"--calibration {photos}: it has no images" in fails(*command, "--calibration", photos)
    for i in range(3):
        pixels = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(photos / f"{i}.png")
    assert cli.main([*command, "--calibration", str(photos)]) == 0
    text = capsys.readouterr().out
    assert "calibration  mean error" in text
    assert "of the five likeliest classes" in text
    frozen = fused_resnet.load_frozen(output, sources.load(f"{file}:deep", None).model)
    assert [type(m) for m in frozen_layers(frozen)] == [FrozenConv, Int8Conv]
    assert frozen(torch.rand(4, 3, 20, 20)).shape == (4, 9)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_freeze_with_weights(tmp_path, capsys, suffix):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    source = torchvision.models.resnet18(num_classes=7)
    weights, output = tmp_path / f"weights{suffix}", tmp_path / "net"
    save = safetensors.save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), weights)
    command = ["freeze", "--model", "torchvision:resnet18", "--input", "3x33x33"]
    assert cli.main([*command, "--dtype", "bf16", "--output", str(output)]) == 0
    assert "NOT TRAINED" in capsys.readouterr().out
    assert cli.main([*command, "--weights", str(weights), "--output", str(output)]) == 0
    assert "NOT TRAINED" not in capsys.readouterr().out
    frozen = fused_resnet.load_frozen(output, torchvision.models.resnet18(num_classes=7))
    assert torch.equal(frozen.model.fc.weight, source.fc.weight)


def test_weights_that_do_not_fit(file, tmp_path, fails):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    weights = tmp_path / "weights.safetensors"
    safetensors.save_file(nn.Linear(2, 2).state_dict(), weights)
    for model in (f"{file}:build", "torchvision:resnet18"):
        message = fails("report", "--model", model, "--weights", weights)
        assert f"{weights}: does not fit {model}: " in message
        assert 'Missing key(s) in state_dict: "' in message
    weights.write_bytes(weights.read_bytes()[:-1])
    message = fails("report", "--model", f"{file}:build", "--weights", weights)
    assert "not a safetensors file, or damaged" in message
    message = fails("report", "--model", f"{file}:build", "--weights", tmp_path / "a.safetensors")
    assert "cannot be read: No such file" in message


def test_output_that_cannot_be_written(file, tmp_path, fails):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    output = tmp_path / "nowhere" / "net"
    message = fails("freeze", "--model", f"{file}:build", *SMALL, "--output", output)
    assert f"--output {output}: No such file" in message


def test_a_device_that_is_not_there(file, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in fails("check", "--model", f"{file}:build", "--device", "cuda")
