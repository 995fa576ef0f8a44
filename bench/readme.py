"""python -m bench readme: the README's tables and picture, from the files in bench/results."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import compare, page, report, results
from bench.results import BENCH
from fused_resnet import chart
from fused_resnet.command import CommandError, require

Content = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE = "resnet50-inference-cpu.png"
BEGIN, END = "<!-- python -m bench readme: begin -->\n", "<!-- python -m bench readme: end -->\n"
#: Whose figures are shown in full; of other networks the fastest ones are.
SHOWN = "resnet50"


def by_machine(contents: list[Content]) -> list[list[Content]]:
    """Those of one machine together, in the order of their dates; CPUs come first."""
    groups: list[list[Content]] = []
    for content in sorted(contents, key=lambda c: c["environment"]["date"]):
        for group in groups:
            if not compare.machines(group[0]["environment"], content["environment"]):
                group.append(content)
                break
        else:
            groups.append([content])
    return sorted(groups, key=lambda group: group[0]["environment"].get("device") == "cuda")


def cases(group: list[Content]) -> dict[str, list[dict[str, Any]]]:
    """The results of networks by case, of each the newest ones."""
    found: dict[str, list[dict[str, Any]]] = {}
    for content in group:
        newest: dict[str, list[dict[str, Any]]] = {}
        for row in filter(report.is_network, content["results"]):
            newest.setdefault(row["case"], []).append(row)
        found |= newest
    return found


def _notes(group: list[Content], found: dict[str, list[dict[str, Any]]]) -> str:
    """Of what, and what the tables do not show: where a peer is the faster, and what is missing."""
    commits = dict.fromkeys(report.when(content) for content in group)
    size = f"{group[-1]['size']}x{group[-1]['size']}"
    text = f"{report.machine(group[-1])}; {'; '.join(commits)}. Images of {size}."
    several = [b for rows in found.values() if (b := page.best(rows))]
    beaten = [f"{b.case} ({b.peer})" for b in several if b.to_peer is not None and b.to_peer < 1]
    if beaten:
        text += f" A peer is faster than ours in {len(beaten)} of {len(several)} cases: "
        text += f"{', '.join(beaten)}."
    rows = [row for of in found.values() for row in of if not row["seconds"]]
    for variant, _, why, where in page.missing(rows):
        text += f" {variant} has no time in {where}: {why}."
    return text


def _of_machine(group: list[Content]) -> str:
    found = cases(group)
    shown: dict[str, list[dict[str, Any]]] = {}
    others = []
    for rows in found.values():
        if rows[0]["what"].rpartition("/")[2] == SHOWN:
            shown.setdefault(rows[0]["what"], []).extend(rows)
        elif (b := page.best(rows)) is not None:
            peer = f"{b.to_peer:.2f}x" if b.to_peer is not None else "-"
            cells = [b.eager, b.peer, f"**{b.ours}**", f"{b.to_eager:.2f}x", peer]
            others.append((b.case, cells))
    parts = [report.network_table(what, rows) for what, rows in shown.items()]
    if others:
        columns = ["faster eager", "fastest peer", "fastest of ours", "to eager", "to the peer"]
        parts.append(report.table("others", columns, others))
    return "\n\n".join([*parts, _notes(group, found)])


def tables(contents: list[Content]) -> str:
    """What stands between BEGIN and END."""
    networks = [c for c in contents if any(map(report.is_network, c["results"]))]
    return "\n\n".join([*map(_of_machine, by_machine(networks)), report.LEGEND]) + "\n"


def updated(readme: str, contents: list[Content]) -> str:
    """The README with its tables made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"{README.name}: has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{tables(contents)}\n{end}{after}"


def picture(contents: list[Content], path: Path) -> None:
    """Inference by SHOWN on the first machine."""
    require("bench", "matplotlib")
    group = by_machine(contents)[0]
    rows = [row for of in cases(group).values() for row in of if row["what"] == SHOWN]
    chart.throughput("Networks", report.short(group[-1]), rows, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench readme",
        description="Makes the README's tables and picture anew from bench/results/*.json: of each "
        "machine the newest results of every case.",
    )
    parser.parse_args(argv)
    try:
        contents = list(results.kept(BENCH).values())
        text = updated(README.read_text(encoding="utf-8"), contents)
        picture(contents, results.RESULTS / PICTURE)
    except CommandError as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8")
    print(f"readme   {README}\npicture  {results.RESULTS / PICTURE}")
    return 0
