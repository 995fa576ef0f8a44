"""CUDA kernels run on the CPU by the emulator in tests/simt, and the emulator's own checks."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import EMULATED
from simt_engine import BUILDS, LAZY, NAMESPACE, ORDERS, ROOT, built, toolkit

from fused_resnet import engines, native

#: Of the op tests with sanitizers, which take ten times as long there; by default one part runs.
PARTS = 6

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
PIPELINE = "check failed: product|simt: (deadlock|mbarrier): "
PLANTED_WGMMA = {
    "no_wait_for_boxes": ("plain", AHEAD + LAZY, PIPELINE),
    "no_wait_for_release": ("plain", ORDERS + LAZY, "simt: mbarrier: (ahead|more arrivals)"),
    "release_before_wait": ("plain", LAZY[1:], WRONG_PRODUCT),
    "no_wait_at_end": ("plain", ORDERS + LAZY, "simt: a block ends before its products"),
    "too_few_bytes": ("plain", ORDERS + LAZY, r"simt: deadlock: .*threads mbarrier_wait at"),
    "half_warp": ("plain", ORDERS, r"simt: deadlock: .*\[64 threads wgmma at"),
    "too_many_stages": ("plain", LAZY, "simt: a block ends before its boxes have landed"),
    "another_row": ("plain", ORDERS + LAZY, WRONG_PRODUCT),
    "between_stages": ("plain", ORDERS, "simt: load_box: the destination is not aligned"),
}
# What a kernel of convolutions is not asked for, or in another way, and the word for what is wrong.
PLANTED_CONV = {
    ("avgpool", "no_row"): "mean",
    ("avgpool", "no_residual"): "mean",
    ("avgpool", "no_relu"): "mean",
    ("chain", "no_relu"): "element",
    ("chain", "no_other"): "element",
    ("chain", "no_center"): "element",
    ("chain", "no_second"): "element",
    ("chain", "no_residual"): "element",
    ("chain", "no_mask"): "masked",
    ("chain", "no_sums"): "mean",
    ("chain", "another_mean"): "sum of products",
    ("chain", "another_order"): "mean",
}


@pytest.fixture(scope="session")
def drivers() -> dict[str, Path]:
    return {build: built(build) / "driver" for build in BUILDS}


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
        passing(drivers[build], order, "wgmma", "none")


def test_traversals_cover_every_element_once(drivers):
    passing(drivers["plain"], "round_robin", "traversal")


def caught(driver: Path, order: str, *arguments: str, report: str) -> None:
    # A random order may miss a race; eight of them may not.
    for seed in range(8 if order.startswith("random") else 1):
        result = run(driver, order, *arguments, seed=seed)
        if result.returncode != 0:
            break
    assert result.returncode != 0, f"{order} missed it"
    assert re.search(report, result.stderr), f"{order}: {result.stderr}"


@pytest.mark.parametrize("bug", PLANTED)
def test_emulator_catches(drivers, bug):
    build, orders, report = PLANTED[bug]
    for order in orders:
        caught(drivers[build], order, "shim", bug, report=report)


@pytest.mark.parametrize("bug", PLANTED_MMA)
def test_emulator_catches_in_matrix_instructions(drivers, bug):
    build, orders, report = PLANTED_MMA[bug]
    for order in orders:
        caught(drivers[build], order, "mma", bug, report=report)


@pytest.mark.parametrize("bug", PLANTED_WGMMA)
def test_emulator_catches_in_instructions_of_hopper(drivers, bug):
    build, orders, report = PLANTED_WGMMA[bug]
    for order in orders:
        caught(drivers[build], order, "wgmma", bug, report=report)


def test_plans_of_convolutions(drivers):
    passing(drivers["plain"], "round_robin", "conv_plan")


# Each thread order and both landings of copies, once with sanitizers.
@pytest.mark.parametrize(
    ("dtype", "build", "orders"),
    [
        ("bf16", "plain", ("first_ahead", "last_ahead+lazy")),
        ("f16", "plain", ("random+lazy",)),
        ("tf32", "plain", ("round_robin+lazy",)),
        ("f32", "plain", ("first_ahead+lazy", "last_ahead")),
        ("f32", "sanitized", ("random+lazy",)),
        ("f64", "sanitized", ("last_ahead",)),
    ],
)
@pytest.mark.parametrize("check", ["conv", "chain", "avgpool"])
def test_convolution_in_every_tile(drivers, check, dtype, build, orders):
    """Also those that a plan for an emulated GPU would not choose, and split sums."""
    for order in orders:
        passing(drivers[build], order, check, dtype)


@pytest.mark.parametrize(("check", "bug"), PLANTED_CONV)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_checks_of_convolutions_catch(drivers, check, bug, dtype):
    report = f"check failed: .*: {PLANTED_CONV[check, bug]} "
    caught(drivers["plain"], "round_robin", check, dtype, bug, report=report)


@pytest.mark.parametrize(
    "op",
    [
        "conv_bn_act",
        "conv_bn_act_maxpool",
        "conv_bn_act_avgpool",
        "conv_dgrad",
        "conv_wgrad",
        "bn_act_conv_bn_act",
        "bn_act_conv_stats",
        "bn_backward_conv_dgrad",
        "bn_backward_conv_wgrad",
        "relu_backward_conv_wgrad",
        "bn_act_gram_backward",
    ],
)
def test_tf32_is_taken_where_torch_takes_it(simt, monkeypatch, op):
    """Then products are rounded to 11 bits, and never otherwise."""
    x, weight = torch.randn(1, 16, 5, 6), torch.randn(16, 16, 3, 3)
    geometry = [[1, 1], [1, 1], [1, 1], 1]
    normalised, ones, point = (None, None, "none"), torch.ones(16), weight[..., :1, :1]
    arguments = {
        "conv_bn_act": (x, weight, None, None, None, *geometry, "none"),
        "conv_bn_act_maxpool": (
            *(x, weight, None, None, *geometry[:3]),
            *([2, 2], [2, 2], [0, 0], [1, 1], False, "none"),
        ),
        "conv_bn_act_avgpool": (x, weight, None, None, None, *geometry, "none"),
        "conv_dgrad": (x, weight, None, [5, 6], *geometry),
        "conv_wgrad": (x, x, None, None, "none", [3, 3], *geometry),
        "bn_act_conv_bn_act": (x, *normalised, weight, None, None, None, *geometry, "none"),
        "bn_act_conv_stats": (x, *normalised, weight, *geometry),
        "bn_backward_conv_dgrad": (
            x,
            None,
            ones,
            None,
            None,
            weight,
            *[None] * 6,
            [5, 6],
            *geometry,
        ),
        "bn_backward_conv_wgrad": (x, *[None] * 4, x, None, *normalised, [3, 3], *geometry),
        "relu_backward_conv_wgrad": (x, x, x, None, None, None, "none"),
        "bn_act_gram_backward": (
            x,
            point,
            x,
            *normalised[:2],
            ones,
            "none",
            point[..., 0, 0],
            ones,
            *[None] * 3,
        ),
    }[op]

    def product(results):
        images = results if isinstance(results, tuple) else (results,)
        return [image for image in images if image.dim() == 4][-1]

    exact = product(
        engines.implementation(op, "reference")(
            *(t.double() if isinstance(t, torch.Tensor) else t for t in arguments)
        )
    )

    def error():
        result = product(engines.implementation(op, "simt")(*arguments))
        return float((result - exact).abs().max() / exact.abs().max())

    monkeypatch.setattr(engines, "_has_gpu", lambda: True)
    assert error() < 2**-20
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert 2**-16 < error() < 2**-9


def test_engine_has_the_ops_of_the_cuda_library(simt):
    assert engines.registered(NAMESPACE, "CPU") == EMULATED["simt"].ops
    if native.cuda_why_not is None:
        assert engines.LIBRARIES["native"].kernels["cuda"] == EMULATED["simt"].ops


def test_failure_of_a_kernel_is_raised(simt, monkeypatch):
    monkeypatch.setenv("SIMT_SCHEDULE", "alphabetical")
    with pytest.raises(RuntimeError, match="SIMT_SCHEDULE must be an order of threads, got alpha"):
        torch.ops.fused_resnet_simt.eltwise_act([torch.ones(3)], "sum", None, "none")


@pytest.mark.parametrize(
    "part",
    [pytest.param(f"{i}/{PARTS}", marks=[pytest.mark.slow] if i else []) for i in range(PARTS)],
)
def test_kernels_under_sanitizers(part):
    """Op tests again, on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulator needs it")
    built("sanitized")
    libraries = [
        toolkit.output_of(compiler, f"-print-file-name={name}").strip()
        for name in ("libasan.so", "libstdc++.so")  # ASan looks for what throws when it starts
    ]
    ops = EMULATED["simt"].ops
    of_chains = {*engines.CHAIN_OPS} - {"relu_backward_conv_wgrad"}
    names = {"chain_ops" if op in of_chains else op for op in ops}
    files = [f"tests/test_{name}.py" for name in ("conv_wgmma", *sorted(names))]
    convolutions = "test_epilogues or test_without_added or test_prologues or test_activations"
    shapes = "(test_shapes or test_cases) and (float32 or bfloat16)"
    chosen = f"simt and ({shapes} or bfloat16 and ({convolutions}))"
    options = ["-q", "-s", "--part", part, "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={
            **os.environ,
            "SIMT_BUILD": "sanitized",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= len(files)
