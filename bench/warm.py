"""python -m bench.warm: compile what Triton launches for ResNet-50, before anything is timed.

Triton compiles a kernel when it is first launched, one after another in a process, and keeps the
result in a cache on disk. Here each block that has shapes of its own runs in a process of its own,
then the whole network with what is around the blocks: a training step, and inference.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from bench.training import prepared, step
from fused_resnet import checkpoints, engines, fuse
from fused_resnet.command import positive

#: Of each stage the first block, which projects, and the second, which all others of it are like.
BLOCKS = tuple(f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1))
WHOLE = "all"


def fed(network: str, block: str, batch: int, size: int) -> torch.Size:
    """The shape of what a block gets in the network."""
    shapes: list[torch.Size] = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        shapes.append(given[0].shape)

    with torch.device("meta"):
        model = checkpoints.build(network)
        model.get_submodule("" if block == WHOLE else block).register_forward_pre_hook(note)
        model(torch.empty(batch, 3, size, size))
    return shapes[0]


def run(args: argparse.Namespace) -> None:
    """Train and infer by one block, or by all of the network."""
    dtype, whole = torch.bfloat16, args.block == WHOLE
    network = checkpoints.build(args.network).to(args.device)
    x = torch.randn(fed(args.network, args.block, args.batch, args.size), device=args.device)
    with engines.use_engine(args.engine):
        trained, layout = prepared(network, "fused", x, dtype)
        x = x.contiguous(memory_format=layout)
        if whole:
            step(trained, x, dtype)
        else:
            with torch.autocast(args.device, dtype):
                y = trained.get_submodule(args.block)(x.to(dtype).requires_grad_())
            y.float().sum().backward()
        infers = fuse(network.to(dtype, memory_format=layout).eval())
        with torch.no_grad():
            infers.get_submodule("" if whole else args.block)(x.to(dtype))
    if args.device == "cuda":
        torch.cuda.synchronize()


def start(args: argparse.Namespace, block: str) -> subprocess.Popen[str]:
    options = {
        name: getattr(args, name) for name in ("network", "device", "engine", "batch", "size")
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "bench.warm", *words, "--block", block],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    add = parser.add_argument
    add("--network", choices=checkpoints.MODELS, default="resnet50", help="default: resnet50")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--engine", choices=engines.ENGINES, default="triton", help="default: triton")
    add("--batch", type=positive, default=128, metavar="N", help="default: 128")
    add("--size", type=positive, default=224, metavar="PIXELS", help="default: 224")
    add("--block", metavar="NAME", help="only that one, in this process; all: the network")
    args = parser.parse_args(argv)
    if args.block is not None:
        run(args)
        return 0
    begin = time.monotonic()
    processes = {block: start(args, block) for block in (*BLOCKS, WHOLE)}
    for block, process in processes.items():
        output, _ = process.communicate()
        took = f"after {time.monotonic() - begin:.0f} s"
        if process.returncode:
            print(f"{output}\nFAILED {block} {took}")
        else:
            print(f"{block} {took}")
    return 1 if any(process.returncode for process in processes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
