"""Compiles the Triton kernels ahead of time, for GPUs that need not be here, and looks at the code.

    python tests/aot.py --arch 80 90 [--all-types] [--all-configs] [--op bn_act ...]

The ops are called on meta tensors, where ``launch`` records what it would launch, and Triton
compiles that by its own dispatch, for a GPU that is absent. A process of its own,
because kernels that were loaded to be interpreted cannot be compiled. Triton's cache, keyed by the
source's hash, is in build/.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import absent_gpu  # noqa: E402, F401
import aot_planted  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from aot_cases import CASES, USUAL, Case  # noqa: E402
from fused_resnet.triton_kernels import launch, ops  # noqa: E402
from test_nvcc import maxima_that_lose_nan  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402

#: Bytes of shared memory a block can have.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MOST_CONFIGS = 4


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, where what does not fit in registers goes."""
    folder = Path(nvidia.__file__).parent / "bin"
    path = ROOT / "build" / f"aot-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    command = [str(folder / "cuobjdump"), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    path.unlink()
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def narrow_accesses(ptx: str, this: launch.Launch) -> set[str]:
    """Global loads and stores of fewer than 16 bytes, but for rows of fp64 partial sums."""
    narrow = set()
    for text in re.findall(r"\b(?:ld|st)\.global\.[\w.:]+", ptx):
        wide = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)$", text)
        if wide and int(wide[1] or 1) * int(wide[2]) < 128:
            narrow.add(text)
    partial = any(t.dtype == torch.float64 for t in launch.tensors_in(this.writes))
    return narrow - {"st.global.b64"} if partial else narrow


def dots_of_halves(ttir: str) -> list[int]:
    """The M of every matrix product of half types."""
    return [int(m) for m in re.findall(r"tt\.dot .*: tensor<(\d+)x\d+xb?f16>", ttir)]


def faults(kernel: Any, arch: int, wide: bool, this: launch.Launch) -> Iterator[str]:
    ptx = kernel.asm["ptx"]
    if lost := maxima_that_lose_nan(ptx):
        yield f"loses NaN: {lost}"
    if wide and not this.finalizes and (narrow := narrow_accesses(ptx, this)):
        yield f"moves fewer than 16 bytes: {sorted(narrow)}"
    registers, local = resources(kernel.asm["cubin"])
    # ptxas puts two numbers away, far from the limit, where that lets another block run beside.
    if local > 16 or (local and registers > 128):
        yield f"spills: {local} bytes of local memory, {registers} registers"
    if kernel.metadata.shared > SHARED[arch]:
        yield f"needs {kernel.metadata.shared} bytes of shared memory of {SHARED[arch]}"
    large = any(m >= 64 for m in dots_of_halves(kernel.asm["ttir"]))
    if arch == 90 and large and "wgmma.mma_async" not in ptx:
        yield "multiplies matrices without wgmma"
    if this.meta.get("DESCRIPTORS") and "cp.async.bulk.tensor" not in ptx:
        yield "loads no tiles by descriptors"


def compiled(this: launch.Launch) -> Any:
    """Specialized by what is one and by what divides by 16, as when it is launched."""
    return this.kernel.warmup(
        *this.reads, *this.writes, *this.numbers, grid=this.grid, **this.meta, **launch.OPTIONS
    )


def examined(
    this: launch.Launch, arch: int, wide: bool, done: set[tuple[str, bool]]
) -> Iterator[str]:
    """The faults of a kernel that is not yet among those ``done``."""
    try:
        kernel = compiled(this)
    except Exception as error:  # whatever a pass of the compiler raises
        yield f"does not compile: {error}"
        return
    if (kernel.hash, wide) not in done:
        done.add((kernel.hash, wide))
        yield from faults(kernel, arch, wide, this)


def launches(case: Case, arch: int, config: int | None) -> list[launch.Launch]:
    launch.planned_arch, launch.forced_config = arch, config
    with launch.recording() as found:
        ops.IMPLEMENTATIONS[case.op](*case.args)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED))
    parser.add_argument("--op", nargs="+", default=list(ops.IMPLEMENTATIONS))
    parser.add_argument("--all-types", action="store_true", help="what differs by a type as well")
    parser.add_argument("--all-configs", action="store_true")
    parser.add_argument("--planted", action="store_true", help="show that faults are found")
    asked = parser.parse_args()
    if asked.planted:
        for this in aot_planted.planted():
            print(f"{this.kernel.fn.__name__}:", *examined(this, 90, True, set()))
        return 0
    cases = CASES if asked.all_types else USUAL
    if missing := set(ops.IMPLEMENTATIONS) - {case.op for case in cases}:
        print(f"no case in aot_cases.py for {', '.join(sorted(missing))}")
        return 1
    done: set[tuple[str, bool]] = set()
    failed = 0
    configs = range(MOST_CONFIGS) if asked.all_configs else [None]
    work = [(a, c, i) for a in asked.arch for c in cases if c.op in asked.op for i in configs]
    for arch, case, config in work:
        for this in launches(case, arch, config):
            for fault in examined(this, arch, case.wide, done):
                failed += 1
                name = this.kernel.fn.__name__
                print(f"sm_{arch}: {case.op}: {name} {this.meta}: {fault}", flush=True)
    print(f"{len(done)} kernels compiled with Triton {triton.__version__}, {failed} faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
