"""python -m bench: time cases x variants, correctness first, and write it all down."""

import argparse
import fnmatch
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench import baselines, compare, launches, page, readme, report
from bench.cases import DTYPES
from bench.layers import NETWORKS
from bench.results import RESULTS, commit, read
from bench.run import DEFAULT, DEFAULT_BUDGET, FULL_CAP, SMOKE, run, selected
from fused_resnet import chart, checkpoints
from fused_resnet.command import CommandError, positive, require
from fused_resnet.measure import OURS, write_json


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times every selected case in all its variants, in turn, after checking that "
        "they are right. Exit status 1: something failed, be it an error of ours outside the rule. "
        "python -m bench compare A.json B.json tells what differs between two results, "
        "python -m bench report FILES makes a page of them, python -m bench readme the README's "
        "tables, python -m bench baselines counts what needs no quiet machine.",
    )
    add = result.add_argument
    add("--select", nargs="+", metavar="PATTERN",
        help=f"cases by name, * for anything (default: {', '.join(DEFAULT)}, "
        "inference and training; the names: --list)")  # fmt: skip
    add("--variants", nargs="+", default=["*"], metavar="PATTERN",
        help="variants by name, beside eager")  # fmt: skip
    add("--batch", type=positive, nargs="+", metavar="N",
        help="default: 1 16, of training 8; --full: all; --launches: 32")  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, help="default: fp32 bf16; --full: all")
    add("--layers", nargs="+", choices=checkpoints.MODELS, metavar="NETWORK",
        help=f"whose layers and blocks there are cases of (default: {' '.join(NETWORKS)}; "
        f"with --smoke, of {SMOKE})")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--patience", type=float, metavar="S",
        help="leave out a peer that prepares for more than S seconds (default: wait)")  # fmt: skip
    add("--size", type=positive, default=224, metavar="PIXELS", help="of the images (default: 224)")
    add("--seconds", type=float, metavar="S",
        help="time a network about S seconds (default: 20), an op a tenth of it")  # fmt: skip
    add("--threads", type=positive, metavar="N", help="default: the number of physical cores")
    add("--output", type=Path, metavar="FILE",
        help="for the JSON (default: bench/results/TIME.json; with --smoke, none)")  # fmt: skip
    add("--chart", type=Path, metavar="FILE", help="also draw the networks' results, as a PNG")
    add("--report", type=Path, metavar="FILE.html", help="also make a page of the results")
    add("--full", action="store_true",
        help="everything there is, in every batch size and type, going on with what --output has "
        "(default: bench/results/full-DEVICE.json)")  # fmt: skip
    add("--cap", type=float, metavar="S",
        help="skip a case that takes more than S seconds (default: without --select twice its "
        f"share of what is left of {DEFAULT_BUDGET:.0f}, with --full {FULL_CAP:.0f})")  # fmt: skip
    add("--smoke", action="store_true",
        help=f"{SMOKE} and every op on tiny images, one round: does it all run?")  # fmt: skip
    add("--list", action="store_true", help="print the names of all cases, or of those selected")
    add("--launches", action="store_true",
        help="measure nothing, needs no GPU: count what networks (--select, default: resnet50) "
        "launch on one and move, beside eager")  # fmt: skip
    add("--table", type=Path, metavar="FILE",
        help="measure nothing: print the results in FILE as Markdown, for the README")  # fmt: skip
    return result


def draw(content: dict, path: Path) -> None:
    """Chart the results of networks."""
    rows = [row for row in content["results"] if report.is_network(row)]
    if not rows:
        raise CommandError("--chart draws networks, and none is in the results")
    chart.throughput("Networks", report.short(content), rows, path)


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
    "readme": readme.main,
    "report": page.main,
}


def measure(args: argparse.Namespace) -> int:
    """Run, and tell of it."""
    if args.chart or args.report:
        require("bench", "matplotlib")
    content = run(args)
    if args.chart is not None:
        draw(content, args.chart)
        print(f"chart    {args.chart}")
    if args.report is not None:
        page.write([(args.report.stem, content)], args.report)
    for name, why in content["absent"].items():
        print(f"not measured: {name}: {why}")
    for row in content["skipped"]:
        print(f"{'FAILED' if row['failed'] else 'SKIPPED'} {row['case']}: {row['why']}")
    failed = [row for row in content["results"] if row["kind"] == OURS and report.why_failed(row)]
    for row in failed:
        print(f"FAILED {row['case']}: {row['variant']}: {report.why_failed(row)}")
    return 1 if failed or any(row["failed"] for row in content["skipped"]) else 0


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a run."""
    args = parser().parse_args(words)
    args.dtype = args.dtype or (list(DTYPES) if args.full else ["fp32", "bf16"])
    return args


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    args = parse(words)
    try:
        if args.launches:
            count_launches(args)
            return 0
        if args.table is not None:
            content = read(args.table)
            print(report.markdown(content), end="")
            if args.chart is not None:
                require("bench", "matplotlib")
                draw(content, args.chart)
            return 0
        if args.list:
            print("\n".join(case.name for case in selected(args)))
            return 0
        return measure(args)
    except CommandError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
