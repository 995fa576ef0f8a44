"""The options of conftest.py: a skip is counted, named and, where it is forbidden, a failure."""

import argparse
import os
import subprocess
import sys

import conftest
import pytest
from cases import ROOT

TESTS = """
import pytest

def test_passes(): pass
def test_needs_a_compiler(): pytest.skip("no g++: nothing to compile with")
@pytest.mark.skip(reason="no timm")
def test_is_marked(): pass
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
@pytest.mark.slow
def test_is_slow(): pass
"""
WHOLE_FILE = 'import pytest\npytest.skip("no triton", allow_module_level=True)\n'


def run(folder, *options: str) -> tuple[dict[str, int], str]:
    """Outcomes of a run with our conftest, counted, and what it printed."""
    (folder / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_whole_file.py").write_text(WHOLE_FILE)
    ini = f"[pytest]\npythonpath = {ROOT / 'tests'}\nmarkers =\n  slow: slow\n  gpu: gpu\n"
    (folder / "pytest.ini").write_text(ini)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=120
    )
    words = done.stdout.strip().splitlines()[-1].replace(",", "").split()
    counts = {words[i + 1].rstrip("s"): int(words[i]) for i in range(0, words.index("in"), 2)}
    return counts, done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"passed": 1, "skipped": 3, "xfailed": 1, "deselected": 1}),
        (("--full",), {"passed": 2, "skipped": 3, "xfailed": 1}),
        (("--require=all",), {"failed": 1, "error": 2, "passed": 1, "xfailed": 1, "deselected": 1}),
    ],
    ids=["plain", "full", "require-all"],
)
def test_skips(options, expected, tmp_path):
    counts, printed = run(tmp_path, *options)
    assert counts == expected, printed
    for reason in ("no g++: nothing to compile with", "no timm", "no triton"):
        assert reason in printed


def test_parts(tmp_path):
    """Together they are the whole, and each says what it leaves out."""
    total = 0
    for i in range(3):
        counts, printed = run(tmp_path, "--full", f"--part={i}/3")
        ran = sum(n for word, n in counts.items() if word != "deselected")
        total += ran - 1  # what is skipped as a file is in every part
        assert ran + counts.get("deselected", 0) == 6, printed
        assert f"left out: {6 - ran} tests of other parts than --part={i}/3" in printed
    assert total == 5


def test_parts_that_cannot_be():
    for part in ("3/3", "1", "-1/2", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be I/N"):
            conftest.Part.parse(part)


@pytest.mark.parametrize(
    ("required", "outcome"),
    [("g++,triton", {"failed": 1, "error": 1, "skipped": 1}), ("g,tri", {"skipped": 3})],
)
def test_only_what_is_required_fails(required, outcome, tmp_path):
    counts, printed = run(tmp_path, f"--require={required}")
    assert counts == {"passed": 1, "xfailed": 1, "deselected": 1} | outcome, printed


def test_without_hypothesis():
    """Only the tests that draw their inputs are skipped, and they say why."""
    code = "import sys; sys.modules['hypothesis'] = None; import pytest; sys.exit(pytest.main())"
    chosen = ["tests/test_bn_stats.py", "-k", "fuzz or opcheck", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", code, *chosen],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # one is hypothesis's own
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "no hypothesis" in done.stdout
    assert " passed, 1 skipped" in done.stdout
