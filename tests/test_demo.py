"""The demo, on small pictures: what it checks, what it writes, what it says."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fused_resnet import checkpoints, cli, demo, photographs, variants
from fused_resnet.measure import OURS, Runner, Variant

SMALL = ("--model", "resnet18", "--size", "64", "--photographs", "3", "--seconds", "0.1")
OFFLINE = ("--no-download", "--threads", "1")


def run(*args, cwd):
    command = [sys.executable, "-m", "fused_resnet", "demo", *SMALL, *OFFLINE, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def is_png(path: Path) -> bool:
    from PIL import Image

    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 400


def test_quick(tmp_path):
    done = run("--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "fused-resnet-demo"
    content = json.loads((folder / "results.json").read_text())
    assert is_png(folder / "chart.png")
    text = " ".join(done.stdout.split())
    for words in (
        "NOT TRAINED",
        "3 photographs of 64x64 from scikit-image",
        "fused-resnet-demo/results.json",
        "fused-resnet-demo/chart.png",
        "agree with torchvision",
    ):
        assert words in text
    assert content["photographs"] == list(photographs.IN_SCIKIT_IMAGE[:3])
    assert content["environment"]["versions"]["torch"] == torch.__version__
    rows = {row["variant"]: row for row in content["results"]}
    assert set(rows) == {"eager NCHW", "eager NHWC", "torch.compile", "fused", "frozen"}
    assert "--quick" in rows.pop("torch.compile")["why_not"]
    for row in rows.values():
        assert (row["batch"], row["dtype"]) == (1, "fp32")
        assert 0 < row["error"]["mean"] <= row["error"]["max"] < 1e-3
        assert row["within"]
        assert row["top5_shared"] == 1
        assert len(row["samples"]) >= 3
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    assert max(row["speedup"]["median"] for row in rows.values() if row["kind"] == "eager") >= 1


def test_checkpoint_folder_batches_and_compile(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    for i, (mode, suffix) in enumerate([("RGB", "jpg"), ("L", "png"), ("RGBA", "webp")]):
        Image.effect_noise((90, 70), 60).convert(mode).save(tmp_path / f"{i}.{suffix}")
    args = ("--weights", "mine.pth", "--images", ".", "--batch", "2", "--dtype", "bf16")
    done = run(*args, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights of mine.pth" in done.stdout
    assert "NOT TRAINED" not in done.stdout
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["photographs"] == ["0.jpg", "1.png", "2.webp"]
    for row in content["results"]:
        assert (row["batch"], row["dtype"], row["images"]) == (2, "bf16", 2)
        assert row["seconds"], row
        assert row["prepare_seconds"] > 0


def test_an_error_outside_the_rule_fails(tmp_path, monkeypatch, capsys):
    def broken(model, dtype, example):
        def prepare():
            runner = variants.fused(model, dtype).prepare()
            return Runner(lambda x: runner.run(x) * 1.001, runner.feed)

        return Variant("broken", OURS, prepare)

    monkeypatch.setattr(variants, "frozen", broken)
    threads = torch.get_num_threads()
    args = ["demo", "--quick", *SMALL, *OFFLINE, "--output", str(tmp_path / "out")]
    assert cli.main(args) == 1
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert "FAILED batch 1, fp32: broken: its error is outside the rule" in " ".join(text.split())
    assert "agree with torchvision" not in text
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    failed = next(row for row in rows if row["variant"] == "broken")
    assert failed["seconds"] is None
    assert failed["error"]["mean"] > 1e-5


def test_weights_that_give_nan(tmp_path, capsys):
    model = torchvision.models.resnet18()
    nn.init.constant_(model.fc.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    args = ["demo", "--quick", *SMALL, *OFFLINE, "--output", str(tmp_path / "out")]
    assert cli.main([*args, "--weights", str(tmp_path / "weights.pth")]) == 1
    assert "look at its weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_preprocessing_is_torchvisions(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    own = demo.preprocessing(argparse.Namespace(model=name, size=None))
    assert repr(own) == repr(weights.transforms())
    smaller = demo.preprocessing(argparse.Namespace(model=name, size=112))
    assert smaller.crop_size == [112]
    assert smaller.mean == own.mean


def test_photographs_inside_scikit_image():
    found = photographs.find(None)
    assert [path.name for path in found] == list(photographs.IN_SCIKIT_IMAGE)
    loaded = photographs.load(
        None, 2, demo.preprocessing(argparse.Namespace(model="resnet50", size=None))
    )
    assert loaded.pixels.shape == (2, 3, 224, 224)
    assert loaded.names == ["astronaut.png", "chelsea.png"]


@pytest.mark.parametrize(("count", "classes", "images"), [(3, 1000, 3), (3, 4, 33), (40, 2, 40)])
def test_few_outputs_are_judged_on_more_images(count, classes, images):
    pixels = torch.randn(count, 3, 8, 8)
    more = demo.enough(pixels, classes)
    assert len(more) == images
    assert torch.equal(more[:count], pixels)


def test_seeded_network_is_lively():
    """Its activations are of order one at every layer, its outputs differ from image to image."""
    pixels = torch.randn(5, 3, 64, 64)
    model, again = (checkpoints.seeded(checkpoints.build("resnet18"), pixels, 3) for _ in range(2))
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    seen = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.momentum == 0.1
            m.register_forward_hook(lambda m, args, y: seen.append(float(y.std())))
    with torch.no_grad():
        outputs = model(pixels)
    assert all(0.3 < value < 3 for value in seen)
    assert outputs.std(0).mean() > 0.01
    assert not torch.equal(
        checkpoints.seeded(checkpoints.build("resnet18"), pixels, 4).conv1.weight,
        model.conv1.weight,
    )


def test_plan_leaves_out_compilation_where_time_is_short():
    args = argparse.Namespace(quick=False, seconds=None)
    several = [variants.compiled(nn.Identity(), torch.float32)]
    kept, pace = demo.plan(args, several, share=demo.ENOUGH / 4)
    assert kept == several
    assert pace == demo.PACE
    left, pace = demo.plan(args, several, share=9.0)
    assert pace.seconds == 3
    with pytest.raises(demo.LeftOutError, match="too slow"):
        left[0].prepare()
