"""Shows that launches reuse what Triton compiled exactly where Triton would; run by test_aot.py.

Kernels are given CPU tensors, which differ from a GPU's in nothing that Triton looks at.
"""

import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import absent_gpu  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from fused_resnet.triton_kernels import launch  # noqa: E402


@triton.jit
def scaled(inputs, out, n, factors, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    for i in tl.static_range(len(inputs)):
        x = tl.load(inputs[i] + at, mask=at < n, other=0.0)
        if factors is not None:
            x *= factors[i]
        tl.store(out + at + SHIFT, x, mask=at < n)


def main() -> None:
    memories = [torch.empty(256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    cases = [
        *itertools.product(memories, (0, 1, 8), (1, 2, 3, 16, 32), (None,), (0,)),
        *itertools.product(memories[:1], (0,), (1,), (None, (1, 2), (16, 3)), (0, 1)),
    ]
    hashes = []
    for memory, start, n, factors, shift in cases:
        x = memory[start:]
        meta = {"SHIFT": shift, "BLOCK": 64, "num_warps": 1}
        args = ((x, x), memory, n, factors)
        kernel = scaled.warmup(*args, grid=(1,), **meta, **launch.OPTIONS)
        hashes.append(kernel.hash)
        for _ in range(2):
            launch.launch(scaled, (3, 2), [(x, x)], [memory], [n, factors], **meta)
            used, grid, (inputs, out, *rest) = absent_gpu.launched.pop()
            assert used == kernel.hash, (x.dtype, start, n, factors, shift)
            assert grid == (3, 2, 1)
            assert inputs[0] is x
            assert out is memory
            assert rest == [n, factors, shift, 64]
    print(f"{len(cases)} launches of {len(set(hashes))} kernels, {len(launch._compiled)} kept")


if __name__ == "__main__":
    main()
