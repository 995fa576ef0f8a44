"""The README's tables are those of the files in bench/results, and say what speaks against us."""

import copy

import pytest

from bench import __main__ as bench
from bench import readme, results
from bench.results import BENCH
from fused_resnet.command import CommandError


@pytest.fixture
def contents():
    return copy.deepcopy(results.kept(BENCH))


def test_the_readme_has_them(contents):
    """Else: ``python -m bench readme``."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text, list(contents.values())) == text


def test_where_a_peer_wins_and_what_is_missing_is_told(contents):
    text = readme.tables([contents["resnet50-inference-cpu"]])
    assert "A peer is faster than ours in 4 of 4 cases: resnet50/b1/fp32 (OpenVINO, 54.2" in text
    assert "ONNX Runtime has no time in resnet50/b1/bf16, resnet50/b16/bf16: its CPU" in text


def test_of_a_machine_the_newest_results_count(contents):
    old = contents["resnet50-training-cpu"]
    new = copy.deepcopy(old)
    new["environment"] |= {"date": "2027-01-01T00:00:00+00:00", "commit": "new"}
    rows = [row for row in new["results"] if row["dtype"] == "fp32"]
    for row in rows:
        row["seconds"] = {name: value / 2 for name, value in row["seconds"].items()}
    new["results"] = rows
    text = readme.tables([new, old])
    line = next(line for line in text.splitlines() if line.startswith("| fused fast |"))
    assert line.startswith("| fused fast | **30.1 (1.07x)")  # twice 15.07
    assert "| **26.4 (1.14x)" in line  # not measured anew
    assert "commit fe6e461+, 2026-11-26; commit new, 2027-01-01." in text
    assert text.count("AMD EPYC") == 1


def test_other_networks_in_short(contents):
    content = contents["resnet50-inference-cpu"]
    for row in content["results"]:
        row["what"] = "resnet18"
        row["case"] = row["case"].replace("resnet50", "resnet18")
    text = readme.tables([content])
    expected = "| resnet18/b1/fp32 | eager NHWC, 31.7 img/s | OpenVINO, 54.2 img/s |"
    assert f"{expected} **frozen, 49.4 img/s** | 1.55x | 0.91x |" in text
    assert "images/s |" not in text


def test_machines_come_one_after_the_other(contents):
    text = readme.tables(list(contents.values()))
    assert text.index("AMD EPYC") < text.index("NVIDIA H200, driver")
    assert "bn_act" not in text


def test_the_lines_must_be_there(contents):
    with pytest.raises(CommandError, match="has no lines"):
        readme.updated("# A README\n", list(contents.values()))


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", path)
    monkeypatch.setattr(readme, "PICTURE", "x.png")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name in ("resnet50-inference-cpu", "memory-bound-h200", "launches"):
        source = bench.RESULTS / f"{name}.json"
        (tmp_path / source.name).write_text(source.read_text())
    path.write_text("no lines\n")
    assert bench.main(["readme"]) == 1
    assert "has no lines" in capsys.readouterr().err
    path.write_text(f"before\n{readme.BEGIN}old\n{readme.END}after\n")
    assert bench.main(["readme"]) == 0
    text = path.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n| resnet50, images/s |")
    assert text.endswith(f"\n{readme.END}after\n")
    assert "old" not in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
