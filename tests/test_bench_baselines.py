"""Launches, bytes and memory are as bench/baselines.json has them.

Where a change means to move them: ``python -m bench baselines --write``.
"""

import json

import pytest

from bench import __main__ as bench
from bench import baselines, launches
from fused_resnet.plan import MEMORY


@pytest.mark.parametrize("network", baselines.NETWORKS)
def test_baselines(network):
    assert baselines.check(network) == []


def test_all_of_them_are_there():
    known = json.loads(baselines.PATH.read_text())
    each = 2 * len(launches.ENGINES) + 2 * len(MEMORY)
    assert len(known["figures"]) == each * len(baselines.NETWORKS)
    assert (known["batch"], known["size"]) == (baselines.BATCH, baselines.SIZE)


@pytest.mark.parametrize(
    ("was", "now", "exact", "expected"),
    [
        (100, 100, True, []),
        (100, 99, True, ["x: bytes was 100, is 99"]),
        (100, 101, True, ["x: bytes was 100, is 101"]),
        (100, 102, False, []),
        (100, 50, False, []),
        (100, 103, False, ["x: bytes was 100, is 103"]),
    ],
)
def test_differences(was, now, exact, expected):
    assert list(baselines.differences("x", {"bytes": was}, {"bytes": now}, exact)) == expected


def test_what_is_new_is_told():
    assert list(baselines.differences("x", None, {"bytes": 1}, True)) == [
        "x: is not among the baselines"
    ]
    assert list(baselines.differences("x", {}, {"bytes": 1}, False)) == ["x: bytes was None, is 1"]


def test_command(tmp_path, monkeypatch, capsys):
    kept = [7]
    path = tmp_path / "baselines.json"
    monkeypatch.setattr(baselines, "PATH", path)
    monkeypatch.setattr(baselines, "NETWORKS", ("net",))
    monkeypatch.setattr(baselines, "counts", lambda network: [(network, lambda: {"kept": kept[0]})])
    monkeypatch.setattr(baselines.engines, "unavailable", lambda engine: None)
    assert bench.main(["baselines", "--write"]) == 0
    assert json.loads(path.read_text())["figures"] == {"net": {"kept": 7}}
    assert bench.main(["baselines"]) == 0
    kept[0] = 8
    assert bench.main(["baselines"]) == 1
    assert "net: kept was 7, is 8" in capsys.readouterr().out
    monkeypatch.setattr(baselines.engines, "unavailable", lambda engine: "no such thing")
    assert bench.main(["baselines", "--write"]) == 1
    assert "no such thing" in capsys.readouterr().err
