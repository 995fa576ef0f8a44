"""The page of results: everything is in it, nothing is fetched, and what failed is told."""

import copy
import html.parser
import json
import re

import pytest

from bench import __main__ as bench
from bench import page, results
from bench.results import BENCH, LAUNCHES
from fused_resnet import variants

EMPTY = {"meta", "path", "use", "rect"}  # elements without an end, or that end themselves


class Checker(html.parser.HTMLParser):
    """Every element ends where it should; collects text and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker, " ".join("".join(checker.text).split())


def test_real_files(tmp_path, capsys):
    """All that are in the repository, by the command."""
    path = tmp_path / "deep" / "page.html"
    assert bench.main(["report", "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"report   {path}\n"
    text = path.read_text(encoding="utf-8")
    checker, seen = parsed(text)
    assert checker.fetched == []
    assert not re.search(r"@import|url\((?!#)", text)
    files = {p.stem: results.read(p, BENCH, LAUNCHES) for p in results.RESULTS.glob("*.json")}
    for name, content in files.items():
        assert name in seen
        for row in content["results"]:
            assert row["variant"] in seen
            assert row.get("case", row.get("network")) in seen
    charts = ["Throughput of resnet50", "Memory of training", "Roofline of the layers", "Errors"]
    assert all(title in seen for title in charts)
    assert checker.tags.count("svg") >= len(charts)
    assert "NVIDIA H200, driver" in seen
    assert "its CPU provider has no convolution in torch.bfloat16" in seen
    assert seen.index("memory-bound-h200") < seen.index("counted without one")


def section(change):
    """Of real results, changed."""
    content = results.read(results.RESULTS / "resnet50-training-cpu.json")
    content = copy.deepcopy(content)
    change(content["results"])
    return page._section("title", content)


def test_what_failed_is_told():
    def fail(rows):
        for row in rows:
            if row["variant"] == "fused lean":
                row |= {"seconds": None, "speedup": None, "within": False}
                row["why_not"] = "its error is outside the rule <"
                row["error"] = {"mean": None, "max": None}

    found = section(fail)
    lean = next(m for m in found["missing"] if m[0] == "fused lean")
    assert lean[1:3] == ("FAILED", "its error is outside the rule <")
    assert "b8/fp32" in lean[3]
    assert "b8/bf16" in lean[3]


def test_in_short():
    first = section(lambda rows: None)["best"][0]
    assert first.case == "train/resnet50/b8/fp32"
    assert first.ours.startswith("fused fast, 15.1")
    assert first.eager.startswith("eager NHWC, 14.0")
    assert first.to_eager == pytest.approx(1.07, abs=0.01)
    assert first.to_peer == pytest.approx(1.12, abs=0.01)

    def leave_eager(rows):
        rows[:] = [row for row in rows if row["kind"] == "eager"]

    assert section(leave_eager)["best"] == []


def test_eight_bits_are_not_held_against_those_who_have_more():
    def rename(rows):
        for row in rows:
            row["variant"] = row["variant"].replace("fused fast", variants.INT8)

    assert section(rename)["best"][0].ours.startswith("fused, 14.6")


def test_a_network_that_comes_again_is_drawn_once():
    def mix(rows):
        for row in list(rows[: len(rows) // 2]):
            other = {"what": "train/resnet18", "case": "train/resnet18/b8/fp32"}
            rows.insert(len(rows) // 2, row | other)

    titles = [title for title, _ in section(mix)["charts"]]
    assert titles[:3] == [
        "Throughput of train/resnet50",
        "Throughput of train/resnet18",
        "Memory of training",
    ]


def test_nothing_but_eager():
    def leave_eager(rows):
        rows[:] = [row for row in rows if row["kind"] == "eager"]

    titles = [title for title, _ in section(leave_eager)["charts"]]
    assert titles == ["Throughput of train/resnet50", "Memory of training"]


def test_names_are_escaped(tmp_path):
    content = results.read(results.RESULTS / "resnet50-training-cpu.json")
    content["results"][0]["why_not"] = "<script>"
    page.write([("<b>", content)], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "<script>" not in text
    assert "<h2>&lt;b&gt;</h2>" in text


@pytest.mark.parametrize("content", ["{", json.dumps({"schema": 1, "command": "gpu-check"})])
def test_files_that_do_not_do(content, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    output = tmp_path / "x.html"
    assert bench.main(["report", str(tmp_path / "x.json"), "--output", str(output)]) == 1
    assert "x.json" in capsys.readouterr().err
    assert not output.exists()
