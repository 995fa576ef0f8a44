"""python -m bench: time cases x variants, correctness first, and write it all down."""

import argparse
import fnmatch
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import (
    baselines,
    blocks,
    cases,
    compare,
    floors,
    launches,
    machine,
    ops,
    page,
    report,
    training,
    training_ops,
)
from bench.cases import DTYPES, Asked, Case
from bench.layers import NETWORKS
from bench.results import RESULTS, commit, read
from bench.screen import Tick, screen
from fused_resnet import chart, checkpoints, facts
from fused_resnet.command import CommandError, positive, require
from fused_resnet.measure import (
    EAGER,
    OURS,
    Pace,
    Result,
    clock,
    measure,
    write_json,
)

EVERY_OP = tuple(f"{op}/*" for op in (*ops.WORKS, *training_ops.WORKS))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times every selected case in all its variants, in turn, after checking that "
        "they are right. Exit status 1: something failed, be it an error of ours outside the rule. "
        "python -m bench compare A.json B.json tells what differs between two results, "
        "python -m bench report FILES makes a page of them, python -m bench baselines counts what "
        "needs no quiet machine.",
    )
    add = result.add_argument
    add("--select", nargs="+", metavar="PATTERN",
        help="cases by name, * for anything (default: resnet50/*; the names: --list)")  # fmt: skip
    add("--variants", nargs="+", default=["*"], metavar="PATTERN",
        help="variants by name, beside eager")  # fmt: skip
    add("--batch", type=positive, nargs="+", metavar="N", help="default: 1 16; --launches: 32")
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    add("--layers", nargs="+", choices=checkpoints.MODELS, metavar="NETWORK",
        help=f"whose layers and blocks there are cases of (default: {' '.join(NETWORKS)}; "
        "with --smoke, of the first)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--patience", type=float, metavar="S",
        help="leave out a peer that prepares for more than S seconds (default: wait)")  # fmt: skip
    add("--size", type=positive, default=224, metavar="PIXELS", help="of the images (default: 224)")
    add("--seconds", type=float, metavar="S",
        help="time a network about S seconds (default: 30), an op a tenth of it")  # fmt: skip
    add("--threads", type=positive, metavar="N", help="default: the number of physical cores")
    add("--output", type=Path, metavar="FILE",
        help="for the JSON (default: bench/results/TIME.json; with --smoke, none)")  # fmt: skip
    add("--chart", type=Path, metavar="FILE", help="also draw the networks' results, as a PNG")
    add("--report", type=Path, metavar="FILE.html", help="also make a page of the results")
    add("--smoke", action="store_true",
        help="resnet18 and every op on tiny images, one round: does it all run?")  # fmt: skip
    add("--list", action="store_true", help="print the names of all cases, or of those selected")
    add("--launches", action="store_true",
        help="measure nothing, needs no GPU: count what networks (--select, default: resnet50) "
        "launch on one and move, beside eager")  # fmt: skip
    add("--table", type=Path, metavar="FILE",
        help="measure nothing: print the results in FILE as Markdown, for the README")  # fmt: skip
    return result


def selected(args: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    patterns = args.select or (
        ["resnet18/*", "train/resnet18/*", *EVERY_OP] if args.smoke else ["resnet50/*"]
    )
    networks = args.layers or NETWORKS[: 1 if args.smoke else None]
    asked = Asked(args.batch, args.dtype, args.size, args.device, tuple(networks))
    several = (cases, training, blocks, ops, training_ops)
    everything = [case for of in several for case in of.cases(asked)]
    found = [c for c in everything if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not found:
        raise CommandError(f"--select {' '.join(patterns)}: there is no such case; --list has all")
    return found


def run_case(
    case: Case, pace: Pace, args: argparse.Namespace, environment: dict, tick: Tick
) -> list[dict]:
    """One case's results, as they go into JSON."""
    torch._dynamo.reset()  # each network is its own program
    tick("making inputs and the float64 reference", 0.0)
    work = case.make()
    chosen = [
        v
        for v in work.variants
        if v.kind == EAGER or any(fnmatch.fnmatch(v.name, p) for p in args.variants)
    ]
    results: list[Result] = measure(
        chosen,
        work.inputs,
        work.truth,
        pace,
        tick,
        seconds=clock(args.device, cold=bool(case.shape)),
        patience=args.patience,
    )
    known = {"case": case.name, "what": case.what, "batch": case.batch}
    known |= {"dtype": case.dtype, "images": case.batch, "flops": work.flops, "bytes": work.bytes}
    floor = floors.floor(known, args.size, floors.machine(environment))
    known |= {"floor": floor}
    return [{**known, **r.as_dict(), **work.facts(r.variant)} for r in results]


def run(args: argparse.Namespace) -> int:
    if args.chart or args.report:
        require("bench", "matplotlib")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch.cuda.is_available() is False")
    if args.smoke:
        args.batch, args.size = [2], 32
    seconds = 30.0 if args.seconds is None else args.seconds
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
    output = args.output
    if output is None and not args.smoke:
        output = RESULTS / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    environment = {**facts.environment(), "commit": commit(), "device": args.device}
    content = {"schema": 1, "command": "bench", "environment": environment, "size": args.size}
    environment["copy_bytes_per_second"] = machine.copy_bandwidth(args.device, paces["op"])
    environment["peak_flops"] = {
        dtype: machine.peak_flops(args.device, dtype, paces["op"]) for dtype in args.dtype
    }
    content["results"] = []

    shown: list[dict] = []
    with screen(len(chosen)) as out:
        for i, case in enumerate(chosen):
            pace = paces["op" if case.shape else "network"]
            rows = run_case(case, pace, args, environment, out.tick(i, case.name))
            content["results"] += rows
            shown += rows
            if i + 1 == len(chosen) or not case.shape or chosen[i + 1].what != case.what:
                out.show(shown, content)
                shown = []
            if output is not None:  # after every case: an interrupted run keeps what it has
                write_json(output, content)
    if output is not None:
        print(f"results  {output}")
    if args.chart is not None:
        draw(content, args.chart)
        print(f"chart    {args.chart}")
    if args.report is not None:
        page.write([(args.report.stem, content)], args.report)
    failed = [r for r in content["results"] if r["kind"] == OURS and not r["within"]]
    for r in failed:
        print(f"FAILED {r['case']}: {r['variant']}: {r['why_not']}")
    return 1 if failed else 0


def draw(content: dict, path: Path) -> None:
    """Chart the results of networks."""
    rows = [row for row in content["results"] if report.is_network(row)]
    if not rows:
        raise CommandError("--chart draws networks, and none is in the results")
    env = content["environment"]
    machine = f"{env['processor']}, {env['threads']} threads, torch {env['versions']['torch']}"
    chart.throughput("Networks", machine, rows, path)


def count_launches(args: argparse.Namespace) -> None:
    """Print and write what networks launch and move."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for its kernels to take the CPU's tensors
    patterns = args.select or ["resnet50"]
    names = [n for n in checkpoints.MODELS if any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not names:
        raise CommandError(f"--select {' '.join(patterns)}: no such network")
    several = args.batch or [32]
    rows = [row for batch in several for row in launches.run(names, args.dtype, batch, args.size)]
    print(report.launches(rows), end="")
    output = args.output or RESULTS / "launches.json"
    content = {"schema": 1, "command": "launches", "commit": commit(), "size": args.size}
    write_json(output, {**content, "results": rows})
    print(f"\nresults  {output}")


#: What is not a run, by its first word.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "baselines": baselines.main,
    "compare": compare.main,
    "report": page.main,
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    args = parser().parse_args(words)
    try:
        if args.launches:
            count_launches(args)
            return 0
        args.batch = args.batch or [1, 16]
        if args.table is not None:
            content = read(args.table)
            print(report.markdown(content), end="")
            if args.chart is not None:
                require("bench", "matplotlib")
                draw(content, args.chart)
            return 0
        if args.list:
            args.select = args.select or ["*"]
            print("\n".join(case.name for case in selected(args)))
            return 0
        return run(args)
    except CommandError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
