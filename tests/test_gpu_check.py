"""make gpu-check: the whole of it on the CPU, and what it makes of what goes wrong on a GPU."""

import fnmatch
import json
import subprocess
import sys
import time

import pytest
import torch
from cases import ROOT

from bench import gpu_check
from bench.gpu_check import FAILED, FOUND, LEFT_OUT, PARTLY, PASSED, Check, Done, Outcome, Step


def test_on_the_cpu(tmp_path):
    """From end to end, so that it does not first fail where a GPU waits."""
    options = ["--device", "cpu", "--results", str(tmp_path), "--budget", "900"]
    command = [sys.executable, "-m", "bench.gpu_check", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    outcomes = {row["step"]: row["status"] for row in content["steps"]}
    assert list(outcomes) == [
        *("tests", "warm", "memory-bound", "inference", "training", "tests-triton"),
        *gpu_check.SANITIZERS,
    ]
    assert outcomes == dict.fromkeys(outcomes, PASSED) | dict.fromkeys(
        gpu_check.SANITIZERS, LEFT_OUT
    )
    for tests, least in (content["steps"][0], 10), (content["steps"][5], 1):
        assert tests["counts"]["passed"] >= least
        assert tests["counts"].keys() == {"passed"}
    for name in ("gpus", "driver", "versions", "commit", "device"):
        assert name in content["environment"]
    for plan in gpu_check.ON_CPU:
        assert json.loads((tmp_path / f"{plan.name}.json").read_text())["results"]
    assert "memcheck         left out  it watches GPUs only" in done.stdout
    assert "| bn_act, batch 2, bf16 |" in done.stdout
    assert "test_add_act" in (tmp_path / "gpu-check.log").read_text()


def test_every_benchmark_has_cases(capsys):
    from bench.__main__ import main

    for plan in (*gpu_check.ON_GPU, *gpu_check.ON_CPU):
        options = ["--list", "--dtype", "bf16", "--batch", str(plan.batch), "--size", "32"]
        assert main([*options, "--select", *plan.cases]) == 0
        names = capsys.readouterr().out.split()
        assert all(fnmatch.filter(names, p) for p in plan.cases)


def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    assert "there is no GPU" in capsys.readouterr().err


def test_the_makefile_passes_everything_on():
    words = ["RESULTS=here", "DEVICE=cpu", "BUDGET=7", "PYTHON=python", "ARGS=--steps tests"]
    done = subprocess.run(
        ["make", "-n", "gpu-check", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    expected = "python -m bench.gpu_check --results here --device cpu --budget 7 --steps tests"
    assert expected in done.stdout.splitlines()


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path, "cpu", 1000, workers=2)


def on_gpu(check: Check, *done: Done) -> Check:
    """As if there were a GPU, and the commands came to these ends."""
    ends = list(done)
    check.gpu = True
    check.command = lambda words, seconds, **environment: ends.pop(0)
    return check


def test_what_takes_too_long_is_ended_with_its_children(check, tmp_path):
    marker = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"  # noqa: E501
    done = check.command([sys.executable, "-c", code], 1.5)
    assert done.code is None
    assert check.log.read_text().endswith("[exit status None]\n\n")
    time.sleep(3)
    assert not marker.exists()


def test_steps(check):
    """Each has what is left of the time; results are there as soon as they exist."""
    given = []

    def run(seconds):
        given.append(seconds)
        return Outcome(PASSED, "well", {"counts": 3})

    assert check.step(Step("one", 50, run)).status == PASSED
    check.until = time.monotonic() + 20
    check.step(Step("two", 50, run))
    check.until = time.monotonic() + 5
    assert check.step(Step("three", 50, run)) == (LEFT_OUT, "no time was left", None)
    assert given[0] == 50
    assert 15 < given[1] <= 20
    rows = json.loads((check.results / "gpu-check.json").read_text())["steps"]
    assert [row["status"] for row in rows] == [PASSED, PASSED, LEFT_OUT]
    assert rows[0]["counts"] == 3


A, B = "tests/test_a.py", "tests/test_b.py"
BOTH = Done(0, f"{A}::test_1\n{A}::test_2\n{B}::test_1[x y]\n")
GOOD = Done(0, f"{A}::test_1 PASSED [ 50%]\n{A}::test_2 PASSED [100%]\n")


@pytest.mark.parametrize(
    ("second", "status", "why"),
    [
        (Done(0, f"{B}::test_1[x y] PASSED\n"), PASSED, "3 passed"),
        (Done(0, f"{B}::test_1[x y] SKIPPED (one device)\n"), PASSED, "2 passed, 1 skipped"),
        (Done(1, f"{B}::test_1[x y] FAILED\n"), FAILED, "test_1[x y]"),
        (Done(None, ""), PARTLY, f"{B} 0/1 after 0 tests"),
        (Done(-11, f"{B}::test_1[x y] "), FAILED, "exit status -11 after 0 tests"),
        (Done(2, "ImportError"), FAILED, "exit status 2 after 0 tests"),
    ],
    ids=str,
)
def test_tests(check, second, status, why):
    check.workers = 1
    outcome = gpu_check.run_tests(on_gpu(check, BOTH, GOOD, second), gpu_check.TESTS[0], 100)
    assert outcome.status == status
    assert why in outcome.why


def test_files_are_found(check):
    chosen = ("-k", "test_add_act or test_files_are_found", "tests/test_eltwise_act.py")
    found = gpu_check.tests_with(check, 100, *chosen, "tests/test_gpu_check.py")
    files = {name.partition("::")[0] for name in found}
    assert files == {"tests/test_eltwise_act.py", "tests/test_gpu_check.py"}


def test_a_long_file_is_shared_out_and_begun_first():
    names = [f"{A}::test_1", *(f"{B}::test_1[{i}]" for i in range(1201))]
    assert gpu_check.parts(names, 1, 600) == [(B, "0/3"), (B, "1/3"), (B, "2/3"), (A, "0/1")]
    assert gpu_check.parts(names, 6, 150) == [(B, "0/12"), (B, "6/12"), (A, "0/6")]


def test_a_sample(check):
    """Of the names that were found before; the summary says so, and a part without any is none."""
    check.workers, check.tests = 1, [f"{A}::test_1[triton]", f"{B}::test_1[triton]", f"{B}::test_2"]
    ends = Done(0, f"{A}::test_1[triton] PASSED\n"), Done(5, "")
    outcome = gpu_check.run_tests(on_gpu(check, *ends), gpu_check.TESTS[1], 100)
    assert outcome.status == PASSED
    assert "1 passed; a sample, one in 6 of 2" in outcome.why


@pytest.mark.parametrize(
    ("done", "status", "why"),
    [
        (Done(0, "layer1.0 after 9 s"), PASSED, ""),
        (
            Done(1, "Error\nFAILED layer1.0 after 9 s\nFAILED all after 9 s"),
            FAILED,
            "layer1.0, all",
        ),
        (Done(1, "ImportError"), FAILED, "nothing was run"),
        (Done(None, ""), PARTLY, "its time was over"),
    ],
    ids=str,
)
def test_warm(check, done, status, why):
    outcome = gpu_check.warm(on_gpu(check, done), 10)
    assert outcome.status == status
    assert why in outcome.why


def test_no_tests(check):
    done = Done(2, "SyntaxError")
    assert gpu_check.run_tests(on_gpu(check, done), gpu_check.TESTS[0], 100).status == FAILED


OPS = f"{A}::test_values[bn_act] PASSED [100%]\n"


@pytest.mark.parametrize(
    ("done", "status", "why"),
    [
        (Done(0, OPS), PASSED, "1 ops"),
        (Done(FOUND, f"{OPS}========= ERROR SUMMARY: 2 errors\n"), FAILED, "2 errors"),
        (Done(1, "= Error: Device not supported. Please refer to"), LEFT_OUT, "refuses"),
        (Done(1, "FAILED"), FAILED, "exit status 1"),
        (Done(None, OPS), PARTLY, "after 1 ops"),
    ],
    ids=str,
)
def test_sanitizer(check, done, status, why, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    outcome = gpu_check.sanitize(on_gpu(check, done), "memcheck", 10)
    assert outcome.status == status
    assert why in outcome.why


def test_no_sanitizer(check, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    outcome = gpu_check.sanitize(on_gpu(check), "memcheck", 10)
    assert outcome == (LEFT_OUT, "there is no compute-sanitizer", None)


@pytest.mark.parametrize(
    ("done", "status", "why"),
    [
        (Done(1, "reference\nRuntimeError: out of memory"), FAILED, "RuntimeError: out of memory"),
        (Done(None, ""), PARTLY, "after 0 cases"),
    ],
    ids=str,
)
def test_benchmark_without_results(check, done, status, why):
    outcome = gpu_check.measure(on_gpu(check, done), "ops", [], 10)
    assert (outcome.status, outcome.facts) == (status, {"cases": 0, "missing": []})
    assert why in outcome.why
