"""Which engine runs: the choice, the wish, and the same tests on every instruction set."""

import itertools
import os
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from cases import DTYPES, EMULATED, ENGINES, ROOT, isas

from fused_resnet import _C, engines, functional, native, use_engine
from fused_resnet.engines import EngineError, choose

CHOICES = {
    # (op, device, dtype, wish, channels_last): engine, or the error and words of it
    ("conv_bn_act", "cpu", torch.float32, "auto", True): "native",
    ("conv_bn_act", "cpu", torch.float32, "auto", False): "vendor",
    ("bn_act", "cpu", torch.float16, "auto", True): "native",
    ("bn_act", "cpu", torch.float64, "auto", False): "native",
    ("bn_scale_shift", "cpu", torch.float32, "auto", False): "native",
    ("bn_act_maxpool", "cpu", torch.float32, "auto", False): "native",
    ("eltwise_act", "cpu", torch.float32, "auto", False): "native",
    ("eltwise_act", "xpu", torch.float32, "auto", True): "reference",
    ("conv_bn_act", "meta", torch.float32, "auto", True): "reference",
    ("bn_act", "cpu", torch.float8_e4m3fn, "auto", True): "reference",
    ("conv_bn_act", "cpu", torch.float32, "reference", True): "reference",
    ("conv_bn_act", "cpu", torch.float32, "native", False): "native",
    ("conv_bn_act", "cpu", torch.float32, "vendor", True): "vendor",
    ("bn_act", "cpu", torch.int32, "auto", True): (NotImplementedError, "bn_act.*floating.*int32"),
    ("bn_act", "cpu", torch.int32, "native", True): (EngineError, "bn_act.*'native'.*int32"),
    ("bn_act", "xpu", torch.float32, "native", True): (EngineError, "no kernels for device 'xpu'"),
    ("bn_act", "cpu", torch.int32, "triton", True): (EngineError, "bn_act.*'triton'.*int32"),
    ("bn_act", "xpu", torch.float32, "triton", True): (EngineError, "no kernels for device 'xpu'"),
    ("bn_act", "cuda", torch.float8_e4m3fn, "native", True): (
        EngineError,
        "bn_act.*'native'.*float8",
    ),
}


@pytest.mark.parametrize(("asked", "answer"), CHOICES.items(), ids=str)
def test_choose(asked, answer):
    if isinstance(answer, str):
        assert choose(*asked) == answer
    else:
        error, words = answer
        with pytest.raises(error, match=words):
            choose(*asked)


@pytest.mark.parametrize("has", [False, True])
def test_bf16_goes_to_matrix_units(has, monkeypatch):
    """Which torch's convolution uses and ours does not."""
    monkeypatch.setattr(engines, "_HAS_MATRIX_UNITS", has)
    chosen = "vendor" if has else "native"
    assert choose("conv_bn_act", "cpu", torch.bfloat16) == chosen
    assert choose("conv_bn_act", "cpu", torch.float32) == "native"
    assert choose("bn_act", "cpu", torch.bfloat16) == "native"


def test_choose_is_pure():
    """It reads nothing but its arguments: not the wish, not the threads, not an earlier answer."""
    asked = list(itertools.product(engines.OPS, ("cpu", "xpu"), DTYPES, ("auto",), (False, True)))
    before = [choose(*each) for each in asked]
    with use_engine("reference"):
        assert [choose(*each) for each in reversed(asked)] == before[::-1]


def test_every_choice_has_an_implementation():
    for op, dtype, engine in itertools.product(engines.OPS, DTYPES, engines.ENGINES):
        if engine == "auto" or engines.why_not(engine, op, "cpu", dtype) is not None:
            continue
        assert callable(engines.implementation(op, choose(op, "cpu", dtype, engine)))


def test_every_engine_there_is_is_tested():
    usable = {name for name in engines.ENGINES if engines.unavailable(name) is None}
    assert usable - set(EMULATED) == {"auto", *ENGINES}


def test_native_cuda_says_why_not():
    reason = engines.why_not("native", "eltwise_act", "cuda", torch.float32)
    assert reason == native.cuda_why_not


@pytest.mark.parametrize("name", ["Native", "cudnn", "", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=rf"engine must be one of auto, .*, got {name!r}"):
        use_engine(name).__enter__()


def test_triton_says_why_not():
    """Neither interpreted, nor a GPU."""
    code = """
import pytest, fused_resnet as f
reason = f.engines.unavailable("triton")
assert "no CUDA device" in reason and "TRITON_INTERPRET=1" in reason, reason
with pytest.raises(f.engines.EngineError, match="engine 'triton' is not available: there is no"):
    f.use_engine("triton").__enter__()
assert f.engines.wish() == "auto"
"""
    done = python(code, **WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


def test_triton_need_not_be_installed():
    code = """
import sys
sys.modules["triton"] = None
import fused_resnet as f
print(f.engines.unavailable("triton"))
"""
    assert python(code).stdout.strip() == "triton is not installed"


def test_wishes_nest_and_are_restored():
    assert engines.wish() == "auto"
    with use_engine("reference"):
        with use_engine("native"):
            assert engines.wish() == "native"
        assert engines.wish() == "reference"
        with use_engine("auto"):
            assert engines.wish() == "auto"
        with pytest.raises(ZeroDivisionError), use_engine("vendor"):
            raise ZeroDivisionError
        assert engines.wish() == "reference"
    assert engines.wish() == "auto"


def test_a_wish_is_its_threads_own():
    seen, entered, leave = [], threading.Event(), threading.Event()

    def other():
        seen.append(engines.wish())
        with use_engine("vendor"):
            entered.set()
            assert leave.wait(30)

    with use_engine("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(30)
        assert engines.wish() == "reference"
        leave.set()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_wish_is_what_runs(engine, monkeypatch):
    ran = []
    real = engines.implementation

    def spy(op, name):
        ran.append((op, name))
        return real(op, name)

    monkeypatch.setattr(engines, "implementation", spy)
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3)
    with use_engine(engine):
        functional.conv_bn_act(x, weight)
        functional.add_act(x, x)
    assert ran == [("conv_bn_act", engine), ("eltwise_act", engine)]


def test_ops_on_many_threads_at_once():
    x, weight = torch.randn(2, 16, 9, 9), torch.randn(24, 16, 3, 3)
    expected = torch.ops.fused_resnet.conv_bn_act(
        x, weight, None, None, None, [1, 1], [1, 1], [1, 1], 1, "relu"
    )
    wrong = []

    def work():
        for _ in range(50):
            with use_engine("native"):
                y = functional.conv_bn_act(x, weight, padding=1, act="relu")
            if not torch.equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


WITHOUT_TRITON = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
RUN = (
    "import torch, fused_resnet as f; print(f.engines.wish(), f.functional.add_act({0}, {0}).sum())"
)


@pytest.mark.parametrize(
    ("value", "printed"), [("", "auto"), ("auto", "auto"), ("reference", "reference")]
)
def test_environment_variable(value, printed):
    done = python(RUN.format("torch.ones(2)"), FUSED_RESNET_ENGINE=value)
    assert done.stdout.split()[0] == printed, done.stderr


def test_environment_variable_that_is_no_engine():
    done = python(RUN.format("torch.ones(2)"), FUSED_RESNET_ENGINE="fastest")
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "got 'fastest'" in done.stderr


def test_environment_variable_that_cannot_be_had():
    done = python(RUN.format("torch.ones(2)"), FUSED_RESNET_ENGINE="triton", **WITHOUT_TRITON)
    assert done.returncode != 0
    assert "EngineError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_use_engine_comes_before_the_environment():
    code = "import fused_resnet as f\nwith f.use_engine('native'): print(f.engines.wish())"
    assert python(code, FUSED_RESNET_ENGINE="reference").stdout.split() == ["native"]


# --- Instruction sets. ---


@pytest.mark.isa
def test_isa_is_the_one_asked_for():
    assert _C.isa() == os.environ.get("FUSED_RESNET_ISA", isas()[-1])


#: Has nothing to itself but the ops of bytes.
FOR_BYTES = "avx512vnni"


def shares() -> list[Any]:
    """Each with a part of the tests that is its own; with --full, each with all of them as well."""
    others = [name for name in isas() if name != _C.isa()]
    several = [name for name in others if name != FOR_BYTES]
    parts = {name: f"{i}/{len(several)}" for i, name in enumerate(several)}
    full = [pytest.param(n, "0/1", id=f"{n}-full", marks=pytest.mark.slow) for n in several]
    return [*(pytest.param(n, parts.get(n, "0/1"), id=n) for n in others), *full]


@pytest.mark.parametrize(("name", "part"), shares())
def test_ops_with_isa(name, part):
    """The cases of the native engine, again, in a process that is held to one instruction set."""
    ops = (
        engines.INT8_OPS
        if name == FOR_BYTES
        else (*engines.OPS, *engines.INT8_OPS, *engines.FROZEN_OPS)
    )
    files = [f"tests/test_{each}.py" for each in (*ops, "engines")]
    options = ["-m", "isa", "-p", "no:cacheprovider", "-p", "no:xdist", "--require=all"]
    options += ["--part", part]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "FUSED_RESNET_ISA": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"isa {name}," in done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > (100 if name == FOR_BYTES else 500)
