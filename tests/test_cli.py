"""The command line program: what it says, and what it says when it is used wrongly."""

import functools
import hashlib
import http.server
import os
import pickle
import platform
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torchvision

import fused_resnet
from fused_resnet import checkpoints, cli, engines, facts

WITHOUT_EXTRAS = """
import sys
for name in ("matplotlib", "onnxruntime", "openvino", "rich", "skimage"):
    sys.modules[name] = None
from fused_resnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


def program(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs a command that must fail: its message, after checking that it is one line."""

    def run(*args):
        output = tmp_path / "results"
        assert cli.main([*map(str, args), "--output", str(output)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("fused-resnet: ")
        assert printed.err.count("\n") == 1, printed.err
        assert not (output / "results.json").exists()
        return printed.err

    return run


@pytest.fixture(scope="module")
def state():
    return torchvision.models.resnet18().state_dict()


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A", "A, family 25 model 17"),
        ("model name\t: A", "A"),
        ("CPU part\t: 0xd0c", platform.processor() or platform.machine()),
    ],
)
def test_processor(lines, name, tmp_path):
    """What is tuned or measured on one is not taken for another of the same name."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{lines}\n\nprocessor\t: 1\n{lines}\n")
    assert facts.processor(cpuinfo) == name


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torchvision", "triton", "processor", "GPU", "CUDA kernels", "built with"):
        assert word in text
    assert torch.__version__ in text
    assert fused_resnet.__version__ in text
    for engine in engines.ENGINES:
        assert f"  {engine} " in text
    for engine in engines.ENGINES:
        if (reason := engines.unavailable(engine)) is not None:
            assert reason in text


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_info_tells_the_instruction_set_in_force(tmp_path, isa):
    done = program("-m", "fused_resnet", "info", cwd=tmp_path, FUSED_RESNET_ISA=isa)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CPU kernels"))
    assert line.split()[-1] in (isa, "generic")  # generic alone where the processor is no x86


def test_extras_that_are_missing(tmp_path):
    done = program("-c", WITHOUT_EXTRAS, "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = program("-c", WITHOUT_EXTRAS, "demo", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "rich, matplotlib, skimage" in done.stderr
    assert "pip install fused_resnet[demo]" in done.stderr


def test_help_and_version(capsys):
    for command in ([], ["demo"], ["info"], ["report"], ["check"], ["freeze"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        assert "usage: fused-resnet" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert fused_resnet.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["COMMAND"]),
        (["fly"], ["fly", "info", "demo"]),
        (["demo", "--model", "resnet51"], ["resnet51", *checkpoints.MODELS]),
        (["demo", "--batch", "0"], ["positive number", "'0'"]),
        (["demo", "--batch", "two"], ["positive number", "'two'"]),
        (["demo", "--dtype", "int8"], ["int8", "fp32", "bf16"]),
        (["demo", "--fast"], ["--fast"]),
        (["report"], ["--model"]),
        (["check", "--model", "m", "--input", "224"], ["3x224x224", "'224'"]),
        (["check", "--model", "m", "--input", "3x0x9"], ["3x224x224", "'3x0x9'"]),
        (["freeze", "--model", "m"], ["--output"]),
        (["freeze", "--model", "m", "--output", "f", "--batch", "0"], ["positive number"]),
    ],
)
def test_wrong_usage(capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_engine_that_is_none(tmp_path):
    done = program("-m", "fused_resnet", "info", cwd=tmp_path, FUSED_RESNET_ENGINE="warp")
    assert done.returncode == 1
    assert "auto, reference, native, triton, vendor" in done.stderr
    assert done.stderr.rstrip().endswith("got 'warp'")


def test_weights_that_are_missing(tmp_path, fails):
    path = tmp_path / "nothing.pth"
    message = fails("demo", "--model", "resnet18", "--weights", path)
    assert str(path) in message
    assert "No such file" in message
    assert "directory" in fails("demo", "--model", "resnet18", "--weights", tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_weights_that_are_truncated(tmp_path, fails, state, keep):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = fails("demo", "--model", "resnet18", "--weights", path)
    assert f"{path}: not a file of weights, or damaged" in message


@pytest.mark.parametrize("content", [b"not weights at all\n", b"\x80\x02.", bytes(range(256))])
def test_weights_that_are_something_else(tmp_path, fails, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert "not a file of weights" in fails("demo", "--model", "resnet18", "--weights", path)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_weights_are_not_executed(tmp_path, fails, save):
    path, place = tmp_path / "weights.pth", tmp_path / "sprung"
    save({"conv1.weight": Trap(place)}, path)
    message = fails("demo", "--model", "resnet18", "--weights", path)
    assert "weights_only=True" in message
    assert "mkdir" in message
    assert "Re-running" not in message
    assert not place.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2)])
def test_weights_that_are_no_state_dict(tmp_path, fails, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    message = fails("demo", "--model", "resnet18", "--weights", path)
    assert "not a state_dict of tensors" in message


def test_weights_of_another_network(tmp_path, fails, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    message = fails("demo", "--model", "resnet50", "--weights", path)
    assert f"{path}: does not fit resnet50" in message
    assert "layer1.0.conv3.weight" in message


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "model": s}])
def test_weights_that_fit(tmp_path, wrap):
    torch.manual_seed(1)
    source = torchvision.models.resnet18(num_classes=7).eval()
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    model = checkpoints.from_file("resnet18", tmp_path / "weights.pth")
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_images_that_cannot_be_used(tmp_path, fails):
    quick = ("demo", "--quick", "--no-download", "--model", "resnet18", "--images")
    assert "there is no such folder" in fails(*quick, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert ".jpeg" in fails(*quick, empty)
    (empty / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    message = fails(*quick, empty)
    assert "broken.png: cannot be read as an image" in message


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "file")]) == 1
    assert "--output" in capsys.readouterr().err


def test_a_network_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        start = time.monotonic()
        assert checkpoints.no_answer(f"http://127.0.0.1:{port}/x", 0.3)
        assert time.monotonic() - start < 5
    assert "refused" in checkpoints.no_answer(f"http://127.0.0.1:{port}/x", 5.0)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Stands in for where torchvision's weights come from: serves what is put in its folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = SimpleNamespace(name="TEST_V1", url="")
    answer = SimpleNamespace(DEFAULT=weights)
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: answer)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def serve(state, digest=None):
        torch.save(state, folder / "new.pth")
        content = (folder / "new.pth").read_bytes()
        name = f"resnet18-{digest or hashlib.sha256(content).hexdigest()[:8]}.pth"
        (folder / "new.pth").rename(folder / name)
        weights.url = f"http://127.0.0.1:{server.server_port}/{name}"

    yield serve
    server.shutdown()
    server.server_close()


def test_weights_from_the_network(mirror, state, capfd):
    mirror(state)
    for _ in range(2):  # the second time from this machine
        model, name = checkpoints.from_torchvision("resnet18")
        assert name == "TEST_V1"
        assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_weights_from_the_network_that_are_not_what_they_should_be(mirror, state, capfd):
    mirror(state, "01234567")
    with pytest.raises(checkpoints.NotThereError, match="invalid hash value"):
        checkpoints.from_torchvision("resnet18")
