"""A run: the cases asked for, one after the other, each written down as it is done."""

import argparse
import fnmatch
import gc
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import (
    blocks,
    cases,
    compare,
    energy,
    floors,
    machine,
    ops,
    peers,
    results,
    training,
    training_ops,
)
from bench.cases import Asked, Case
from bench.floors import TRAIN
from bench.layers import NETWORKS
from bench.results import RESULTS, commit
from bench.screen import Tick, screen
from fused_resnet import facts
from fused_resnet.command import CommandError
from fused_resnet.measure import EAGER, Pace, Variant, at_most, clock, measure, write_json
from fused_resnet.variants import INT8, TUNED

EVERY_OP = tuple(f"{op}/*" for op in (*ops.WORKS, *training_ops.WORKS))
#: What is measured unless something is asked for: networks, inference and training.
DEFAULT = ("resnet18", "resnet50", "resnext50_32x4d")
#: What is run to see whether everything does.
SMOKE = "resnet18"
INFERENCE_BATCHES, TRAINING_BATCHES = (1, 16), (8,)
#: Of everything there is.
FULL_BATCHES = (1, 8, 16, 32, 128, 256)
#: Seconds that the cases of DEFAULT may take together, and one of ``--full``.
DEFAULT_BUDGET, FULL_CAP = 1800.0, 300.0


class Overtime(BaseException):
    """A case has taken longer than it may; not an Exception, as a peer's failures are."""


def patterns(args: argparse.Namespace) -> list[str]:
    """Of the names of cases that are asked for."""
    if args.select:
        return args.select
    if args.full or args.list:
        return ["*"]
    if args.smoke:
        return [f"{SMOKE}/*", f"{TRAIN}{SMOKE}/*", *EVERY_OP]
    return [f"{what}{network}/*" for network in DEFAULT for what in ("", TRAIN)]


def selected(args: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    batches = {False: args.batch or INFERENCE_BATCHES, True: args.batch or TRAINING_BATCHES}
    if args.full and not args.batch:
        batches = dict.fromkeys(batches, FULL_BATCHES)
    networks = args.layers or ([SMOKE] if args.smoke else NETWORKS)
    every = sorted({*batches[False], *batches[True]})
    asked = Asked(every, args.dtype, args.size, args.device, tuple(networks))
    several = (cases, training, blocks, ops, training_ops)

    def trains(case: Case) -> bool:
        return case.what.startswith(TRAIN) or case.what in training_ops.WORKS

    found = [
        case
        for of in several
        for case in of.cases(asked)
        if case.batch in batches[trains(case)]
        and any(fnmatch.fnmatch(case.name, p) for p in patterns(args))
    ]
    if not found:
        words = " ".join(patterns(args))
        raise CommandError(f"--select {words}: there is no such case; --list has all")
    return found


def wanted(v: Variant, patterns: Sequence[str]) -> bool:
    """Whether a variant is measured.

    In 8 bits it is no match for the others: it has to be named, and a pattern names none.
    """
    if v.name == INT8:
        return INT8 in patterns
    return v.kind == EAGER or any(fnmatch.fnmatch(v.name, p) for p in patterns)


def run_case(
    case: Case, pace: Pace, args: argparse.Namespace, environment: dict, tick: Tick
) -> list[dict]:
    """One case's results, as they go into JSON."""
    if not case.shape:  # each network is its own program, and holds itself in cycles
        torch._dynamo.reset()
        gc.collect()
    tick("making inputs and the float64 reference", 0.0)
    work = case.make()
    chosen = [v for v in work.variants if wanted(v, args.variants)]
    if args.smoke:  # in images that small, which way is taken decides which ReLUs tip over
        chosen = [v for v in chosen if v.name != TUNED]
    done = measure(
        chosen,
        work.inputs,
        work.truth,
        pace,
        tick,
        seconds=clock(args.device, cold=bool(case.shape)),
        patience=args.patience,
        watch=None if case.shape or energy.absent(args.device) else energy.of_calls,
    )
    known = {"case": case.name, "what": case.what, "batch": case.batch}
    known |= {"dtype": case.dtype, "images": case.batch, "flops": work.flops, "bytes": work.bytes}
    floor = floors.floor(known, args.size, floors.machine(environment))
    known |= {"floor": floor}
    return [{**known, **r.as_dict(), **work.facts(r.variant)} for r in done]


class Progress:
    """What is done, in a file that a later run goes on with."""

    def __init__(self, content: dict[str, Any], path: Path | None) -> None:
        self.content, self.path = content, path

    @classmethod
    def of(cls, args: argparse.Namespace, content: dict[str, Any]) -> "Progress":
        """A new one, or, with ``--full``, that of the file asked for, if there is one."""
        path = args.output
        if path is None and args.full:
            path = RESULTS / f"full-{args.device}.json"
        elif path is None and not args.smoke:
            path = RESULTS / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
        if not args.full or not path.exists():
            return cls(content, path)
        before = results.read(path)
        old, new = before["environment"], content["environment"]
        other = compare.machines(old, new) + compare.differences(old, new, "commit")
        other += compare.differences(old["versions"], new["versions"], *new["versions"])
        if before["size"] != content["size"]:
            other.append(f"size {before['size']} and {content['size']}")
        if other:
            raise CommandError(f"{path}: does not go on with other conditions: {'; '.join(other)}")
        return cls(before, path)

    def done(self) -> set[str]:
        """The names of the cases that are measured, or skipped."""
        return {row["case"] for row in (*self.content["results"], *self.content["skipped"])}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.content["results"] += rows
        self._write()

    def skip(self, case: str, why: str, failed: bool) -> None:
        self.content["skipped"].append({"case": case, "why": why, "failed": failed})
        self._write()

    def _write(self) -> None:
        if self.path is not None:  # after every case: an interrupted run keeps what it has
            write_json(self.path, self.content)


def cap_of(args: argparse.Namespace, spent: float, cases: int) -> float | None:
    """Seconds the next case may take, ``spent`` seconds after the start, of so many that are left.

    Twice its share of DEFAULT_BUDGET's rest, as cases differ, where nothing else is asked for.
    """
    if args.cap is not None or args.smoke:
        return args.cap
    if args.full:
        return FULL_CAP
    left = max(DEFAULT_BUDGET - spent, 1.0)
    return None if args.select else min(left, 2 * left / cases)


def attempt(
    case: Case,
    pace: Pace,
    cap: float | None,
    args: argparse.Namespace,
    progress: Progress,
    tick: Tick,
) -> list[dict[str, Any]]:
    """A case's results; none where it takes more memory or time than there is, which is noted.

    So is with --full what raises, or no later run would get past it.
    """
    there = machine.available_memory(args.device)
    why = f"needs about {1e-9 * case.memory:.1f} GB of memory, {1e-9 * there:.1f} are there"
    rows: list[dict[str, Any]] = []
    failed = False
    if case.memory <= there:
        try:
            with at_most(cap, "it was not done", Overtime):
                rows = run_case(case, pace, args, progress.content["environment"], tick)
        except Overtime as error:
            why = str(error)
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
        except Exception as error:
            if not args.full:
                raise
            why, failed = f"{type(error).__name__}: {error}".splitlines()[0], True
    if rows:
        progress.add(rows)
    else:
        progress.skip(case.name, why, failed)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is asked for; returns what the file of results holds."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch.cuda.is_available() is False")
    if args.smoke:
        args.batch, args.size = [2], 32
    seconds = 20.0 if args.seconds is None else args.seconds
    # A GPU needs no more than that to run at its speed.
    sample = 0.1 if args.device == "cpu" else 0.02
    paces = {
        "network": Pace(seconds, most_rounds=100, sample_seconds=sample),
        "op": Pace(seconds / 10, most_rounds=100, sample_seconds=sample),
    }
    if args.smoke:
        paces = dict.fromkeys(paces, Pace(0.0, 1, 1, 0.0))
    torch.set_num_threads(args.threads or facts.physical_cores())
    chosen = selected(args)
    environment = {**facts.environment(), "commit": commit(), "device": args.device}
    content = {"schema": 1, "command": "bench", "environment": environment, "size": args.size}
    content["absent"] = {**peers.absent(args.device), **energy.absent(args.device)}
    progress = Progress.of(args, {**content, "results": [], "skipped": []})
    done = progress.done()
    chosen = [case for case in chosen if case.name not in done]
    if done:
        print(f"{progress.path} has {len(done)} cases; {len(chosen)} are left")
    known = progress.content["environment"]
    if "copy_bytes_per_second" not in known:
        known["copy_bytes_per_second"] = machine.copy_bandwidth(args.device, paces["op"])
    peaks = known.setdefault("peak_flops", {})
    for dtype in args.dtype:
        if dtype not in peaks:
            peaks[dtype] = machine.peak_flops(args.device, dtype, paces["op"])

    shown: list[dict[str, Any]] = []
    start = time.monotonic()
    with screen(len(chosen)) as out:
        for i, case in enumerate(chosen):
            pace = paces["op" if case.shape else "network"]
            cap = cap_of(args, time.monotonic() - start, len(chosen) - i)
            shown += attempt(case, pace, cap, args, progress, out.tick(i, case.name))
            last = i + 1 == len(chosen) or chosen[i + 1].what != case.what
            if shown and (last or not case.shape):
                out.show(shown, progress.content)
                shown = []
    if progress.path is not None:
        print(f"results  {progress.path}")
    return progress.content
