"""The example scripts: what they write, what they say, and that a resumed training is the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from test_demo import is_png
from training import (
    ENVIRONMENT,
    EXAMPLES,
    IMAGEFOLDER,
    SMALL,
    make_images,
    same,
    state,
)

import fused_resnet
from fused_resnet import checkpoints


@pytest.fixture
def train(server, image_folder, tmp_path):
    """Trains on the images: the exit status and what was printed."""
    logs = iter(range(100))

    def run(*args, path=image_folder, output="output", **job):
        log = tmp_path / f"{next(logs)}.log"
        args = (path, "--output-dir", tmp_path / output, *SMALL, *args)
        return server.run(IMAGEFOLDER, *args, log=log, **job), log.read_text()

    return run


class Calm:
    """Stands in for resumable.Stop where no signal is expected."""

    def check(self):
        pass


# --- digits


def test_digits(tmp_path):
    """A whole run: both networks learn, and nothing is outside the rule."""
    command = [sys.executable, EXAMPLES / "train_digits.py", "--epochs", "6", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bounds are met" in done.stdout
    folder = tmp_path / "fused-resnet-digits"
    assert is_png(folder / "losses.png")
    content = json.loads((folder / "results.json").read_text())
    assert content["options"] == {"epochs": 6, "batch_size": 64, "lr": 0.1, "seed": 0}
    assert content["threads"] == 1
    assert min(content["accuracy"].values()) >= 0.97
    assert content["deviation"]["within"]
    assert [len(d) for d in content["deviation"]["seeds"].values()] == [9, 9]
    losses = content["losses"]
    assert len(losses["eager"]) == len(losses["fused"]) == 6 * (1347 // 64)
    assert len(losses["float64"]) == 10
    # The same weights, the same batches: the first loss differs by rounding alone.
    assert losses["eager"][0] == pytest.approx(losses["fused"][0], rel=1e-5)
    assert 0 < abs(losses["eager"][0] - losses["float64"][0]) < 1e-4


def distorted(model):
    """Stands in for a fuse whose results are slightly off."""
    with torch.no_grad():
        model[-1].weight *= 1.001
    return model


@pytest.mark.parametrize(
    ("args", "fuse", "words"),
    [
        (["--lr", "1e-6"], None, "FAILED: eager is below 97%; fused is below 97%"),
        ([], distorted, "fused deviates more than 2 times"),
        (["--batch-size", "2000"], None, "--batch-size must be at most 1347, got 2000"),
        (["--output", os.devnull], None, f"--output {os.devnull}: File exists"),
    ],
)
def test_digits_outside_the_bounds(tmp_path, monkeypatch, capsys, examples, args, fuse, words):
    import resumable
    import train_digits

    if fuse is not None:
        monkeypatch.setattr(fused_resnet, "fuse", fuse)
    monkeypatch.setattr(resumable, "Stop", lambda quiet: Calm())
    monkeypatch.setattr(train_digits, "SEEDS", 1)
    common = ["train_digits.py", "--epochs", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*common, *args])
    assert resumable.guarded(train_digits.main) == 1
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


# --- imagefolder


def test_imagefolder_with_everything(train, image_folder, tmp_path):
    """torchvision's network, every option, worker processes; the result is an ordinary file."""
    options = (
        *("--model", "resnet18", "--epochs", 2, "--workers", 2, "--amp", "--model-ema"),
        *("--model-ema-decay", 0.5, "--norm-weight-decay", 0, "--label-smoothing", 0.1),
        *("--lr", 0.01, "--lr-warmup-epochs", 1, "--weight-decay", 5e-5, "--momentum", 0.8),
    )
    status, text = train(*options, tiny=False)
    assert status == 0, text
    assert [line.split(":")[0] for line in text.splitlines()[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert "averaged" in text
    assert "lr 0.0001," in text
    assert "lr 0.01," in text
    path = tmp_path / "output" / "checkpoint.pth"
    assert list(path.parent.iterdir()) == [path]
    checkpoints.from_file("resnet18", path)  # as `fused-resnet demo --weights` reads it
    found = state(path.parent)
    groups = found["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0, 5e-5]
    assert len(groups[0]["params"]) == 2 * 20  # the weight and bias of each BatchNorm
    assert {group["momentum"] for group in groups} == {0.8}
    assert found["ema"]["n_averaged"] == 2 * 3
    assert found["recipe"]["classes"] == ["a", "b"]


def test_imagefolder_fuses(train, tmp_path):
    """Fused and not, a checkpoint holds the same; what training makes of it is judged elsewhere."""
    assert train("--epochs", 1)[0] == 0
    assert train("--epochs", 1, "--no-fuse", output="eager")[0] == 0
    fused, eager = state(tmp_path / "output")["model"], state(tmp_path / "eager")["model"]
    kinds = [{name: (t.shape, t.dtype) for name, t in of.items()} for of in (fused, eager)]
    assert kinds[0] == kinds[1]
    assert all(t.isfinite().all() for t in fused.values())
    assert any(not torch.equal(t, eager[name]) for name, t in fused.items()), "it did not fuse"


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--amp", "--model-ema", "--lr-warmup-epochs", 2, "--norm-weight-decay", 0),
        ("--workers", 1, "--lr-scheduler", "constant"),
    ],
    ids=["plain", "all", "workers"],
)
def test_resuming_is_bit_equal(train, tmp_path, options):
    assert train("--epochs", 3, *options, output="whole")[0] == 0
    assert train("--epochs", 1, *options)[0] == 0
    assert not same(state(tmp_path / "output"), state(tmp_path / "whole"))
    status, text = train("--epochs", 3, *options, "--resume", "auto")
    assert status == 0, text
    assert "1 epochs done" in text
    assert same(state(tmp_path / "output"), state(tmp_path / "whole"))
    # What is done is not done again.
    before = (tmp_path / "output" / "checkpoint.pth").stat()
    status, text = train("--epochs", 3, *options, "--resume", "auto")
    assert status == 0
    assert text.startswith("resumed")
    assert "loss" not in text
    assert (tmp_path / "output" / "checkpoint.pth").stat() == before


def test_resuming_from_a_file_elsewhere(train, tmp_path):
    assert train("--epochs", 1, output="first")[0] == 0
    first = tmp_path / "first" / "checkpoint.pth"
    kept = first.read_bytes()
    status, text = train("--epochs", 2, "--resume", first, output="second")
    assert status == 0
    assert f"resumed from {first}: 1 epochs done" in text
    assert first.read_bytes() == kept
    assert state(tmp_path / "second")["epochs"] == 2


def fails(result) -> str:
    """The one line of a run that failed."""
    status, text = result
    assert status == 1, text
    assert text.count("\n") == 1, text
    assert text.startswith("train_imagefolder.py: ")
    return text


def test_a_training_is_not_overwritten(train, tmp_path):
    assert train("--epochs", 1)[0] == 0
    path = tmp_path / "output" / "checkpoint.pth"
    kept = path.read_bytes()
    assert f"{path} exists: go on with --resume auto" in fails(train("--epochs", 1))
    assert f"{path} exists" in fails(train("--epochs", 2, "--resume", tmp_path / "other"))
    assert path.read_bytes() == kept


def test_checkpoints_that_do_not_fit(train, image_folder, tmp_path):
    assert train("--epochs", 1)[0] == 0
    path = tmp_path / "output" / "checkpoint.pth"
    kept = path.read_bytes()
    again = ("--epochs", 2, "--resume", "auto")
    three = make_images(tmp_path / "three", classes="abc")
    for options, job, words in (
        (["--model", "resnet18"], {}, "model was 'resnet50' there, and is 'resnet18' now"),
        (["--lr", 0.2], {}, "lr was 0.1 there, and is 0.2 now"),
        (["--model-ema"], {}, "model_ema was False there, and is True now"),
        ([], {"path": three}, "classes was ['a', 'b'] there, and is ['a', 'b', 'c'] now"),
    ):
        message = fails(train(*again, *options, **job))
        assert f"{path}: is of another training: {words}" in message
    # A network whose code has changed under the same name.
    message = fails(train(*again, tiny=False))
    assert f"{path}: model does not fit: " in message
    path.write_bytes(kept[: len(kept) // 2])
    assert f"{path}: damaged, or not a checkpoint: " in fails(train(*again))
    assert path.read_bytes() == kept[: len(kept) // 2]
    assert "No such file" in fails(train("--resume", tmp_path / "nothing.pth", output="other"))


def test_images_that_cannot_be_used(train, image_folder, tmp_path):
    assert f"{tmp_path / 'no' / 'train'}: No such file" in fails(train(path=tmp_path / "no"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "Couldn't find any class folder" in fails(train(path=tmp_path / "empty"))
    (tmp_path / "empty" / "train" / "a").mkdir()
    (tmp_path / "empty" / "train" / "a" / "notes.txt").touch()
    assert "Found no valid file for the classes a" in fails(train(path=tmp_path / "empty"))
    uneven = make_images(tmp_path / "uneven", classes="abc")
    for file in (uneven / "val" / "b").iterdir():
        file.unlink()
    assert f"{uneven / 'val'}: Found no valid file for the classes b" in fails(train(path=uneven))
    (uneven / "val" / "b").rmdir()
    message = fails(train(path=uneven))
    assert f"must have the classes of {uneven / 'train'}, but 1 are in only one" in message
    assert message.endswith(": b\n")
    assert not (tmp_path / "output").exists()
    (tmp_path / "output").touch()
    assert "--output-dir" in fails(train())


def test_wrong_usage(server, image_folder, tmp_path):
    for i, (args, words) in enumerate(
        [
            (["--model", "vgg11"], "invalid choice: 'vgg11'"),
            (["--workers", -1], "invalid count value: '-1'"),
            (["--epochs", 0], "invalid positive number value: '0'"),
            (["--lr-scheduler", "step"], "invalid choice: 'step'"),
        ]
    ):
        log = tmp_path / f"{i}.log"
        assert server.run(IMAGEFOLDER, image_folder, *args, log=log) == 2
        assert words in log.read_text()


def test_a_loss_that_is_not_finite(train, tmp_path):
    assert train("--epochs", 1)[0] == 0
    kept = (tmp_path / "output" / "checkpoint.pth").read_bytes()
    message = fails(train("--epochs", 5, "--lr", 1e30, output="other"))
    assert "the loss is nan; try a smaller --lr" in message
    assert (tmp_path / "output" / "checkpoint.pth").read_bytes() == kept
    assert not list((tmp_path / "other").iterdir())


def test_models_on_offer_are_torchvisions():
    assert set(fused_resnet.models.__all__) <= set(torchvision.models.list_models())
