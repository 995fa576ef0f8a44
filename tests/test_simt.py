"""CUDA kernels run on the CPU by the emulator in tests/simt, and the emulator's own checks."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
SOURCES = [
    *sorted(SIMT.glob("*.cpp")),
    *sorted(SIMT.glob("*.cu")),
    *sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")),
]
BUILDS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS = ("round_robin", "first_ahead", "last_ahead", "random")
LAZY = tuple(f"{order}+lazy" for order in ORDERS)  # asynchronous copies land late

# What must catch each planted bug, and the words it is reported in. Round robin is known to miss a
# missing barrier before reuse: all warps advance together there. Copies that land late miss it too,
# and those that land at once miss that too few are waited for.
WRONG_RESULT = "check failed: block_sum"
AHEAD = ("first_ahead", "last_ahead", "random")
PLANTED = {
    "no_barrier_after_write": ("plain", ORDERS, WRONG_RESULT),
    "no_barrier_before_reuse": ("plain", AHEAD, WRONG_RESULT),
    "no_warp_barrier": ("plain", ORDERS, WRONG_RESULT),
    "divergent_barrier": ("plain", ORDERS, r"simt: deadlock: .*\[32 threads __syncthreads at"),
    "divergent_shuffle": ("plain", ORDERS, r"simt: deadlock: .*threads __shfl_sync at"),
    "early_return": ("plain", ORDERS, r"simt: deadlock: .*\[1 threads done\]"),
    "shared_out_of_bounds": ("sanitized", ORDERS, "runtime error: index 3 out of bounds"),
    "dynamic_out_of_bounds": ("sanitized", ORDERS, "AddressSanitizer: heap-buffer-overflow"),
    "global_out_of_bounds": ("sanitized", ORDERS, "AddressSanitizer: heap-buffer-overflow"),
}
WRONG_PRODUCT = "check failed: product"
IN_FLIGHT = "simt: a thread ends before its copies have landed"
PLANTED_MMA = {
    "no_barrier_after_wait": ("plain", ORDERS + LAZY, WRONG_PRODUCT),
    "no_barrier_before_copy": ("plain", AHEAD, WRONG_PRODUCT),
    "wait_count": ("plain", LAZY, WRONG_PRODUCT),
    "no_commit": ("plain", ORDERS + LAZY, IN_FLIGHT),
    "no_wait_at_end": ("plain", ORDERS + LAZY, IN_FLIGHT),
    "half_warp_ldmatrix": ("plain", ORDERS, r"simt: deadlock: .*\[32 threads ldmatrix at"),
    "half_warp_mma": ("plain", ORDERS, r"simt: deadlock: .*\[32 threads mma at"),
    "copy_out_of_bounds": ("sanitized", ORDERS + LAZY, "AddressSanitizer: heap-buffer-overflow"),
    "misaligned_copy": ("plain", ORDERS, "simt: cp.async: the destination is not aligned"),
    "misaligned_row": ("plain", ORDERS, "simt: ldmatrix: a row is not aligned"),
}


def include_candidates():
    """Sets of folders that may hold CUDA's headers: a toolkit's, then those of pip packages."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):  # perhaps a wrapper script: nvcc itself says where it lives
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", dryrun.stderr, re.M)]
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


@pytest.fixture(scope="session")
def drivers(tmp_path_factory) -> dict[str, Path]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulator needs it")
    folder = tmp_path_factory.mktemp("simt")
    flags = ["-std=c++17", "-DFUSED_RESNET_SIMT", *include_flags(compiler)]
    flags += ["-include", str(SIMT / "mma.h"), "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-x", "c++", *map(str, SOURCES)]

    def build(name: str) -> Path:
        command = [compiler, *BUILDS[name], *flags, "-o", str(folder / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder / name

    with ThreadPoolExecutor() as pool:
        return dict(zip(BUILDS, pool.map(build, BUILDS), strict=True))


def run(driver: Path, order: str, *arguments: str, seed: int = 0) -> subprocess.CompletedProcess:
    # A check that fails leaves what it allocated: leaks are not what is looked for.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(driver), order, str(seed), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def passing(driver: Path, order: str, *arguments: str, seed: int = 0) -> str:
    result = run(driver, order, *arguments, seed=seed)
    assert result.returncode == 0, f"{order}: {result.stderr}"
    return result.stdout


@pytest.mark.parametrize("build", BUILDS)
def test_emulator_is_right(drivers, build):
    for order, seed in itertools.product(ORDERS, range(3)):
        passing(drivers[build], order, "shim", "none", seed=seed)
    for order in ORDERS + LAZY:
        passing(drivers[build], order, "mma", "none")


def caught(driver: Path, order: str, check: str, bug: str, report: str) -> None:
    # A random order may miss a race; eight of them may not.
    for seed in range(8 if order.startswith("random") else 1):
        result = run(driver, order, check, bug, seed=seed)
        if result.returncode != 0:
            break
    assert result.returncode != 0, f"{order} missed it"
    assert re.search(report, result.stderr), f"{order}: {result.stderr}"


@pytest.mark.parametrize("bug", PLANTED)
def test_emulator_catches(drivers, bug):
    build, orders, report = PLANTED[bug]
    for order in orders:
        caught(drivers[build], order, "shim", bug, report)


@pytest.mark.parametrize("bug", PLANTED_MMA)
def test_emulator_catches_in_matrix_instructions(drivers, bug):
    build, orders, report = PLANTED_MMA[bug]
    for order in orders:
        caught(drivers[build], order, "mma", bug, report)


@pytest.mark.parametrize("op", ["sum", "prod", "max"])
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_eltwise_act(drivers, dtype, op):
    """Within rounding of a scalar reference, and the same bits whatever the order of threads."""
    outputs = {passing(drivers["plain"], order, "eltwise_act", dtype, op) for order in ORDERS}
    outputs.add(passing(drivers["sanitized"], "random", "eltwise_act", dtype, op))
    assert len(outputs) == 1
