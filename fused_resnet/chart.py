"""Results as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"eager": "#b8bec8", "peer": "#7d8799", "ours": "#0f7b6c"}
WARNING = "#b3261e"


def figure(width: float, height: float, top: float = 0.0) -> Any:
    """An empty figure of so many inches, laid out below the ``top`` ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - top / height), h_pad=0.12, w_pad=0.12)
    made = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(made)
    return made


def throughput_figure(rows: Sequence[dict[str, Any]], top: float = 0.0) -> Any:
    """Images a second of every variant, one panel a case.

    Args:
        rows: results as in JSON: with their case, images a call, and a time or why there is none.
        top: inches left free above.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(sum(row["case"] == case for row in rows) for case in cases)
    made = figure(6.2 * columns, lines * (0.42 * tallest + 0.9) + 0.2 + top, top)
    grid = made.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(grid.flat, cases, strict=False):
        _panel(axes, case, [row for row in rows if row["case"] == case])
    return made


def throughput(title: str, subtitle: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw :func:`throughput_figure` as a PNG."""
    made = throughput_figure(rows, top=0.8)
    height = made.get_figheight()
    made.text(0.012, 1 - 0.16 / height, title, fontsize=15, fontweight="bold", va="top")
    made.text(0.012, 1 - 0.5 / height, subtitle, fontsize=9, color="#5b6472", va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=150)


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
    quiet(axes)


def quiet(axes: Any) -> None:
    """Nothing but what is to be seen."""
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.grid(True, color="#e3e6eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
