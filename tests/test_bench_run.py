"""What a run measures by default, what it skips, and how a later one goes on with it."""

import json
import time

import pytest
import torch

from bench import __main__ as bench
from bench import cases, machine, page, results, run
from bench.cases import Case, Work
from bench.layers import table
from fused_resnet import measure
from fused_resnet.measure import EAGER, OURS, PEER, Runner, Variant


def names(capsys, *options):
    assert bench.main(["--list", *options]) == 0
    return capsys.readouterr().out.split()


def test_the_default():
    """Three networks: inference of 1 and 16 images, training on 8, in two types."""
    expected = {
        f"{what}/b{batch}/{dtype}"
        for network in ("resnet18", "resnet50", "resnext50_32x4d")
        for what, batches in ((network, (1, 16)), (f"train/{network}", (8,)))
        for batch in batches
        for dtype in ("fp32", "bf16")
    }
    found = [case.name for case in run.selected(bench.parse([]))]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_the_default_takes_half_an_hour():
    """Whatever its cases take: here, each all that it may, and then each a tenth."""
    asked = bench.parse([])
    for part in (1.0, 0.1):
        spent, caps = 0.0, []
        for left in range(18, 0, -1):
            caps.append(run.cap_of(asked, spent, left))
            spent += part * caps[-1]
        assert 0 < min(caps) <= 200 <= max(caps)
        assert spent <= 30 * 60 + 18
    assert run.cap_of(bench.parse(["--select", "resnet18/*"]), 0.0, 1) is None


def test_everything(capsys):
    found = set(names(capsys, "--full"))
    for name in (
        "resnet101/b256/fp16",
        "train/wide_resnet50_2/b128/bf16",
        "block/resnext50_32x4d.layer3.1/b32/fp32",
        "conv_wgrad/512x14x14-3x3g32-512-relu/b8/bf16",
    ):
        assert name in found
    assert names(capsys, "--full", "--batch", "2", "--select", "resnet18/*") == [
        f"resnet18/b2/{dtype}" for dtype in ("fp32", "bf16", "fp16")
    ]


class Cases:
    """In the place of all there are: each doubles; one may do something else."""

    def __init__(self, monkeypatch, **memory):
        self.made = []
        self.doing = {}
        several = [
            Case(name, "", 1, "fp32", lambda name=name: self.make(name), memory.get(name, 0))
            for name in ("resnet18", "resnet50", "resnet101")
        ]
        monkeypatch.setattr(run, "selected", lambda args: several)
        monkeypatch.setattr(machine, "copy_bandwidth", lambda device, pace: 1e10)
        monkeypatch.setattr(machine, "peak_flops", lambda device, dtype, pace: 1e11)
        monkeypatch.setattr(run, "commit", lambda: "abc")
        self.threads = torch.get_num_threads()

    def make(self, name):
        self.made.append(name)
        self.doing.get(name, lambda: None)()
        runner = Runner(lambda x: 2 * x)
        several = [Variant(kind, kind, lambda: runner) for kind in (EAGER, OURS)]
        return Work(several, [torch.ones(1)], torch.full((1,), 2.0).double(), 1, None)

    def run(self, output, *options):
        self.made = []
        words = ["--full", "--output", str(output), "--seconds", "0", *options]
        return bench.main([*words, "--threads", str(self.threads)])


NAMES = ["resnet18", "resnet50", "resnet101"]


def interrupt():
    raise KeyboardInterrupt


def test_it_goes_on_with_what_is_there(tmp_path, monkeypatch, capsys):
    output = tmp_path / "full.json"
    fake = Cases(monkeypatch)
    fake.doing["resnet101"] = interrupt
    assert fake.run(output) == 130
    assert fake.made == NAMES
    fake.doing.clear()
    assert fake.run(output) == 0
    assert fake.made == ["resnet101"]
    assert f"{output} has 2 cases; 1 are left" in capsys.readouterr().out
    rows = results.read(output)["results"]
    assert [row["what"] for row in rows] == [name for name in NAMES for _ in range(2)]
    assert fake.run(output) == 0
    assert fake.made == []


def test_it_does_not_go_on_elsewhere(tmp_path, monkeypatch, capsys):
    output = tmp_path / "full.json"
    fake = Cases(monkeypatch)
    assert fake.run(output) == 0
    monkeypatch.setattr(run, "commit", lambda: "def")
    assert fake.run(output) == 1
    assert "does not go on with other conditions: commit abc and def" in capsys.readouterr().err
    monkeypatch.setattr(run, "commit", lambda: "abc")
    assert fake.run(output, "--size", "32") == 1
    assert "size 224 and 32" in capsys.readouterr().err
    output.write_text("{")
    assert fake.run(output) == 1
    assert "is not JSON" in capsys.readouterr().err


def test_what_needs_too_much_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    output = tmp_path / "full.json"
    monkeypatch.setattr(machine, "available_memory", lambda device: 2 * 10**9)
    fake = Cases(monkeypatch, resnet50=3 * 10**9)

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")

    fake.doing = {"resnet18": lambda: time.sleep(5), "resnet101": exhausted}
    assert fake.run(output, "--cap", "0.2") == 0
    out = capsys.readouterr().out
    assert "SKIPPED resnet18/b1/fp32: it was not done within 0 s" in out
    assert "SKIPPED resnet50/b1/fp32: needs about 3.0 GB of memory, 2.0 are there" in out
    assert "SKIPPED resnet101/b1/fp32: CUDA out of memory. Tried to\n" in out
    assert fake.made == ["resnet18", "resnet101"]
    assert fake.run(output) == 0
    assert fake.made == []
    content = json.loads(output.read_text())
    assert len(content["skipped"]) == 3
    page.write([("x", content)], tmp_path / "x.html")
    assert "needs about 3.0 GB" in (tmp_path / "x.html").read_text()


def test_what_fails_does_not_stop_everything(tmp_path, monkeypatch, capsys):
    """With --full; elsewhere it does."""
    output = tmp_path / "full.json"
    fake = Cases(monkeypatch)

    def fail():
        raise ValueError("no such\nthing")

    fake.doing["resnet50"] = fail
    for made in (NAMES, []):
        assert fake.run(output) == 1
        assert fake.made == made
        assert "FAILED resnet50/b1/fp32: ValueError: no such\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such"):
        bench.main(["--output", str(tmp_path / "x.json"), "--seconds", "0"])


def test_time_limits_within_each_other():
    """The outer one ends a peer's preparation without passing for its failure."""

    def slow():
        time.sleep(5)

    x = torch.ones(1)
    several = [Variant("eager", EAGER, lambda: Runner(lambda x: x)), Variant("peer", PEER, slow)]
    pace = measure.Pace(0, 1, 1, 0)
    for patience in (None, 3.0):
        start = time.monotonic()
        with (
            pytest.raises(run.Overtime, match="it was not done within"),
            measure.at_most(0.2, "it was not done", run.Overtime),
        ):
            measure.measure(several, [x], x.double(), pace, patience=patience)
        assert time.monotonic() - start < 3


def test_memory():
    """Of ResNet-50 a training step in float64 takes what eager keeps of it, about."""
    layers = table("resnet50", 224)
    step = cases.memory_of(layers, steps=True)
    assert step == pytest.approx(8 * 21.9e6, rel=0.03)  # 43.8 MB in two bytes
    assert cases.memory_of(layers, steps=False) == 8 * 3 * 64 * 112 * 112
    assert 0 < machine.available_memory("cpu") < 2**50
