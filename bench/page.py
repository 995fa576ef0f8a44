"""python -m bench report FILES: results as one HTML page with charts, which needs no network."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench import charts, floors, report, results
from bench.results import BENCH, LAUNCHES
from fused_resnet.command import CommandError, require
from fused_resnet.measure import EAGER, OURS, PEER
from fused_resnet.variants import INT8

Row = dict[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")


class Best(NamedTuple):
    """A network's case in short: the fastest of each kind, and how ours stands to the others."""

    case: str
    eager: str
    peer: str
    ours: str
    to_eager: float
    to_peer: float | None


def best(rows: list[Row]) -> Best | None:
    """Of the rows of a case; None where nothing of ours, or of eager, was timed.

    8 bits are none: beside them no peer computes in as few.
    """

    def fastest(kind: str) -> Row | None:
        timed = [row for row in rows if row["kind"] == kind and row["seconds"]]
        timed = [row for row in timed if row["variant"] != INT8]
        return min(timed, key=lambda row: row["seconds"]["median"], default=None)

    def text(row: Row | None) -> str:
        if row is None:
            return "none was timed"
        return f"{row['variant']}, {row['images'] / row['seconds']['median']:.1f} img/s"

    eager, peer, ours = (fastest(kind) for kind in (EAGER, PEER, OURS))
    if eager is None or ours is None:
        return None
    ratio = ours["to_peer"]["median"] if peer and ours["to_peer"] else None
    texts = (text(row) for row in (eager, peer, ours))
    return Best(rows[0]["case"], *texts, ours["speedup"]["median"], ratio)


def _by(rows: list[Row], key: str) -> list[tuple[str, list[Row]]]:
    """Rows of the same ``key`` together: a run may come back to a network."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return list(found.items())


def missing(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """What has no time, is outside the rule or breaks a promise: why, and in which cases."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["kind"] == OURS:
            failed, why = "FAILED", report.why_failed(row)
        elif row["why_not"] or not row["within"]:
            failed = row["kind"]
            why = row["why_not"] or "its error is outside the rule; it is timed all the same"
        else:
            why = None
        if why is not None:
            found.setdefault((row["variant"], failed, why), []).append(row["case"])
    return [(*key, ", ".join(cases)) for key, cases in found.items()]


def _section(title: str, content: dict[str, Any]) -> dict[str, Any]:
    """What the template is told of some results."""
    if content["command"] == "launches":
        title = f"{title}: what networks launch and move on a GPU, counted without one"
        return {"title": title, "launches": report.launch_tables(content["results"])}
    rows: list[Row] = content["results"]
    networks = [row for row in rows if report.is_network(row)]
    ops = [row for row in rows if not report.is_network(row) and row["seconds"]]
    kept = [row for row in rows if row.get("kept") is not None]
    on = floors.machine(content["environment"])
    drawn = [(f"Throughput of {name}", charts.throughput(r)) for name, r in _by(networks, "what")]
    if ops and on:
        drawn.append(("Roofline of the layers", charts.roofline(ops, on)))
    if kept:
        drawn.append(("Memory of training", charts.memory(kept)))
    judged = [row for row in rows if row["error"] and row["error"]["mean"] is not None]
    if (errors := charts.errors(judged)) is not None:
        drawn.append(("Errors against float64", errors))
    figures = [report.figures(row) for row in rows]
    columns = [name for name in (figures or [{}])[0] if any(cells[name] for cells in figures)]
    return {
        "title": title,
        "machine": report.about(content),
        "best": [b for _, r in _by(networks, "case") if (b := best(r))],
        "missing": missing(rows),
        "skipped": content.get("skipped", []),
        "absent": content.get("absent", {}),
        "charts": drawn,
        "columns": columns,
        "cases": _by([row | {"cells": c} for row, c in zip(rows, figures, strict=True)], "case"),
    }


def write(several: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """A page of results, each with its title."""
    require("bench", "jinja2")
    require("bench", "matplotlib")
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(sections=[_section(*each) for each in several])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"report   {path}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json",
        help="default: all in bench/results")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("bench-report.html"), metavar="FILE",
        help="default: bench-report.html")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        several = [(path.stem, results.read(path, BENCH, LAUNCHES)) for path in args.files]
        several = several or list(results.kept(BENCH, LAUNCHES).items())
        # What was measured comes before what was counted.
        write(sorted(several, key=lambda each: each[1]["command"]), args.output)
    except CommandError as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 1
    return 0
