"""Two files of results beside each other: what is worse, what is better, and what is noise."""

import copy
import json

import pytest

from bench import __main__ as bench
from bench import compare, results
from bench.compare import FASTER, LESS, MORE, NOISE, SLOWER, UNKNOWN, WRONG
from fused_resnet.measure import Spread


def spread(*samples):
    return Spread.of(samples)._asdict()


CASE = {"case": "train/resnet18/b2/fp32", "what": "train/resnet18", "batch": 2, "dtype": "fp32"}
CASE |= {"images": 2, "flops": 1, "bytes": None, "prepare_seconds": 0.1, "to_peer": None}


def row(variant, kind, speedups, seconds=1.0, **more):
    samples = [seconds / s for s in speedups]
    ratios = {"speedup": spread(*speedups), "seconds": spread(*samples), "samples": samples}
    fine = {"within": True, "error": {"mean": 0.0, "max": 0.0}, "why_not": None}
    return {**CASE, "variant": variant, "kind": kind, **fine, **ratios, **more}


STEADY = (1.0, 1.0, 1.0, 1.0, 1.0)
OURS = (1.90, 1.95, 2.00, 2.05, 2.10)


def content(*rows):
    versions = {"torch": "2.15.0", "openvino": None}
    environment = {"processor": "A", "cores": 2, "threads": 2, "isa": "avx2", "gpus": []}
    environment |= {"device": "cpu", "versions": versions, "commit": "abc", "date": "2026-11-26"}
    return {
        "schema": 1,
        "command": "bench",
        "environment": environment,
        "size": 224,
        "results": [row("eager NHWC", "eager", STEADY), *rows],
    }


BEFORE = content(row("fused", "ours", OURS, kept=100))


@pytest.fixture
def run(tmp_path, capsys):
    def call(before, after):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, what in zip(paths, (before, after), strict=True):
            path.write_text(what if isinstance(what, str) else json.dumps(what))
        code = bench.main(["compare", *map(str, paths)])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("after", "what", "code"),
    [
        (row("fused", "ours", OURS, kept=100), NOISE, 0),
        (row("fused", "ours", [s + 0.05 for s in OURS], kept=100), NOISE, 0),
        (row("fused", "ours", [s + 0.2 for s in OURS], kept=100), FASTER, 0),
        (row("fused", "ours", [s - 0.2 for s in OURS], kept=100), SLOWER, 1),
        # A machine that is twice as slow for everyone.
        (row("fused", "ours", OURS, seconds=2.0, kept=100), NOISE, 0),
        (row("fused", "ours", [s - 0.2 for s in OURS[:4]], kept=100), UNKNOWN, 0),
        (row("fused", "ours", OURS, kept=101), MORE, 1),
        (row("fused", "ours", OURS, kept=99), LESS, 0),
        (row("fused", "ours", OURS, kept=100, within=False), WRONG, 1),
    ],
)
def test_verdicts(after, what, code, run):
    got, out, err = run(BEFORE, content(after))
    assert got == code, err
    assert f"| {what} " in next(line for line in out.splitlines() if "| fused |" in line)


def test_what_is_slower_but_not_ours_is_no_failure(run):
    before, after = (content(row("OpenVINO", "peer", s)) for s in (OURS, STEADY))
    code, out, _ = run(before, after)
    assert code == 0
    assert f"{SLOWER} 0.50x" in out


def test_a_peer_that_is_gone_is_told_with_its_reason(run):
    gone = row("OpenVINO", "peer", OURS, why_not="not installed") | {"seconds": None}
    gone |= {"speedup": None, "samples": []}
    code, out, _ = run(content(row("OpenVINO", "peer", OURS)), content(gone))
    assert code == 0
    assert f"{UNKNOWN} not installed" in out


def test_eager_is_compared_by_its_time(run):
    after = copy.deepcopy(BEFORE)
    after["results"][0] = row("eager NHWC", "eager", STEADY, seconds=2.0)
    code, out, _ = run(BEFORE, after)
    assert code == 0
    assert f"{SLOWER} 0.50x" in out


def test_different_machines_are_said_first(run):
    after = copy.deepcopy(BEFORE)
    after["environment"]["processor"] = "B"
    after["environment"]["versions"]["torch"] = "2.16.0"
    code, out, _ = run(BEFORE, after)
    assert code == 0
    assert out.startswith("DIFFERENT MACHINES: processor A and B")
    assert "torch 2.15.0 and 2.16.0" in out
    assert "eager NHWC" not in out


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold results"),
        ({"schema": 1, "command": "launches", "results": []}, "does not hold results"),
        ({"schema": 1, "command": "bench", "results": []}, "damaged: KeyError: 'environment'"),
        ({**BEFORE, "results": [{"case": "x"}]}, "damaged: KeyError"),
        ({**BEFORE, "results": [3]}, "damaged"),
        ({**BEFORE, "size": 32}, "images of 224 and of 32 pixels"),
        ({**BEFORE, "results": []}, "no case and variant in common"),
    ],
)
def test_files_that_do_not_do(after, words, run):
    code, _, err = run(BEFORE, after)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_real_files():
    """Of other machines and of the same."""
    cpu = results.read(results.RESULTS / "resnet50-inference-cpu.json")
    gpu = results.read(results.RESULTS / "resnet50-training-h200-b128.json")
    assert {v.what for v in compare.compare(cpu, cpu)} == {NOISE}
    assert len(compare.compare(cpu, cpu)) == sum(bool(r["seconds"]) for r in cpu["results"])
    assert compare.machines(cpu["environment"], gpu["environment"])
    halved = copy.deepcopy(cpu)
    for row in halved["results"]:
        if row["variant"] == "frozen":
            row["speedup"] = {name: value / 2 for name, value in row["speedup"].items()}
    found = {v.variant: v.what for v in compare.compare(cpu, halved)}
    assert found.pop("frozen") == SLOWER
    assert set(found.values()) == {NOISE}
