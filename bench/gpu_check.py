"""python -m bench.gpu_check: everything that needs a GPU, in one go within a time budget.

The most telling first: the tests marked gpu, in processes of their own; the main benchmarks; a
sample of the tests of Triton's kernels, which are mostly compiling; compute-sanitizer; the other
benchmarks. What there was no time for, and what is missing here, is named. RESULTS holds
gpu-check.json, which is rewritten after every step, a log, and the results of each benchmark.
``--device cpu`` does the same on the CPU with tiny sizes: it shows that the script works.
"""

import argparse
import fnmatch
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.results import commit
from fused_resnet import facts
from fused_resnet.command import positive
from fused_resnet.measure import write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolkit  # noqa: E402

PASSED, FAILED, PARTLY, LEFT_OUT = "passed", "FAILED", "partly", "left out"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
#: What compute-sanitizer exits with when it has found something.
FOUND = 86
#: What pytest exits with when there was no test to run.
NONE_CHOSEN = 5
#: What it says of a device it cannot watch.
REFUSED = "Device not supported"
OUTCOME = re.compile(r"^(tests/\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
#: On the CPU: what is taken of which files of tests.
FEW_TESTS = ("test_add_act or graph_of or 31", "tests/test_eltwise_act.py", "tests/test_device.py")
#: Seconds a step must have left to be worth a start.
LEAST = 10.0


class Done(NamedTuple):
    """What came of a command."""

    code: int | None  #: its exit status; None: it was stopped, its time being over
    output: str


class Outcome(NamedTuple):
    """What came of a step."""

    status: str
    why: str = ""
    facts: dict[str, Any] | None = None


class Step(NamedTuple):
    name: str
    limit: float  #: seconds it may take
    run: Callable[[float], Outcome]  #: given the seconds it has


class Check:
    """A run: where its results go, and what is left of its time."""

    def __init__(self, results: Path, device: str, budget: float, workers: int) -> None:
        self.results, self.device, self.workers = results, device, workers
        self.tests: list[str] | None = None  # once they are known
        self.until = time.monotonic() + budget
        self.gpu = device == "cuda"
        results.mkdir(parents=True, exist_ok=True)
        self.log = results / "gpu-check.log"
        self.log.write_text("")
        environment = {**facts.environment(), "commit": commit(), "device": device}
        self.content: dict[str, Any] = {"schema": 1, "command": "gpu-check", "budget": budget}
        self.content |= {"environment": environment, "steps": []}

    def command(self, words: Sequence[str], seconds: float, **environment: str) -> Done:
        """Run a command in a group of processes that ends with its time; its output is logged."""
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},  # it may be killed
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=max(seconds, 0.0))
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = None
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(words)}\n{output}\n[exit status {code}]\n\n")
        return Done(code, output)

    def step(self, step: Step) -> Outcome:
        """Run a step in what time it may have, note what came of it, and write that down."""
        start = time.monotonic()
        seconds = min(step.limit, self.until - start)
        if seconds < min(LEAST, step.limit):
            outcome = Outcome(LEFT_OUT, "no time was left")
        else:
            print(f"{step.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            outcome = step.run(seconds)
        took = round(time.monotonic() - start, 1)
        row = {"step": step.name, "status": outcome.status, "why": outcome.why, "seconds": took}
        self.content["steps"].append({**row, **(outcome.facts or {})})
        write_json(self.results / "gpu-check.json", self.content)
        return outcome


# --- Tests. ---


PYTEST = (sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider")


class Tests(NamedTuple):
    """The tests of a step."""

    name: str
    limit: float  #: seconds it may take
    engine: str  #: by pytest's -k
    sample: int  #: one in so many is run
    part: int  #: by one process, about: a longer file is shared out


#: Every test of Triton's kernels compiles some: all of them would take an hour.
TESTS = (Tests("tests", 130, "not triton", 1, 400), Tests("tests-triton", 60, "triton", 6, 100))


def tests_with(check: Check, seconds: float, *chosen: str) -> list[str]:
    """The names of the tests chosen."""
    found = check.command([*PYTEST, "--collect-only", "-q", *chosen], seconds)
    return re.findall(r"^(tests/test_\w+\.py::.*)$", found.output, re.MULTILINE)


def parts(names: Sequence[str], sample: int, part: int) -> list[tuple[str, str]]:
    """Files of tests and the part of each that a process runs, of the longest files first."""
    counts = Counter(name.partition("::")[0] for name in names)
    shares = {file: -(-n // (sample * part)) for file, n in counts.most_common()}
    return [(file, f"{i * sample}/{n * sample}") for file, n in shares.items() for i in range(n)]


def run_tests(check: Check, tests: Tests, seconds: float) -> Outcome:
    """In several processes: after an illegal access one has no GPU any more."""
    until = time.monotonic() + seconds
    few, *files = FEW_TESTS
    chosen = ["-m", "gpu"] if check.gpu else ["-m", "not gpu", "-k", few]
    if check.tests is None:
        check.tests = tests_with(check, seconds, *chosen, *(["tests"] if check.gpu else files))
    named = tests.engine if check.gpu else f"({few}) and {tests.engine}"
    asked = [name for name in check.tests if ("triton" in name) == (tests.engine == "triton")]
    jobs = parts(asked, tests.sample, tests.part)

    def run(job: tuple[str, str]) -> Done:
        file, part = job
        left = until - time.monotonic()
        if left < LEAST / 2:
            return Done(None, "")
        words = [*PYTEST, "-v", *chosen[:2], "-k", named, "--part", part, file]
        return check.command(words, left)

    with ThreadPoolExecutor(check.workers) as pool:
        done = dict(zip(jobs, pool.map(run, jobs), strict=True))
    counts: Counter[str] = Counter()
    failed: list[str] = []
    unfinished: list[str] = []
    for (file, part), each in done.items():
        outcomes = OUTCOME.findall(each.output)
        counts.update(word.lower() for _, word in outcomes)
        wrong = [name for name, word in outcomes if word in ("FAILED", "ERROR", "XPASS")]
        failed += wrong
        after = f"after {len(outcomes)} tests"
        if each.code is None:
            unfinished.append(f"{file} {part} {after}")
        elif each.code not in (0, NONE_CHOSEN) and not wrong:  # it died, or did not even begin
            failed.append(f"{file} {part}: exit status {each.code} {after}")
    kept = {"counts": dict(counts), "failed": failed, "unfinished": unfinished}
    kept |= {"of": len(asked), "sample": tests.sample}
    if not asked:
        return Outcome(FAILED, "there are no tests for the device, or they cannot be imported")
    if failed:
        return Outcome(FAILED, f"{len(failed)} failed: {', '.join(failed[:3])}", kept)
    if unfinished:
        return Outcome(PARTLY, f"no time for the rest of {', '.join(unfinished)}", kept)
    found = ", ".join(f"{n} {word}" for word, n in counts.items())
    if tests.sample > 1:
        found += f"; a sample, one in {tests.sample} of {len(asked)}, for want of time"
    return Outcome(PASSED, found, kept)


# --- compute-sanitizer. ---


def find_sanitizer() -> str | None:
    try:
        home = toolkit.find_toolkit(os.environ).home
    except toolkit.BuildError:
        return shutil.which("compute-sanitizer")
    found = shutil.which("compute-sanitizer", path=str(home / "bin"))
    return found or shutil.which("compute-sanitizer")


def sanitize(check: Check, tool: str, seconds: float) -> Outcome:
    """Our kernels under one of its tools: a call of every op, each with memory of its own."""
    if not check.gpu:
        return Outcome(LEFT_OUT, "it watches GPUs only")
    program = find_sanitizer()
    if program is None:
        return Outcome(LEFT_OUT, "there is no compute-sanitizer")
    watching = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    watching += ["--kernel-name", "kns=fused_resnet"]
    chosen = ["-m", "gpu", "-k", "test_values and native", "--unpoisoned", "tests/test_device.py"]
    command = [*watching, *PYTEST, "-v", *chosen]
    return judge_sanitizer(check.command(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def judge_sanitizer(done: Done) -> Outcome:
    outcomes = OUTCOME.findall(done.output)
    if REFUSED in done.output:
        return Outcome(LEFT_OUT, f"it refuses the device: {REFUSED}")
    if done.code == FOUND:
        found = re.search(r"^=+ +(ERROR SUMMARY: .*|.*Error.*)$", done.output, re.MULTILINE)
        return Outcome(FAILED, found[1] if found else "it found errors, see the log")
    if done.code is None:
        return Outcome(PARTLY, f"its time was over after {len(outcomes)} ops")
    if done.code:
        return Outcome(FAILED, f"exit status {done.code} after {len(outcomes)} ops, see the log")
    return Outcome(PASSED, f"{len(outcomes)} ops")


# --- Benchmarks. ---


def measure(check: Check, name: str, options: Sequence[str], seconds: float) -> Outcome:
    """A run of ``python -m bench``, which writes its results after each of its cases."""
    output = check.results / f"{name}.json"
    output.unlink(missing_ok=True)
    words = [sys.executable, "-m", "bench", "--device", check.device, "--output", str(output)]
    done = check.command([*words, *options], seconds)
    content = json.loads(output.read_text()) if output.exists() else {"results": []}
    missing = sorted(
        {f"{r['variant']}: {r['why_not']}" for r in content["results"] if r["why_not"]}
    )
    kept = {"cases": len({r["case"] for r in content["results"]}), "missing": missing}
    if content["results"]:
        print(report.markdown(content), flush=True)
    if done.code == 0:
        return Outcome(PASSED, "; ".join(missing), kept)
    if done.code is None:
        return Outcome(PARTLY, f"its time was over after {kept['cases']} cases", kept)
    last = (done.output.strip().splitlines() or ["no output"])[-1]
    return Outcome(FAILED, last[:300], kept)


def warm(check: Check, seconds: float) -> Outcome:
    """Compile in parallel what the benchmarks would compile one after the other."""
    words = [sys.executable, "-m", "bench.warm", "--device", check.device]
    if not check.gpu:  # where Triton compiles nothing: does it run?
        words += ["--engine", "native", "--network", "resnet18", "--batch", "2", "--size", "32"]
    done = check.command(words, seconds)
    if done.code is None:
        return Outcome(PARTLY, "its time was over; what was compiled is kept")
    if done.code:
        failed = re.findall(r"^FAILED (\S+)", done.output, re.MULTILINE)
        return Outcome(FAILED, f"{', '.join(failed) or 'nothing was run'}, see the log")
    return Outcome(PASSED)


class Plan(NamedTuple):
    """A run of the benchmark."""

    name: str
    limit: float  #: seconds it may take
    cases: tuple[str, ...]
    batch: int
    seconds: float  #: to time a network for
    patience: float  #: seconds a compiler may take


MEMORY_BOUND = ("bn_act/*", "bn_act_*/*", "eltwise_act/*", "relu_backward_reduce/*")
ON_GPU = (
    Plan("memory-bound", 45, MEMORY_BOUND, 128, 1, 1),
    Plan("training-b128", 110, ("train/resnet50/*",), 128, 6, 35),
    Plan("inference-b128", 75, ("resnet50/*",), 128, 5, 25),
    Plan("inference-b1", 75, ("resnet50/*",), 1, 5, 25),
    Plan("inference-b32", 75, ("resnet50/*",), 32, 5, 25),
    Plan("training-b256", 110, ("train/resnet50/*",), 256, 6, 35),
    Plan("convolutions", 60, ("conv_bn_act/*",), 128, 1, 1),
)
#: Those that matter most.
MAIN = ("memory-bound", "training-b128", "inference-b128", "inference", "training")
ON_CPU_LIMIT = 300
ON_CPU = (
    Plan("memory-bound", ON_CPU_LIMIT, ("*/2048x*x*/*",), 2, 0, 1),
    Plan("inference", ON_CPU_LIMIT, ("resnet18/*",), 2, 0, 1),
    Plan("training", ON_CPU_LIMIT, ("train/resnet18/*",), 2, 0, 1),
)
#: What is measured beside eager; on the CPU nothing that compiles.
OURS = ("fused", "fused, CUDA graph", "fused on *", "frozen*", "vendor", "native", "triton")
PEERS = ("torch.compile*", "eager NHWC, CUDA graph")


def benchmarks(check: Check) -> Iterator[Step]:
    """What is measured, the most telling first."""
    few = PEERS if check.gpu else ("--smoke",)
    for plan in ON_GPU if check.gpu else ON_CPU:
        options = ["--select", *plan.cases, "--dtype", "bf16", "--batch", str(plan.batch)]
        options += ["--layers", "resnet50", "--variants", *OURS, *few]
        options += ["--seconds", str(plan.seconds), "--patience", str(plan.patience)]

        yield Step(plan.name, plan.limit, functools.partial(measure, check, plan.name, options))


# --- All of it. ---


def steps(check: Check) -> Iterator[Step]:
    def limit(seconds: float) -> float:
        return seconds if check.gpu else ON_CPU_LIMIT

    native, triton = (
        Step(tests.name, limit(tests.limit), functools.partial(run_tests, check, tests))
        for tests in TESTS
    )
    measured = list(benchmarks(check))
    yield native
    yield Step("warm", limit(45), functools.partial(warm, check))
    yield from (step for step in measured if step.name in MAIN)
    yield triton
    for tool in SANITIZERS:
        yield Step(tool, 30, functools.partial(sanitize, check, tool))
    yield from (step for step in measured if step.name not in MAIN)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description="Tests, compute-sanitizer and benchmarks on a GPU. Exit status 1: something "
        "failed; what was left out is named and is no failure.",
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="DIR", help="where they go")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--budget", type=float, default=480, metavar="S", help="seconds in all (default: 480)")
    add("--steps", nargs="+", default=["*"], metavar="PATTERN",
        help="only some of them, by name: tests, memcheck, memory-bound, ...")  # fmt: skip
    add("--workers", type=positive, metavar="N", help="processes of tests (default: cores - 2)")
    args = parser.parse_args(argv)
    workers = args.workers or max(1, facts.physical_cores() - 2)
    check = Check(args.results.resolve(), args.device, args.budget, workers)
    environment = check.content["environment"]
    if check.gpu and not environment["gpus"]:
        print("gpu-check: there is no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    chosen = [s for s in steps(check) if any(fnmatch.fnmatch(s.name, p) for p in args.steps)]
    outcomes = [(step.name, check.step(step)) for step in chosen]
    where = f"{environment['gpus'][0]}, driver {environment['driver']}" if check.gpu else "CPU"
    print(f"{where}, torch {environment['versions']['torch']}, commit {environment['commit']}")
    for name, outcome in outcomes:
        print(f"{name:16} {outcome.status:8}  {outcome.why}")
    print(f"results  {check.results}")
    return 1 if any(outcome.status == FAILED for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
