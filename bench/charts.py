"""Charts of the report, as SVG that goes into a page."""

import io
from collections.abc import Sequence
from typing import Any

from bench.floors import Machine
from fused_resnet.chart import COLOURS, WARNING, figure, quiet, throughput_figure
from fused_resnet.measure import EAGER, MEAN_FACTOR, MEAN_FLOOR, OURS, PEER

Row = dict[str, Any]
NAMES = {EAGER: "eager", PEER: "peers", OURS: "ours"}
MARKERS = "osD^vP*Xhd<>p"
GREY = "#5b6472"


def svg(drawn: Any) -> str:
    """A figure as the element of a page; its text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _logarithmic(axes: Any, x: str, y: str, title: str = "") -> None:
    quiet(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.spines["left"].set_visible(True)
    axes.yaxis.grid(True, color="#e3e6eb")
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def throughput(rows: Sequence[Row]) -> str:
    """Images a second of a network, a panel a case."""
    return svg(throughput_figure(rows))


def roofline(rows: Sequence[Row], on: Machine) -> str:
    """FLOPs a second of ops over FLOPs a byte, under the roof of the machine; a panel a dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    ops = list(dict.fromkeys(row["what"] for row in rows))
    drawn = figure(11, 4.6 * len(dtypes))
    for axes, dtype in zip(drawn.subplots(len(dtypes), 1, squeeze=False).flat, dtypes, strict=True):
        several = [row for row in rows if row["dtype"] == dtype]
        intensity = [row["flops"] / row["bytes"] for row in several]
        ends = [min(intensity) / 2, max(intensity) * 2]
        peak = on.peak.get(dtype)
        if peak is not None:
            ends = sorted({*ends, peak / on.copy})
        roof = [1e-9 * min(peak or float("inf"), x * on.copy) for x in ends]
        axes.plot(ends, roof, color="#2b303a", linewidth=1.4, label="copy, peak")
        for kind in NAMES:
            for op, marker in zip(ops, MARKERS * len(ops), strict=False):
                these = [r for r in several if r["kind"] == kind and r["what"] == op]
                x = [row["flops"] / row["bytes"] for row in these]
                y = [1e-9 * row["flops"] / row["seconds"]["median"] for row in these]
                label = op if kind == OURS else None
                look = {"marker": marker, "s": 26, "alpha": 0.8, "linewidths": 0}
                axes.scatter(x, y, color=COLOURS[kind], label=label, **look)
        _logarithmic(axes, "FLOPs a byte that must be moved", "GFLOP/s", dtype)
    return svg(drawn)


def memory(rows: Sequence[Row]) -> str:
    """What backward keeps, and by how much a step grows, of every variant; a panel a case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    most = max(sum(row["case"] == case for row in rows) for case in cases)
    drawn = figure(11, (0.36 * most + 0.9) * len(cases))
    for axes, case in zip(drawn.subplots(len(cases), 1, squeeze=False).flat, cases, strict=True):
        several = [row for row in rows if row["case"] == case]
        names = [row["variant"] for row in several]
        kept = [1e-6 * row["kept"] for row in several]
        growth = [1e-6 * (row.get("growth") or 0) for row in several]
        axes.barh(names, growth, height=0.66, color="#e3e6eb", label="growth over a step")
        colours = [COLOURS[row["kind"]] for row in several]
        axes.barh(names, kept, height=0.4, color=colours, label="kept for backward")
        for i, value in enumerate(kept):
            axes.text(max(value, growth[i]) * 1.01, i, f"{value:.0f} MB", va="center", fontsize=8)
        axes.set_xlim(0, 1.12 * max([*kept, *growth]))
        axes.set_title(case, loc="left", fontsize=11)
        axes.set_xlabel("MB  (pale: growth of memory over a step)", fontsize=8)
        axes.invert_yaxis()
        quiet(axes)
    return svg(drawn)


def errors(rows: Sequence[Row]) -> str | None:
    """The mean error of every variant over that of eager in the same case, beside the rule; None
    where nothing but eager has any."""
    eager: dict[str, float] = {}
    for row in rows:
        if row["kind"] == EAGER:
            eager[row["case"]] = max(eager.get(row["case"], 0.0), row["error"]["mean"])
    found = [
        row
        for row in rows
        if row["kind"] != EAGER and eager.get(row["case"]) and row["error"]["mean"]
    ]
    if not found:
        return None
    drawn = figure(11, 4.2)
    axes = drawn.subplots()
    for kind in (PEER, OURS):
        these = [row for row in found if row["kind"] == kind]
        x, y = [eager[row["case"]] for row in these], [row["error"]["mean"] for row in these]
        colours = [COLOURS[kind] if row["within"] else WARNING for row in these]
        if these:
            axes.scatter(x, y, c=colours, s=26, alpha=0.8, linewidths=0, label=NAMES[kind])
    ends = sorted(eager[row["case"]] for row in found)
    line = [ends[0] / 1.5, ends[-1] * 1.5]
    axes.plot(line, line, color=GREY, linewidth=1, label="as eager")
    rule = [MEAN_FACTOR * x + MEAN_FLOOR for x in line]
    axes.plot(line, rule, color=WARNING, linewidth=1, linestyle="--", label="the most allowed")
    _logarithmic(axes, "mean error of eager (the larger of its layouts)", "mean error")
    return svg(drawn)
