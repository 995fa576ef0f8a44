"""Results as text: a table in the terminal, Markdown for the README."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from fused_resnet.measure import Pace
from fused_resnet.variants import FROZEN, TUNED, WINOGRAD

Row = dict[str, Any]
#: With less rounds quartiles tell nothing.
LEAST_ROUNDS = Pace().least_rounds
#: What the tables of networks show.
LEGEND = (
    "Medians of interleaved rounds; in parentheses how many times as fast as the faster eager; for "
    "networks also the mean error against float64, relative to the largest output (of a training "
    "step: of gradients, each relative to its largest) and what backward keeps."
)


def is_network(row: Row) -> bool:
    return row["bytes"] is None


def rate(row: Row) -> str:
    """Images a second of a network; of an op GB/s and, where it computes much, GFLOP/s."""
    median = row["seconds"]["median"]
    if is_network(row):
        return f"{row['images'] / median:.1f} img/s"
    rate = f"{1e-9 * row['bytes'] / median:.1f} GB/s"
    if row["flops"] > 10 * row["bytes"]:
        rate = f"{1e-9 * row['flops'] / median:.0f} GFLOP/s, {rate}"
    return rate


def ratio(value: Row | None) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})" if value else ""


def why_failed(row: Row) -> str | None:
    """What is wrong with a result of ours, or None.

    That of a tuned model is also wrong if it is slower than eager, which was one of its ways.
    """
    if not row["within"]:
        return row["why_not"]
    if row["variant"] not in (TUNED, FROZEN, WINOGRAD) or len(row["samples"]) < LEAST_ROUNDS:
        return None
    slower = row["speedup"]["high"] < 1
    return f"it is tuned, and slower than eager: {ratio(row['speedup'])}x" if slower else None


def share_of_floor(row: Row) -> str:
    """The least time there is for it, in per cent of what it takes; empty where it is not known."""
    least = row["floor"]["seconds"]
    return f"{100 * least / row['seconds']['median']:.0f}%" if least and row["seconds"] else ""


def terminal(rows: list[Row]):
    """A rich table, with a section for each case; columns nobody has a figure for are left out."""
    from rich import box
    from rich.table import Table

    cells_of = [figures(row) for row in rows]
    titles = [title for title in cells_of[0] if any(cells[title] for cells in cells_of)]
    made = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("", no_wrap=True)
    for title in titles:
        made.add_column(title, justify="right")
    for case, several in groupby(zip(rows, cells_of, strict=True), lambda pair: pair[0]["case"]):
        made.add_row(f"[bold]{case}[/]")
        for row, cells in several:
            style = None if row["within"] or row["error"] is None else "red"
            name = f"[bold]{row['variant']}[/]" if row["kind"] == "ours" else row["variant"]
            made.add_row(f"  {name}", *(cells[title] for title in titles), style=style)
        made.add_section()
    return made


def figures(row: Row) -> dict[str, str]:
    """What a table shows of a result, by the title of its column."""
    time = str(row["why_not"])
    if row["seconds"]:
        median, low, high = (1e3 * row["seconds"][x] for x in ("median", "low", "high"))
        digits = max(0, 2 - math.floor(math.log10(median)))  # three of them count
        time = f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    return {
        "time, ms": time,
        "rate": rate(row) if row["seconds"] else "",
        "of floor": share_of_floor(row),
        "vs eager": ratio(row["speedup"]),
        "vs best peer": ratio(row["to_peer"]),
        "start (first call)": _start(row),
        "mean error": _error(row["error"]["mean"]) if row["error"] else "",
        "max error": _error(row["error"]["max"]) if row["error"] else "",
        "kept": _megabytes(row.get("kept")),
        "growth": _megabytes(row.get("growth")),
        "energy an image": _energy(row),
    }


def _start(row: Row) -> str:
    """How long a network takes to its first output, and of that the first call, in which some
    compile; older results do not have that."""
    start, first = row["prepare_seconds"], row.get("first_call_seconds")
    if start is None or not is_network(row):
        return ""
    return f"{start:.1f} s" if first is None else f"{start:.1f} s ({first:.1f})"


def _energy(row: Row) -> str:
    return "" if row.get("joules") is None else f"{1e3 * row['joules'] / row['images']:.0f} mJ"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{1e-6 * value:.0f} MB"


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def markdown(content: Row) -> str:
    """Tables of all results, and what they were measured on."""
    tables: dict[str, list[Row]] = {}
    for row in content["results"]:
        title = f"{row['what']}, batch {row['batch']}, {row['dtype']}"
        tables.setdefault(row["what"] if is_network(row) else title, []).append(row)
    parts = [
        network_table(title, rows) if is_network(rows[0]) else _op_table(title, rows)
        for title, rows in tables.items()
    ]
    return "\n\n".join([*parts, f"{about(content)} {LEGEND}"]) + "\n"


def about(content: Row) -> str:
    """What results were measured on, of what, and when."""
    size = f"{content['size']}x{content['size']}"
    return f"{machine(content)}; {when(content)}. Images of {size}."


def short(content: Row) -> str:
    """The machine in few words."""
    env = content["environment"]
    if env.get("device") == "cuda":
        return f"{env['gpus'][0]}, torch {env['versions']['torch']}"
    return f"{env['processor']}, {env['threads']} threads, torch {env['versions']['torch']}"


def machine(content: Row) -> str:
    """What results were measured on, with the versions."""
    env = content["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    text = f"{env['processor']} ({env['isa']}), {env['threads']} threads"
    if env.get("device") == "cuda":
        text = f"{env['gpus'][0]}, driver {env['driver']}"
    if (copy := env.get("copy_bytes_per_second")) is not None:
        text += f", a copy moves {1e-9 * copy:.0f} GB/s"
    for dtype, peak in env.get("peak_flops", {}).items():
        text += f", a convolution computes {1e-9 * peak:.0f} GFLOP/s in {dtype}"
    return f"{text}; {versions}"


def when(content: Row) -> str:
    env = content["environment"]
    return f"commit {env['commit'] or 'unknown'}, {env['date'][:10]}"


def table(corner: str, columns: list[str], lines: Iterable[tuple[str, list[str]]]) -> str:
    """In Markdown."""
    head = f"| {corner} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}"
    return "\n".join([head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines)])


def _cells(rows: list[Row], row_key: str, column_key: str) -> tuple[list[str], list[str], Row]:
    names = list(dict.fromkeys(row[row_key] for row in rows))
    columns = list(dict.fromkeys(row[column_key] for row in rows))
    return names, columns, {(row[row_key], row[column_key]): row for row in rows}


def network_table(name: str, rows: list[Row]) -> str:
    """Of the results of a network, a line for each variant."""
    variants, cases, found = _cells(rows, "variant", "case")

    def cell(variant: str, case: str) -> str:
        row = found.get((variant, case))
        if row is None or not row["seconds"]:
            return "-"
        text = f"{row['images'] / row['seconds']['median']:.1f} ({row['speedup']['median']:.2f}x)"
        text += f" {_error(row['error']['mean'])}"
        if row.get("kept") is not None:
            text += f", {_megabytes(row['kept'])} kept"
        return f"**{text}**" if row["kind"] == "ours" else text

    titles = [", ".join(c.removeprefix(f"{name}/").split("/")) for c in cases]
    lines = [(v, [cell(v, c) for c in cases]) for v in variants]
    return table(f"{name}, images/s", titles, lines)


def _op_table(name: str, rows: list[Row]) -> str:
    cases, variants, found = _cells(rows, "case", "variant")

    def cell(case: str, variant: str) -> str:
        row = found.get((case, variant))
        if row is None or not row["seconds"]:
            return "-"
        share = share_of_floor(row)
        return f"{rate(row)}{share and f', {share}'} ({row['speedup']['median']:.2f}x)"

    lines = [(c.split("/")[1], [cell(c, v) for v in variants]) for c in cases]
    return table(name, variants, lines)


def launch_tables(rows: list[Row]) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """Of what networks launch and move: titles, columns and lines."""
    columns = ["launches on activations", "other launches", "MB an image"]
    groups = groupby(rows, lambda row: f"{row['network']}, {row['task']}, {row['dtype']}")
    return [
        (title, columns, [(r["variant"], _launch_cells(r)) for r in of]) for title, of in groups
    ]


def launches(rows: list[Row]) -> str:
    """Those tables; beside each figure its share of eager's."""
    return "\n\n".join(table(*each) for each in launch_tables(rows)) + "\n"


def _launch_cells(row: Row) -> list[str]:
    if row["why_not"] is not None:
        return [row["why_not"], "", ""]
    share = row["of_eager"]
    moved = 1e-6 * row["bytes"] / row["batch"]
    large = f"{row['large']} ({share['large']:.2f}x)"
    return [large, str(row["small"]), f"{moved:.1f} ({share['bytes']:.2f}x)"]
