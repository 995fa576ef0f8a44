"""python -m bench compare A.json B.json: what is faster, what is slower, and what is noise."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import report, results
from fused_resnet.command import CommandError
from fused_resnet.measure import EAGER, OURS

FASTER, SLOWER, NOISE, UNKNOWN = "faster", "slower", "noise", "not told"
WRONG, MORE, LESS = "wrong now", "keeps more", "keeps less"


class Verdict(NamedTuple):
    """On a variant of a case, or on what it keeps for backward."""

    case: str
    variant: str
    kind: str
    before: str
    after: str
    what: str
    note: str = ""


def differences(a: dict[str, Any], b: dict[str, Any], *names: str) -> list[str]:
    """What of two environments is not the same, in words."""

    def value(environment: dict[str, Any], name: str) -> Any:
        default = "cpu" if name == "device" else None  # what older files do not tell
        return environment.get(name, default)

    pairs = {name: (value(a, name), value(b, name)) for name in names}
    return [f"{name} {old} and {new}" for name, (old, new) in pairs.items() if old != new]


def machines(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In what the machines of two environments differ."""
    on_gpus = a.get("device") == "cuda"
    names = ("gpus", "driver") if on_gpus else ("isa", "cores", "threads")
    return differences(a, b, "device", "processor", *names)


def _faster(row: dict[str, Any]) -> tuple[dict[str, float] | None, str]:
    """What is compared, the more the better, and as text: how many times as fast as eager, and of
    eager itself the calls a second."""
    if not row["seconds"]:
        return None, "-"
    if row["kind"] == EAGER or not row["speedup"]:
        s = row["seconds"]
        calls = {"median": 1 / s["median"], "low": 1 / s["high"], "high": 1 / s["low"]}
        return calls, f"{1e3 * s['median']:.3g} ms ({1e3 * s['low']:.3g}-{1e3 * s['high']:.3g})"
    return row["speedup"], f"{report.ratio(row['speedup'])}x"


def judge(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Verdict]:
    """Verdicts on the results of a variant in two files."""
    known = (after["case"], after["variant"], after["kind"])
    (old, old_text), (new, new_text) = _faster(before), _faster(after)
    if before["within"] and not after["within"]:
        yield Verdict(*known, old_text, new_text, WRONG, after["why_not"] or "outside the rule")
    elif old is None or new is None:
        if before["seconds"] or after["seconds"]:
            why = after["why_not"] if new is None else before["why_not"]
            yield Verdict(*known, old_text, new_text, UNKNOWN, why)
    elif min(len(before["samples"]), len(after["samples"])) < report.LEAST_ROUNDS:
        note = f"less than {report.LEAST_ROUNDS} rounds"
        yield Verdict(*known, old_text, new_text, UNKNOWN, note)
    else:
        change = new["median"] / old["median"]
        what = NOISE
        if new["low"] > old["high"]:
            what = FASTER
        elif new["high"] < old["low"]:
            what = SLOWER
        yield Verdict(*known, old_text, new_text, what, f"{change:.2f}x")
    kept = before.get("kept"), after.get("kept")
    if None not in kept and kept[0] != kept[1]:
        texts = [f"{1e-6 * value:.1f} MB" for value in kept]
        yield Verdict(*known, *texts, MORE if kept[1] > kept[0] else LESS)


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Verdict]:
    """On all that is in both, what is worst first."""

    def rows(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["case"], row["variant"]): row for row in content["results"]}

    before, after = rows(a), rows(b)
    elsewhere = machines(a["environment"], b["environment"])
    both = [key for key in before if key in after]
    if not both:
        raise CommandError("the files have no case and variant in common")
    found = [verdict for key in both for verdict in judge(before[key], after[key])]
    if elsewhere:  # times of different machines do not compare
        found = [v for v in found if v.kind != EAGER or v.what in (MORE, LESS)]
    order = (WRONG, SLOWER, MORE, UNKNOWN, FASTER, LESS, NOISE)
    return sorted(found, key=lambda v: order.index(v.what))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Compares two files of results, the one before first. A variant is compared by "
        "how many times as fast as the faster eager it is in the same run, eager by its time, "
        "where the machine is the same. What lies within the quartiles is noise. Exit status 0: "
        "nothing of ours is worse; 1: something of ours is slower, keeps more or is wrong now; "
        "2: there is nothing to compare.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    args = parser.parse_args(argv)
    try:
        a, b = results.read(args.before), results.read(args.after)
        if a["size"] != b["size"]:
            raise CommandError(f"images of {a['size']} and of {b['size']} pixels do not compare")
        found = compare(a, b)
    except CommandError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    environments = a["environment"], b["environment"]
    if elsewhere := machines(*environments):
        print(f"DIFFERENT MACHINES: {'; '.join(elsewhere)}: only ratios to eager are compared\n")
    versions = (e["versions"] for e in environments)
    other = differences(*versions, *environments[0]["versions"])
    print("; ".join([*differences(*environments, "commit", "date"), *other]) + "\n")
    lines = [(f"{v.case} | {v.variant}", [v.before, v.after, f"{v.what} {v.note}"]) for v in found]
    print(report.table("case | variant", ["before", "after", "verdict"], lines))
    counts = Counter(v.what for v in found)
    print("\n" + ", ".join(f"{n} {what}" for what, n in counts.items()))
    worse = [v for v in found if v.kind == OURS and v.what in (WRONG, SLOWER, MORE)]
    return 1 if worse else 0
