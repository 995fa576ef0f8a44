"""Results as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"eager": "#b8bec8", "peer": "#7d8799", "ours": "#0f7b6c"}
WARNING = "#b3261e"


def throughput(title: str, subtitle: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw images a second of every variant, one panel a case, as a PNG.

    Args:
        rows: results as in JSON: with their case, images a call, and a time or why there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(sum(row["case"] == case for row in rows) for case in cases)
    height = lines * (0.42 * tallest + 0.9) + 1.0
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.8 / height), h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(6.2 * columns, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.16 / height, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.5 / height, subtitle, fontsize=9, color="#5b6472", va="top")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(grid.flat, cases, strict=False):
        _panel(axes, case, [row for row in rows if row["case"] == case])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, case: str, rows: list[dict[str, Any]]) -> None:
    names = [row["variant"] for row in rows]
    rates = [row["images"] / row["seconds"]["median"] if row["seconds"] else 0.0 for row in rows]
    axes.barh(names, rates, height=0.68, color=[COLOURS[row["kind"]] for row in rows])
    most = max([*rates, 1e-9])
    for i, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        if not row["seconds"]:
            reason = row["why_not"] if row["kind"] != "ours" else "failed: " + row["why_not"]
            axes.text(most * 0.01, i, reason[:60], va="center", fontsize=8, color=WARNING)
            continue
        low, high = (row["images"] / row["seconds"][end] for end in ("high", "low"))
        error = [[max(rate - low, 0)], [max(high - rate, 0)]]
        axes.errorbar(
            rate, i, xerr=error, fmt="none", ecolor="#2b303a", elinewidth=1.1, capsize=2.5
        )
        speedup = f"   {row['speedup']['median']:.2f}x" if row["speedup"] else ""
        weight = "bold" if row["kind"] == "ours" else "normal"
        axes.text(
            max(rate, high) + most * 0.02,
            i,
            f"{rate:.1f}{speedup}",
            va="center",
            fontsize=9,
            fontweight=weight,
        )
    axes.set_title(case, loc="left", fontsize=11)
    axes.set_xlim(0, most * 1.38)
    axes.set_xlabel("images / s  (whiskers: quartiles; x: against the faster eager)", fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.grid(True, color="#e3e6eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
