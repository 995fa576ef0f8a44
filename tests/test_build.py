"""The build: what csrc/toolkit.py finds and decides, and what the libraries are made of."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted((ROOT / "fused_resnet").glob("_ops_*.so"))


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = load("csrc/toolkit.py")
rules = load(".ci/rules.py")


def fake_toolkit(home: Path, release: str = "13.0", headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc answers as the real one does."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.88" '
        f"|| echo '#$ TOP={home}'\n"
    )
    nvcc.chmod(0o755)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return nvcc


def searching(*folders: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(map(str, folders))}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        ("9.0a", ["arch=compute_90a,code=sm_90a"]),
        ("12.0+PTX", ["arch=compute_120,code=sm_120", "arch=compute_120,code=compute_120"]),
        ("8.0;10.0f", ["arch=compute_80,code=sm_80", "arch=compute_100f,code=sm_100f"]),
    ],
)
def test_gencode(text, flags):
    assert toolkit.gencode(text) == [f"-gencode={flag}" for flag in flags]


@pytest.mark.parametrize("text", ["", "Hopper", "8", "8.0;", "9.0A", "8.0+ptx", "sm_80", "8.0,9.0"])
def test_gencode_names_what_it_cannot_read(text):
    with pytest.raises(toolkit.BuildError, match="TORCH_CUDA_ARCH_LIST takes 8"):
        toolkit.gencode(text)


@pytest.mark.parametrize(
    ("wish", "gpus", "archs"),
    [
        ("8.0 9.0", [(7, 5)], "8.0;9.0"),
        (" 8.0;9.0a+PTX ; ", [], "8.0;9.0a+PTX"),
        ("", [(9, 0), (8, 6), (9, 0)], "8.6;9.0"),
        (None, [(12, 0), (9, 0)], "9.0;12.0"),
        (None, [], "8.0;9.0+PTX"),
    ],
)
def test_arch_list(wish, gpus, archs):
    env = {} if wish is None else {"TORCH_CUDA_ARCH_LIST": wish}
    assert toolkit.arch_list(env, gpus) == archs


def test_toolkit_of_nvcc_on_path(tmp_path):
    nvcc = fake_toolkit(tmp_path / "cuda")
    found = toolkit.find_toolkit(searching(nvcc.parent))
    assert found == (tmp_path / "cuda", str(nvcc), "13.0")


def test_toolkit_behind_a_wrapper(tmp_path):
    nvcc = fake_toolkit(tmp_path / "cuda", release="12.8")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    found = toolkit.find_toolkit(searching(wrapper.parent))
    assert found == (tmp_path / "cuda", str(wrapper), "12.8")


def test_cuda_home_comes_before_path(tmp_path):
    on_path = fake_toolkit(tmp_path / "one")
    fake_toolkit(tmp_path / "two", release="13.2")
    env = {**searching(on_path.parent), "CUDA_HOME": str(tmp_path / "two")}
    assert toolkit.find_toolkit(env).home == tmp_path / "two"
    assert toolkit.find_toolkit(env).version == "13.2"


def test_toolkit_that_is_not_there(tmp_path):
    with pytest.raises(toolkit.BuildError, match="there is no nvcc on PATH"):
        toolkit.find_toolkit(searching(tmp_path))
    with pytest.raises(toolkit.BuildError, match=f"there is no nvcc in CUDA_HOME={tmp_path}"):
        toolkit.find_toolkit({**os.environ, "CUDA_HOME": str(tmp_path)})
    nvcc = fake_toolkit(tmp_path / "cuda", headers=False)
    with pytest.raises(toolkit.BuildError, match="without include/cuda_runtime"):
        toolkit.find_toolkit(searching(nvcc.parent))


@pytest.mark.parametrize(
    ("release", "torch_cuda", "why"),
    [
        ("13.0", "13.2", None),
        ("12.8", "13.2", "nvcc is 12.8 and torch is built for CUDA 13.2"),
        ("13.0", None, "this torch is built without CUDA"),
        (None, "13.2", "there is no nvcc on PATH"),
    ],
)
def test_plan_cuda(tmp_path, release, torch_cuda, why):
    env = searching(fake_toolkit(tmp_path / "cuda", release).parent if release else tmp_path)
    for wish in ({}, {"FUSED_RESNET_CUDA": "auto"}):
        plan = toolkit.plan_cuda({**env, **wish}, torch_cuda)
        assert plan == ((None, why) if why else (toolkit.find_toolkit(env), ""))
    required = {**env, "FUSED_RESNET_CUDA": "1"}
    if why:
        with pytest.raises(toolkit.BuildError, match=f"FUSED_RESNET_CUDA=1, but {why}"):
            toolkit.plan_cuda(required, torch_cuda)
    else:
        assert toolkit.plan_cuda(required, torch_cuda)[0]
    assert toolkit.plan_cuda({**env, "FUSED_RESNET_CUDA": "0"}, torch_cuda) == (
        None,
        "FUSED_RESNET_CUDA=0",
    )


def test_plan_cuda_refuses_other_wishes():
    with pytest.raises(toolkit.BuildError, match="must be auto, 0 or 1, got 'yes'"):
        toolkit.plan_cuda({"FUSED_RESNET_CUDA": "yes"}, "13.2")


def test_find_compiler(tmp_path):
    assert toolkit.find_compiler({"PATH": os.environ["PATH"], "CXX": "env c++"}) == ["env", "c++"]
    with pytest.raises(toolkit.BuildError, match=r"there is no g\+\+\. Install one \(apt install"):
        toolkit.find_compiler(searching(tmp_path))


def test_build_stops_without_a_compiler(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: no C++ compiler: there is no no-such-compiler. Install one" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_build_is_small_and_stays_offline():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 130
    for path in ("setup.py", "csrc/toolkit.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not names & {"urllib", "requests", "http", "socket", "ssl", "pip", "urlopen"}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("csrc/kernels/cpu/x.cpp", "\n#include <torch/csrc/stable/ops.h>\n", 2),
        ("csrc/kernels/x.h", '#include "c10/util/Half.h"\n', 1),
        ("csrc/kernels/x.h", "#  include <ATen/ATen.h>\n", 1),
        ("fused_resnet/x.py", "x = 1\nassert x\n", 2),
        ("triton_kernels/x.py", "p = tl.make_block_ptr(x)\n", 1),
        ("tests/x.py", "\n" * 451, 451),
        ("csrc/torch/x.cpp", "#include <torch/csrc/stable/ops.h>\n", None),
        ("tests/x.py", "assert x\n", None),
        ("fused_resnet/x.py", 's = "assert x"\n', None),
    ],
)
def test_rules_find_breaches(name, text, line):
    assert [number for number, _ in rules.breaches(name, text)] == ([line] if line else [])


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_ops_use_the_stable_abi_only(library):
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    )
    symbols = re.findall(r"^ +[Uw] (\S+)", listed.stdout, re.MULTILINE)
    torch_symbols = [name for name in symbols if re.match("torch_|aoti_torch_", name)]
    assert torch_symbols
    outside = [name for name in symbols if re.search("c10|2at|5torch|Py[A-Z]", name)]
    assert [name for name in outside if name not in torch_symbols] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_ops_carry_no_path_of_the_build(library):
    folders = f"{re.escape(str(ROOT))}|site-packages".encode()
    assert re.findall(rb"[ -~]*(?:%s)[ -~]*" % folders, library.read_bytes()) == []


def test_every_requirement_is_pinned_once():
    tomllib = pytest.importorskip("tomllib")
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==[\w.!+]+", line)[1] for line in lines if line[0] != "#"]
    pins = [name.lower().replace("_", "-") for name in pins]
    assert len(pins) == len(set(pins))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
    wanted += [name for extra in extras for name in extra]
    assert {re.match(r"[\w-]+", name)[0] for name in wanted} <= set(pins)
