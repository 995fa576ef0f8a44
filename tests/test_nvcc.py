"""nvcc compiles every CUDA kernel for each architecture, within a budget, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from simt_engine import toolkit

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
LIBRARY = ROOT / "fused_resnet" / "_ops_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
HOPPER = {"conv_wgmma"}  # of instructions that sm_90a alone has


class Usage(NamedTuple):
    registers: int  # of a thread
    shared: int  # bytes of a block, those declared in the source


class Budget(NamedTuple):
    """What the kernels of a file may use, and how many of them load 16 bytes at once; None: see
    INSTRUCTIONS."""

    registers: int
    shared: int = 0
    wide: int | None = 0


# With 64 registers 1024 threads fit on a multiprocessor, with 128 half as many. The sums of a
# matrix product are held in registers: with 168, three blocks of 128 threads fit.
BUDGET = {
    "eltwise_act": Budget(registers=64, wide=12),
    "eltwise_act_backward": Budget(registers=64, wide=12),
    "bn_scale_shift": Budget(registers=64),
    "bn_act": Budget(registers=88, wide=8),
    "bn_stats": Budget(registers=96, shared=24576, wide=8),
    "bn_finalize": Budget(registers=64),
    "gram_moments": Budget(registers=64),
    "gram_stats": Budget(registers=64, shared=2048),
    "gram_gradients": Budget(registers=64, shared=2048),
    "bn_act_backward_reduce": Budget(registers=128, shared=16384, wide=24),
    "bn_act_backward": Budget(registers=128, wide=24),
    "relu_backward_reduce": Budget(registers=96, shared=8192, wide=8),
    "bn_act_gram": Budget(registers=128, shared=2048, wide=None),
    "conv_bn_act": Budget(registers=168, wide=None),
    "conv_wgmma": Budget(registers=112, wide=None),  # two blocks of 288 threads
    "conv_bn_act_maxpool": Budget(registers=128, wide=0),
    "conv_bn_act_avgpool": Budget(registers=168, wide=None),
    "bn_act_conv_bn_act": Budget(registers=168, wide=None),
    "bn_act_conv_stats": Budget(registers=64, shared=4608),
    "bn_backward_conv_dgrad": Budget(registers=64, shared=4608),
    "bn_backward_conv_wgrad": Budget(registers=160, shared=2048, wide=None),
    "relu_backward_conv_wgrad": Budget(registers=160, shared=2048, wide=None),
    "conv_pack": Budget(registers=64),
    "conv_wgrad": Budget(registers=160, shared=2048, wide=None),
    "bn_act_maxpool": Budget(registers=80, wide=4),
    "bn_act_maxpool_train": Budget(registers=96, wide=4),
    "bn_act_maxpool_backward": Budget(registers=64, wide=4),
    "bn_act_maxpool_backward_reduce": Budget(registers=128, shared=16384, wide=8),
    "global_avg_pool": Budget(registers=80, shared=8192, wide=8),
}
#: They launch those of conv_bn_act and bn_act_conv_bn_act.
NO_KERNELS = {"conv_dgrad", "bn_act_gram_backward"}

MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}
STAGES_OF_DEPTH = {
    *MMA,
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "cp.async.cg.shared.global",
    "ld.global.v4",
}
WIDE_STORE = "st.global.wb.v4"
STAGES_OF_PIXELS = {
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "cp.async.cg.shared.global",
    "ld.shared.v4",
    "st.shared.v4",
}
# What must be found in the PTX of a file: matrix instructions, and accesses of 16 bytes.
INSTRUCTIONS = {
    "bn_act_gram": {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        *STAGES_OF_PIXELS,
    },
    "conv_bn_act": {*STAGES_OF_DEPTH, WIDE_STORE},
    "conv_bn_act_avgpool": STAGES_OF_DEPTH,
    "bn_act_conv_bn_act": {*STAGES_OF_DEPTH, WIDE_STORE, "ld.shared.v4", "st.shared.v4"},
    "conv_bn_act_maxpool": {
        *MMA,
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ld.shared.v4",
        WIDE_STORE,
    },
    "conv_wgrad": {*MMA, *STAGES_OF_PIXELS},
    "bn_backward_conv_wgrad": {*MMA, *STAGES_OF_PIXELS},
    "relu_backward_conv_wgrad": {*MMA, *STAGES_OF_PIXELS, WIDE_STORE},
    "conv_wgmma": {
        *(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{half}.{half}"
            for columns in (64, 128)
            for half in ("bf16", "f16")
        ),
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "ld.global.v4",
        WIDE_STORE,
    },
}
# And in its machine code: what that comes to on Hopper.
MACHINE_CODE = {
    "conv_wgmma": {
        *(f"HGMMA.64x{n}x16.F32{half}" for n in (64, 128) for half in ("", ".BF16")),
        "UTMALDG.2D",
    },
}

PLANTED = """
__global__ void indexes_a_local_array(float* out, int i) {
  float local[64];
  for (int k = 0; k < 64; ++k) local[k] = out[k];
  for (int k = 0; k < 64; ++k) local[(k * i) & 63] += out[k];
  out[i] = local[i & 63];
}
__global__ void loses_nan(float* out) {
  __shared__ float shared[32];
  shared[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = fmaxf(shared[31 - threadIdx.x], 0.0f);
}
__global__ void loads_wide(float4* out) { out[threadIdx.x] = out[threadIdx.x + 1]; }
"""


@pytest.fixture(scope="session")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc: neither under CUDA_HOME nor on PATH")
    return found


def compile_kernels(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[str, str]:
    """What ptxas reports, and the PTX."""
    command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", "-Xptxas", "-v"]
    command += ["-Werror", "cross-execution-space-call", "--keep", "--keep-dir", str(folder)]
    command += [str(source), "-o", str(folder / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stderr, (folder / f"{source.stem}.ptx").read_text()


def nvidia_tool(name: str) -> str:
    """One of those that read machine code, which triton ships where no toolkit has it."""
    packaged = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    found = shutil.which(name) or shutil.which(name, path=packaged)
    assert found, f"no {name}: neither on PATH nor in {packaged}"
    return found


def machine_code(cubin: Path) -> set[str]:
    """Its instructions, with their modifiers."""
    listed = toolkit.output_of(nvidia_tool("nvdisasm"), str(cubin))
    return set(re.findall(r"^\s*/\*\w+\*/\s+(?:@\S+ )?([\w.]+)", listed, re.MULTILINE))


def usage_by_kernel(report: str) -> dict[str, Usage]:
    usage = {}
    for block in report.split("Compiling entry function '")[1:]:
        name = block.split("'")[0]
        registers = re.search(r"Used (\d+) registers", block)
        assert registers, block
        shared = re.search(r"(\d+) bytes smem", block)
        usage[name] = Usage(int(registers[1]), int(shared[1]) if shared else 0)
    return usage


def kernels_in_local_memory(report: str) -> list[str]:
    """Kernels with spilled registers or with local arrays that registers could not hold."""
    return [
        block.split("'")[0]
        for block in report.split("Compiling entry function '")[1:]
        if any(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", block))
    ]


def maxima_that_lose_nan(ptx: str) -> list[str]:
    found = re.findall(r"\b(?:min|max)\.(?:\w+\.)*b?f\d+(?:x2)?\b", ptx)
    return [instruction for instruction in found if ".NaN." not in instruction]


def kernels_that_load_wide(ptx: str) -> list[str]:
    wide = re.compile(r"\bld\.global(?:\.nc)?\.(?:v4\.[fub]32|v2\.[fub]64)")
    bodies = re.split(r"^(?:\.\w+ )*\.entry (\w+)\(", ptx, flags=re.MULTILINE)[1:]
    return [name for name, body in zip(bodies[::2], bodies[1::2], strict=True) if wide.search(body)]


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(source, architecture, id=f"{source.stem}-{architecture}")
        for source in sorted(KERNELS.glob("*.cu"))
        for architecture in (("sm_90a",) if source.stem in HOPPER else ARCHITECTURES)
    ],
)
def test_compiles_within_budget(nvcc, source, architecture, tmp_path):
    report, ptx = compile_kernels(nvcc, source, architecture, tmp_path)
    usage = usage_by_kernel(report)
    if source.stem in NO_KERNELS:
        assert not usage
        return
    assert usage
    missing = {name for name in INSTRUCTIONS.get(source.stem, ()) if name not in ptx}
    assert not missing
    budget = BUDGET[source.stem]
    over = {
        name: used
        for name, used in usage.items()
        if used.registers > budget.registers or used.shared > budget.shared
    }
    assert not over
    assert not kernels_in_local_memory(report)
    assert not maxima_that_lose_nan(ptx)
    assert "serialized" not in report  # wgmma waits after each where the compiler sees no other way
    if source.stem in MACHINE_CODE:
        assert MACHINE_CODE[source.stem] <= machine_code(tmp_path / "kernels.cubin")
    assert budget.wide is None or len(kernels_that_load_wide(ptx)) == budget.wide


@pytest.mark.skipif(not LIBRARY.exists(), reason="no nvcc when it was built: no _ops_cuda.so")
def test_library_has_what_hopper_alone_runs():
    """Whatever architectures it is built for."""
    listed = toolkit.output_of(nvidia_tool("cuobjdump"), "--list-elf", str(LIBRARY))
    assert re.search(r"\.sm_90a\.cubin$", listed, re.MULTILINE), listed


def test_checks_can_fail(nvcc, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    report, ptx = compile_kernels(nvcc, source, "sm_90a", tmp_path)
    assert [usage.shared for usage in usage_by_kernel(report).values()].count(128) == 1
    assert len(kernels_in_local_memory(report)) == 1, report
    assert maxima_that_lose_nan(ptx) == ["max.f32"]
    assert len(kernels_that_load_wide(ptx)) == 1
