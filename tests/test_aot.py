"""Triton compiles every kernel for each architecture, without a GPU; tests/aot.py says how."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from cases import ROOT


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one the kernels may have been loaded to be interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("types", [(), pytest.param(("--all-types",), marks=pytest.mark.slow)])
def test_every_kernel_compiles_well(types, arch):
    done = run("aot.py", "--arch", arch, *types)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) kernels compiled", done.stdout)[1]) > 40


FOUND = {
    "loses_nan": "loses NaN: .*max.f32",
    "moves_little": "moves fewer than 16 bytes: .*ld.global",
    "spills": r"spills: \d+ bytes of local memory",
    "multiplies_by_one_warp": "multiplies matrices without wgmma",
    "takes_no_one": "(?s)does not compile: .*'int' object has no attribute 'to'",
}


def test_faults_are_found():
    done = run("aot.py", "--planted")
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^(\w+): (.*?)$(?=\n\w+: |\n\Z)", done.stdout, re.S | re.M))
    assert lines.keys() == FOUND.keys()
    for name, words in FOUND.items():
        assert re.search(words, lines[name]), lines[name]


def test_launches_reuse_what_was_compiled_where_triton_does():
    done = run("aot_launches.py")
    assert done.returncode == 0, done.stderr
