"""The benchmark runner: every case runs, and the core it shares with the demo is honest."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tolerances
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import __main__ as bench
from bench import blocks, cases, ops, report, training, training_ops
from bench.cases import Asked
from bench.layers import NETWORKS, layers
from fused_resnet import checkpoints, engines, measure, variants
from fused_resnet.measure import EAGER, OURS, PEER, Error, Pace, Runner, Spread, Variant
from fused_resnet.variants import FROZEN, TUNED, WINOGRAD

ROOT = Path(__file__).resolve().parent.parent
ONCE = Pace(seconds=0, least_rounds=2, most_rounds=2, sample_seconds=0)


def run(*args, timeout=900):
    command = [sys.executable, "-m", "bench", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module", autouse=True)
def choices(tmp_path_factory):
    """What is tuned here is kept where nobody else looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    options = ("--threads", 1, "--output", folder / "r.json", "--chart", folder / "r.png")
    done = run("--smoke", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return folder, done.stdout


def test_smoke(smoke):
    folder, text = smoke
    content = json.loads((folder / "r.json").read_text())
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    rows = content["results"]
    every_op = {*ops.WORKS, *training_ops.WORKS}
    assert {row["what"] for row in rows} == {"resnet18", "train/resnet18", *every_op}
    assert {row["dtype"] for row in rows} == {"fp32", "bf16"}
    for row in rows:
        assert row["floor"]["seconds"] > 0
        if row["kind"] != PEER:
            assert row["within"]
            assert row["seconds"]["median"] > 0
            assert row["speedup"]["median"] > 0
        if row["what"] == "resnet18":
            assert row["variant"] in text
            assert row["to_peer"] or row["why_not"]
        if row["what"] == "train/resnet18" and row["kind"] != PEER:
            assert row["kept"] > 0
            assert row["growth"] > 0
    env = content["environment"]
    for name in ("commit", "processor", "threads", "isa", "load", "date", "build"):
        assert name in env
    assert env["threads"] == 1


def test_markdown(smoke, capsys):
    folder, _ = smoke
    assert bench.main(["--table", str(folder / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| resnet18, images/s | b2, fp32 | b2, bf16 |"
    frozen = next(line for line in lines if line.startswith("| frozen |"))
    row = next(
        row
        for row in json.loads((folder / "r.json").read_text())["results"]
        if row["variant"] == "frozen" and row["dtype"] == "fp32"
    )
    assert f"| **{2 / row['seconds']['median']:.1f} ({row['speedup']['median']:.2f}x)" in frozen
    assert any(line.startswith("| conv_bn_act, batch 2, bf16 |") for line in lines)


def test_without_rich(tmp_path):
    """It does without: lines of text, and the tables as Markdown."""
    code = "import sys; sys.modules['rich'] = None; from bench.__main__ import main; "
    options = ["--smoke", "--select", "bn_act/512*", "--output", str(tmp_path / "r.json")]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "[1/2] bn_act/512x1x1/b2/fp32" in done.stderr
    assert "| bn_act, batch 2, bf16 | eager NCHW | eager NHWC | native |" in done.stdout
    assert "a copy moves" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["environment"]["device"] == "cpu"


def test_every_network_and_layer_has_a_case(capsys):
    assert bench.main(["--list", "--batch", "16"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names))
    for model, dtype in itertools.product(checkpoints.MODELS, ("fp32", "bf16")):
        assert f"{model}/b16/{dtype}" in names
    assert "conv_bn_act/3x224x224-7x7s2-64-relu/b16/fp32" in names
    assert "conv_bn_act/512x7x7-1x1-2048-add-relu/b16/bf16" in names
    for network in NETWORKS:
        for layer in layers([network], 224):
            assert f"conv_bn_act/{layer}/b16/fp32" in names
            assert f"conv_wgrad/{layer}/b16/fp32" in names
        for block in blocks.distinct(network, 224):
            assert f"block/{network}.{block.name}/b16/bf16" in names
    assert len(layers(["resnet50"], 224)) == 24
    assert len(blocks.distinct("resnet50", 224)) == 8
    assert bench.main(["--list", "--layers", "resnet18", "--select", "block/*"]) == 0
    assert len(capsys.readouterr().out.split()) == 7 * 4  # one of layer1, two of each other


def made(name, networks=("resnet50",)):
    """The work of the case of that name."""
    *_, batch, dtype = name.split("/")
    asked = Asked([int(batch[1:])], [dtype], 224, "cpu", networks)
    several = itertools.chain(*(of.cases(asked) for of in (blocks, ops, training_ops)))
    return next(case for case in several if case.name == name).make()


def test_flops_and_bytes_of_a_layer():
    # A 1x1 convolution with stride 2 reads a quarter of its input.
    layer = "256x56x56-1x1s2-512/b1/fp32"
    x, w, y = 256 * 28 * 28, 512 * 256, 512 * 28 * 28
    for op, moved in {
        "conv_bn_act": x + w + y,
        "conv_wgrad": x + w + y,
        "conv_dgrad": 4 * x + w + y,  # the rest of the gradient is zeros, which are written
    }.items():
        work = made(f"{op}/{layer}")
        assert work.flops == 2 * 512 * 28 * 28 * 256
        assert work.bytes == 4 * moved


@pytest.mark.parametrize(
    "name",
    [
        "conv_dgrad/256x14x14-3x3s2-512-relu/b1/fp32",
        "conv_wgrad/128x56x56-3x3g32-128-relu/b1/fp32",
        "global_avg_pool/512x7x7/b2/bf16",
        "eltwise_act_backward/512x7x7/b2/fp16",
        "block/resnet18.layer4.0/b1/fp32",
        "train/block/resnext50_32x4d.layer4.0/b2/fp32",
    ],
)
def test_cases_that_no_smoke_run_has(name):
    work = made(name, ("resnet18", "resnext50_32x4d"))
    several = [v for v in work.variants if v.kind != PEER]
    results = measure.measure(several, work.inputs, work.truth, ONCE)
    assert {r.kind for r in results} == {EAGER, OURS}
    assert all(r.within for r in results), results


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--select", "resnet51/*"], 1, "--list"),
        (["--dtype", "int7"], 2, "fp32"),
        (["--batch", "0"], 2, "positive number"),
        (["--table", "nowhere.json"], 1, "nowhere.json: cannot be read"),
        (["--launches", "--select", "resnet51"], 1, "no such network"),
        (["--device", "cuda"], 1, "is_available() is False"),
    ],
)
def test_wrong_usage(args, code, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        got = bench.main(args)
    except SystemExit as stop:
        got = stop.code
    assert got == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2, "command": "bench"}'])
def test_results_that_are_none(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert bench.main(["--table", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# The core.


def test_the_rule_is_the_one_of_the_tests():
    for name in ("MAX_FACTOR", "MAX_FLOOR", "MEAN_FACTOR", "MEAN_FLOOR"):
        assert getattr(measure, name) == getattr(tolerances, name)


def test_within():
    eager = Error(1e-4, 1e-3)
    assert measure.within(Error(1.5e-4, 2e-3), eager)
    assert not measure.within(Error(1.6e-4, 2e-3), eager)
    assert not measure.within(Error(1.5e-4, 2.1e-3), eager)
    assert not measure.within(Error(math.nan, 0), eager)
    assert not measure.within(Error(0, math.nan), eager)


def test_error_of():
    truth = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert measure.error_of(torch.tensor([4.0, -7.0]), truth) == (1 / 16, 1 / 8)
    assert measure.error_of(torch.zeros(2), torch.zeros(2).double()) == (0, 0)
    assert math.isnan(measure.error_of(torch.tensor([4.0, math.nan]), truth).max)


def test_spread():
    assert Spread.of([3.0]) == (3, 3, 3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (3, 2, 4, 1, 5)


def variant(name, kind, output=1.0, calls=None):
    def run(x):
        if calls is not None:
            calls.append(name)
        return x * output

    return Variant(name, kind, lambda: Runner(run))


def test_what_is_wrong_is_not_timed():
    x, truth = torch.ones(1, 2), torch.ones(1, 2).double()
    several = [
        variant("eager", EAGER),
        variant("right", OURS),
        variant("wrong", OURS, 1.1),
        variant("nan", OURS, math.nan),
        variant("inexact", PEER, 1.1),
    ]
    results = {r.variant: r for r in measure.measure(several, [x], truth, ONCE)}
    assert [name for name, r in results.items() if r.within] == ["eager", "right"]
    assert [name for name, r in results.items() if r.samples] == ["eager", "right", "inexact"]
    assert "outside the rule" in results["wrong"].why_not
    text = json.dumps([r.as_dict() for r in results.values()], allow_nan=False)
    assert json.loads(text)[3]["error"] == {"mean": None, "max": None}
    assert "not finite" in report_text([r.as_dict() for r in results.values()])


def report_text(rows):
    from rich.console import Console

    known = {"case": "x/b1", "what": "x", "images": 1, "flops": 1, "bytes": None}
    known["floor"] = {"seconds": None}
    console = Console(width=150)
    with console.capture() as capture:
        console.print(report.terminal([{**known, **row} for row in rows]))
    return capture.get()


def test_a_peer_that_fails_is_named_and_ours_is_not_forgiven():
    def broken():
        raise RuntimeError("no such thing\nand more")

    x, truth = torch.ones(1, 2), torch.ones(1, 2).double()
    eager = variant("eager", EAGER)
    results = measure.measure([eager, Variant("peer", PEER, broken)], [x], truth, ONCE)
    assert results[1].why_not == "no such thing"
    assert results[1].as_dict()["seconds"] is None
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.measure([eager, Variant("ours", OURS, broken)], [x], truth, ONCE)


def test_a_peer_that_takes_too_long_is_named():
    def endless():
        while True:
            time.sleep(0.01)

    x, truth = torch.ones(1, 2), torch.ones(1, 2).double()
    several = [variant("eager", EAGER), Variant("peer", PEER, endless), variant("ours", OURS)]
    results = measure.measure(several, [x], truth, ONCE, patience=0.1)
    assert results[1].why_not == "not ready within 0 s"
    assert results[2].samples


def test_clock():
    """It is given the call and how often to make it; a sample is one call's share."""
    calls = []
    assert measure.clock("cpu")(lambda: calls.append(time.sleep(0.01)), 3) >= 0.01
    assert len(calls) == 3
    given = []
    pace = Pace(seconds=0, least_rounds=2, most_rounds=2, sample_seconds=6)
    samples = measure.interleave(
        {"a": int}, pace, seconds=lambda call, repeats: given.append(repeats) or 2.0
    )
    assert samples == {"a": [2.0, 2.0]}
    assert given == [1, 3, 3]


class FakeEvent:
    """A CUDA event on a clock that calls and flushes move."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize(("cold", "flushed"), [(False, 0), (True, 3)])
def test_clock_of_a_gpu(cold, flushed, monkeypatch):
    """What empties the cache between calls is not timed; there is no GPU in this test."""
    flushes = []

    def zero(t):
        if t.numel():
            flushes.append(t.numel())
            FakeEvent.now += 10

    def call():
        FakeEvent.now += 1

    properties = types.SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    with FakeTensorMode():
        assert measure.clock("cuda", cold)(call, 3) == pytest.approx(1)
    assert flushes == [2000] * flushed


def test_the_larger_error_of_eager_sets_what_is_allowed():
    x, truth = torch.ones(1, 2), torch.ones(1, 2).double()
    several = [variant("exact", EAGER), variant("other layout", EAGER, 1.1)]
    several += [variant("ours", OURS, 1.1), variant("worse", OURS, 1.25)]
    several += [dataclasses.replace(variant("may lose more", OURS, 1.25), times=2)]
    results = {r.variant: r for r in measure.measure(several, [x], truth, ONCE)}
    assert results["ours"].within
    assert not results["worse"].within
    assert results["may lose more"].within


@pytest.mark.parametrize(
    ("variant", "high", "rounds", "fails"),
    [
        (TUNED, 0.99, 5, True),
        (FROZEN, 0.99, 5, True),
        (WINOGRAD, 0.99, 5, True),
        (TUNED, 1.0, 5, False),
        (TUNED, 0.99, 4, False),  # of too few to tell
        ("fused lean", 0.99, 5, False),  # it is slower on purpose
    ],
)
def test_what_is_tuned_must_not_be_slower_than_eager(variant, high, rounds, fails):
    speed = {"median": 0.95, "low": 0.9, "high": high}
    row = {"variant": variant, "within": True, "samples": [1.0] * rounds, "speedup": speed}
    assert bool(report.why_failed(row)) == fails
    wrong = {**row, "within": False, "why_not": "its error is outside the rule"}
    assert report.why_failed(wrong) == "its error is outside the rule"


def test_variants_that_are_tuned():
    """A smoke run has none."""
    x = torch.randn(2, 3, 32, 32)
    network = checkpoints.build("resnet18")
    runner = variants.tuned(network.eval(), torch.float32, x).prepare()
    trained, _ = training.prepared(network, TUNED, x, torch.float32)
    for model in (runner.run, trained):
        assert model.layer1[0].tuned.keys() == {"conv1", "conv2"}
    assert not any(hasattr(m, "tuned") for m in network.modules())


@pytest.mark.parametrize(("host", "device", "longer"), [(0.0, 2.0, 2.0), (0.02, 0.001, 0.02)])
def test_clock_in_sequence(host, device, longer, monkeypatch):
    """A call costs what it keeps busy longest; there is no GPU in this test."""

    def call():
        time.sleep(host)
        FakeEvent.now += device

    held = []
    monkeypatch.setattr(torch.cuda, "_sleep", held.append, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    took = measure.clock_in_sequence("cuda")(call, 2)
    assert longer <= took < longer + 0.1
    assert len(held) == 2


def test_a_variant_on_each_engine():
    asked = []
    v = Variant("fused", OURS, lambda: Runner(lambda x: asked.append(engines.wish()) or x))
    native, *_ = cases.on_each_engine(v, "cpu", torch.float64, engines.OPS)
    assert native.name == "fused on native"
    native.prepare().run(torch.ones(1))
    assert asked == ["native"]
    assert engines.wish() == "auto"


def test_a_reference_must_be_finite():
    with pytest.raises(ValueError, match="not finite"):
        measure.measure([variant("eager", EAGER)], [], torch.tensor([math.inf]), ONCE)


def test_variants_take_turns():
    calls = []
    named = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    pace = Pace(seconds=0, least_rounds=3, most_rounds=9, sample_seconds=0)
    samples = measure.interleave(named, pace)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls[-9:]) == "abcbcacab"


def test_ratios_are_taken_round_by_round():
    """A machine that halves its speed for everyone changes no ratio."""
    slow, fast, peer = (measure.Result(kind, kind) for kind in (EAGER, OURS, PEER))
    slow.samples, fast.samples, peer.samples = [2.0, 4.0, 2.0], [1.0, 2.0, 1.0], [4.0, 8.0, 4.0]
    measure._compare([slow, fast, peer])
    assert fast.speedup == (2, 2, 2, 2, 2)
    assert fast.to_peer == (4, 4, 4, 4, 4)
    assert slow.speedup == (1, 1, 1, 1, 1)


def test_json_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "x.json"
    measure.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        measure.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
