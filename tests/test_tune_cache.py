"""The file of measured choices: what is taken from it, and what a bad one does: nothing."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from cases import ROOT

from fused_resnet import tune_cache
from fused_resnet.tune_cache import FORMAT, Cache, Entry

HERE = {"device": "a processor", "torch": "2.15.0"}
ENTRY = Entry("native", {"native": 1e-3, "vendor": 2e-3}, {"triton": "it has no kernel"})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fused_resnet"


def written():
    cache = Cache(HERE)
    with cache.lock():
        cache.add("key", ENTRY)
    return cache.path


def read():
    cache = Cache(HERE)
    cache.read()
    return cache.entries


def test_what_is_written_is_read(folder):
    assert read() == {}
    path = written()
    assert path.parent == folder
    assert read() == {"key": ENTRY}
    assert Cache({**HERE, "torch": "2.16.0"}).path != path
    assert json.loads(path.read_text())["environment"] == HERE


def test_home_where_nothing_else_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tune_cache.folder() == tmp_path / ".cache" / "fused_resnet"


def test_nobody_else_may_look_in(folder):
    written()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    written()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def content(**changed):
    whole = {"format": FORMAT, "environment": HERE, "entries": {"key": ENTRY._asdict()}}
    return json.dumps({**whole, **changed})


def entry(**changed):
    return content(entries={"key": {**ENTRY._asdict(), **changed}})


BAD = {
    "truncated": (content()[:-9], ""),
    "empty": ("", "Expecting value"),
    "nested": ("[" * 100_000, "recursion"),
    "a list": ("[]", "it holds no object"),
    "older": (content(format=0), f"its format is 0, this version reads {FORMAT}"),
    "newer": (content(format=FORMAT + 1), "its format is"),
    "of another device": (
        content(environment={**HERE, "device": "b"}),
        "another device or version",
    ),
    "of another torch": (content(environment={**HERE, "torch": "3"}), "another device or version"),
    "no entries": (content(entries=[]), "it has no entries"),
    "no entry": (content(entries={"key": "native"}), "other fields than way, seconds, failed"),
    "more": (entry(code="import os"), "other fields than way, seconds, failed"),
    "less": (content(entries={"key": {"way": "native"}}), "other fields"),
    "not timed": (entry(way="reference"), "takes what was not timed"),
    "no way": (entry(way=["native"]), "takes what was not timed"),
    "seconds": (entry(seconds=["native"]), "no times"),
    "nan": (entry(seconds={"native": float("nan")}), "no times"),
    "negative": (entry(seconds={"native": -1.0}), "no times"),
    "boolean": (entry(seconds={"native": True}), "no times"),
    "text": (entry(seconds={"native": "1.0"}), "no times"),
    "failures": (entry(failed={"vendor": 3}), "failures without a reason"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_ignored(name):
    text, words = BAD[name]
    path = written()
    path.write_text(text)
    with pytest.warns(UserWarning, match=rf"{path}: ignored, as if nothing were tuned: .*{words}"):
        assert read() == {}
    assert path.read_text() == text
    written()
    assert read() == {"key": ENTRY}


def test_bytes_that_are_no_text():
    written().write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="ignored"):
        assert read() == {}


def test_a_file_of_another_user(monkeypatch):
    written()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with pytest.warns(UserWarning, match="it belongs to another user"):
        assert read() == {}


def test_a_file_is_whole_or_not_there(monkeypatch):
    path = written()
    before = path.read_text()

    def full(*args, **kwargs):
        raise OSError("no space left")

    cache = Cache(HERE)
    monkeypatch.setattr(type(path), "write_text", full)
    with cache.lock(), pytest.warns(UserWarning, match="for this process alone: no space left"):
        cache.add("other", ENTRY)
    assert cache.entries == {"other": ENTRY}
    assert path.read_text() == before


def test_a_folder_that_cannot_be_made(folder):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file is in its place")
    cache = Cache(HERE)
    with pytest.warns(UserWarning, match="for this process alone"), cache.lock():
        cache.add("key", ENTRY)
    assert cache.entries == {"key": ENTRY}


def test_environment_of_a_processor():
    found = tune_cache.environment(torch.device("cpu"))
    names = {"device", "isa", "threads", "fused_resnet", "kernels", "torch", "triton"}
    assert found.keys() == names
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert len(found["kernels"]) == 16


def test_environment_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = tune_cache.environment(torch.device("cuda", 0))
    assert found["device"] == "a GPU"
    assert "threads" not in found
    assert found["kernels"] != tune_cache.environment(torch.device("cpu"))["kernels"]


TUNES = """
import sys, time
sys.path[:0] = {paths!r}
import torch
from models import bottleneck, images
import fused_resnet
from fused_resnet import measure

def seconds(attempt, repeats):
    print(attempt.site.facts.op, attempt.way, flush=True)
    time.sleep(0.02)  # so that the other is here before this one has done
    return 0.5 if attempt.way == "eager" else 1.0

measure.clock_in_sequence = lambda device: seconds
torch.set_num_threads(1)
sys.stdin.readline()
model = fused_resnet.fuse(bottleneck()).train()
choices = fused_resnet.tune(model, images(0, 2, 8, channels=24))
print("taken", *(c.entry.way for c in choices), flush=True)
"""


def test_two_processes_at_once(folder):
    """One of them measures, the other waits for it and takes what it found."""
    code = TUNES.format(paths=[str(ROOT), str(ROOT / "tests")])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) for _ in range(2)]
    for process in both:  # together
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [lines[-1] for lines in printed] == ["taken eager", "taken eager"]
    timed = sorted(len(lines) - 1 for lines in printed)
    assert timed[0] == 0
    assert timed[1] > 0
    assert len([*folder.glob("tuned-*.json")]) == 1


def test_one_thread_at_a_time_and_again_and_again(folder):
    """Sites lie within others."""
    cache, other = Cache(HERE), Cache(HERE)
    with cache.lock(), cache.lock():
        cache.add("inner", ENTRY)
        script = f"import filelock; filelock.FileLock({str(cache.path.with_suffix('.lock'))!r}, 0)"
        done = subprocess.run([sys.executable, "-c", f"{script}.acquire()"], capture_output=True)
        assert b"Timeout" in done.stderr
    with other.lock():
        other.read()
    assert other.entries == {"inner": ENTRY}
