"""Options, markers and what holds around every test.

A skip is never silent: ``--require`` names what must be there, and a test skipped for want of it
fails. What a run leaves out on purpose (``slow`` tests without ``--full``, ``gpu`` tests without a
GPU, large cases and faulty types of an emulated engine, all but a ``--part``) is deselected
instead, and the header or the summary says so.
"""

import argparse
import gc
import importlib.util
import os
import re
import sys
import zlib
from typing import NamedTuple

# Threads that wait must not spin: with a worker of pytest-xdist per core they would take the cores
# from those they wait for. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it torch warns that cuBLAS is not deterministic. Read when cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Without a GPU Triton's kernels are interpreted, on the CPU. Read when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
import pytest
import simt_engine

import fused_resnet
from fused_resnet import _C

if importlib.util.find_spec("hypothesis") is None:
    import no_hypothesis

    sys.modules["hypothesis"] = no_hypothesis

THREADS = 2
FAULTY = pytest.StashKey[int]()
OTHER_PARTS = pytest.StashKey[int]()


class Part(NamedTuple):
    """Every so many of the tests, evenly over files and parameters: by the checksum of its name."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def __contains__(self, name: object) -> bool:
        return zlib.crc32(str(name).encode()) % self.count == self.number


def pytest_addoption(parser):
    group = parser.getgroup("fused_resnet")
    group.addoption("--full", action="store_true", help="run the tests marked slow too")
    group.addoption(
        "--require",
        default="",
        metavar="LIST",
        help="comma-separated capabilities (gpu, g++, nvcc, triton, ...): a test whose reason to "
        "be skipped names one of them fails; all: every skip is a failure",
    )
    group.addoption(
        "--part",
        type=Part.parse,
        default=Part(0, 1),
        metavar="I/N",
        help="run one part of the tests, of N like ones: a sample, or what one process of several "
        "does",
    )
    group.addoption(
        "--unpoisoned",
        action="store_true",
        help="leave new memory as it is: for tools that watch what is read of it",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "isa: repeated with every instruction set")
    if "gpu" in required(config) and not torch.cuda.is_available():
        raise pytest.UsageError("--require=gpu: torch.cuda.is_available() is False")
    torch.set_num_threads(THREADS)
    # The default, TF32, has 10 bits. Set by its newer name, torch.export stops working.
    torch.backends.cudnn.allow_tf32 = False


def required(config) -> list[str]:
    return [word for word in config.getoption("--require").split(",") if word]


def left_out(config) -> dict[str, str]:
    """Markers whose tests do not run here, and why."""
    markers = {}
    if not config.getoption("--full"):
        markers["slow"] = "no --full"
    if not torch.cuda.is_available():
        markers["gpu"] = "no CUDA device"
    return markers


def pytest_report_header(config):
    markers = ", ".join(f"{name} ({why})" for name, why in left_out(config).items())
    part = config.getoption("--part")
    if part.count > 1:
        markers += f"{', ' if markers else ''}all but part {part} (--part)"
    large = ", ".join(f"{name} above {e.most} elements" for name, e in cases.EMULATED.items())
    return [
        f"fused_resnet: {fused_resnet.__version__}, isa {_C.isa()}, torch {torch.__version__}",
        f"fused_resnet: left out: {markers or 'nothing'}, emulated {large}; "
        f"required: {config.getoption('--require') or 'nothing'}",
    ]


def parameters(item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config, items):
    markers = left_out(config)
    faulty = [item for item in items if cases.interpreted_wrongly(parameters(item))]
    config.stash[FAULTY] = len(faulty)
    out = [
        item
        for item in items
        if any(item.get_closest_marker(name) for name in markers)
        or cases.too_slow(parameters(item))
    ]
    out += faulty
    other = [item for item in items if item.nodeid not in config.getoption("--part")]
    config.stash[OTHER_PARTS] = len({*other} - {*out})
    out += other
    if gone := dict.fromkeys(out):
        config.hook.pytest_deselected(items=[*gone])
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish():
    """Tens of thousands of tests are millions of objects, which no collection need visit again."""
    gc.collect()
    gc.freeze()


def forbidden(config, reason: str) -> str | None:
    """Why a skip for ``reason`` is a failure in this run, or None."""
    for name in required(config):
        if name == "all" or re.search(rf"(?<![\w+]){re.escape(name)}(?![\w+])", reason):
            return f"skipped, but --require={config.getoption('--require')}: {reason}"
    return None


def fail_forbidden_skip(config, report) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if (message := forbidden(config, reason)) is not None:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: {message}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    fail_forbidden_skip(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    fail_forbidden_skip(collector.config, report)
    return report


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(FAULTY, 0):
        terminalreporter.write_line(
            f"left out: {count} tests of bfloat16 on cpu-triton, which Triton's interpreter rounds "
            "wrongly"
        )
    if count := config.stash.get(OTHER_PARTS, 0):
        part = config.getoption("--part")
        terminalreporter.write_line(f"left out: {count} tests of other parts than --part={part}")
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED {report.nodeid}: {report.longrepr[2]}")


@pytest.fixture(autouse=True)
def poisoned(request):
    """Memory that is allocated and not written reads as NaN, whoever allocates it."""
    if request.config.getoption("--unpoisoned"):
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def simt():
    simt_engine.load()


@pytest.fixture(autouse=True)
def emulator(request):
    """Builds the emulated engines before the first test that runs on one."""
    if getattr(parameters(request.node).get("backend"), "engine", "") == "simt":
        request.getfixturevalue("simt")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server():
    """Runs the example scripts."""
    import training

    server = training.Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of images, two classes."""
    import training

    return training.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def examples(monkeypatch):
    """Makes the example scripts importable."""
    import training

    monkeypatch.syspath_prepend(training.EXAMPLES)
