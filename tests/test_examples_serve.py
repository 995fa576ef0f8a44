"""The example of serving, as a user runs it."""

import subprocess
import sys

import pytest
import torch
import torchvision
from models import double
from tolerances import judge
from training import ENVIRONMENT, EXAMPLES

import fused_resnet
from fused_resnet.int8 import Int8Conv


def serve(folder, *args):
    command = [sys.executable, EXAMPLES / "serve.py", "--size", "64", "--output", folder / "out"]
    done = subprocess.run(
        [*command, *args], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 requests from 8 threads, each as from one: True" in done.stdout
    return folder / "out"


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source = torchvision.models.resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    out = serve(tmp_path, "--weights", "mine.pth", "--export", "onnx")
    assert sorted(p.name for p in out.iterdir()) == ["model.onnx", "model.safetensors"]
    frozen = fused_resnet.load_frozen(out / "model.safetensors", torchvision.models.resnet18())
    session = onnxruntime.InferenceSession(out / "model.onnx")
    x = torch.rand(3, 3, 64, 64)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for ours in (frozen(x), torch.from_numpy(y)):
            judge([ours], [source(x)], [double(source, x)])


def test_int8(tmp_path):
    source = torchvision.models.resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    out = serve(tmp_path, "--weights", "mine.pth", "--int8")
    frozen = fused_resnet.load_frozen(out / "model.safetensors", torchvision.models.resnet18())
    assert sum(isinstance(m, Int8Conv) for m in frozen.modules()) == 19
    assert 0 < frozen.errors["calibration"]["top5"] <= 1
    assert frozen(torch.rand(3, 3, 64, 64)).shape == (3, 1000)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    source = torchvision.models.resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    out = serve(tmp_path, "--weights", "mine.pth", "--export", "aotinductor")
    package = torch._inductor.aoti_load_package(str(out / "model.pt2"))
    x = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        judge([package(x)], [source(x)], [double(source, x)])
