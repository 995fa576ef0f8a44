"""Builds the CUDA kernels for the CPU, through the emulator in tests/simt: an engine of the tests.

What is built stays under build/, in a folder per torch, and only what changed is built again.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.library import Library

from fused_resnet import native

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "csrc"))
import toolkit  # noqa: E402

NAMESPACE = "fused_resnet_simt"
#: Ops, in-place forms included, that have a CUDA kernel.
REGISTERED = re.findall(
    r'library\.impl\("(\w+)"', (ROOT / "csrc" / "torch" / "cuda_engine.h").read_text()
)
#: How threads are scheduled: a round robin, or one warp ahead; copies land at once, or late.
ORDERS = ("round_robin", "first_ahead", "last_ahead", "random")
LAZY = tuple(f"{order}+lazy" for order in ORDERS)

BUILDS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $cxx $in -o $out $flags
  description = $out
"""


def include_candidates() -> Iterator[list[Path]]:
    """Sets of folders that may hold CUDA's headers: a toolkit's, then those of pip packages."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):  # perhaps a wrapper script: nvcc itself says where it lives
        dryrun = toolkit.output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in homes:
        yield [home / "include", home / "include" / "cccl"]
    # torch's packages come without the compiler's own headers (crt/), which triton ships.
    packages = []
    for name, folder in (("nvidia", "cu[0-9]*/include"), ("triton", "backends/nvidia/include")):
        if spec := importlib.util.find_spec(name):
            for location in spec.submodule_search_locations or []:
                packages += sorted(Path(location).glob(folder), reverse=True)
    yield [folder for package in packages for folder in (package, package / "cccl")]


def include_flags(compiler: str) -> list[str]:
    """Flags for the first candidate that compiles; what is on disk is no proof, half sets exist."""
    probe = "#include <cuda_runtime.h>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
    for candidate in include_candidates():
        flags = [f"-isystem{folder}" for folder in candidate if folder.is_dir()]
        command = [compiler, "-std=c++17", "-fsyntax-only", *flags, "-x", "c++", "-"]
        if subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0:
            return flags
    pytest.skip("no CUDA headers: no toolkit and no pip packages that compile")


def ninja_lines(compiler: str, folder: str, build: list[str]) -> list[str]:
    """The driver of the emulator's own checks, and the library of the engine."""
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DFUSED_RESNET_SIMT", *build]
    common += [*include_flags(compiler), "-include", "tests/simt/wgmma.h"]
    common += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    path = torch.__path__[0]
    flags = {
        "kernels": common,
        "glue": [*common, "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{path}/include"],
        "program": build,
        "library": [*build, "-shared", f"-L{path}/lib", "-ltorch_cpu"],
    }
    lines = [f"{name} = {' '.join(words)}" for name, words in flags.items()]
    lines += [f"builddir = {folder}", f"cxx = {compiler}", *RULES.splitlines()]

    def edge(out: str, rule: str, inputs: list[str], flags: str) -> str:
        lines.extend([f"build {folder}/{out}: {rule} {' '.join(inputs)}", f"  flags = {flags}"])
        return f"{folder}/{out}"

    def objects(pattern: str, flags: str = "$kernels -x c++") -> list[str]:
        sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
        return [edge(f"{source}.o", "cxx", [source], flags) for source in sources]

    kernels = objects("csrc/kernels/cuda/*.cu")
    checks = objects("tests/simt/check_*") + objects("tests/simt/driver.cpp")
    edge("driver", "link", kernels + checks, "$program")
    ops = objects("tests/simt/ops_simt.cpp", "$glue")
    edge("ops_simt.so", "link", kernels + ops, "$library")
    return lines


@functools.cache
def built(build: str) -> Path:
    """The folder with everything of one of BUILDS in it, up to date."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulator needs it")
    folder = f"build/simt-torch{torch.__version__}/{build}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with open(ROOT / folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait, and find nothing left to do
        toolkit.run_ninja(ROOT, folder, ninja_lines(compiler, folder, BUILDS[build]))
    return ROOT / folder


@contextlib.contextmanager
def scheduled(seed: int) -> Iterator[None]:
    """Run threads otherwise than in a round robin: one warp ahead, copies late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMT_SCHEDULE", f"{ORDERS[1 + seed % 3]}+lazy")
        patch.setenv("SIMT_SEED", str(seed))
        yield


_libraries: list[Library] = []


def load() -> None:
    """Make torch.ops.fused_resnet_simt, of the build SIMT_BUILD names, complete with what all
    engines share."""
    torch.ops.load_library(built(os.environ.get("SIMT_BUILD", "plain")) / "ops_simt.so")
    _libraries.append(native.complete(NAMESPACE))
