"""python -m bench baselines: launches, bytes moved and memory kept, beside what they were.

None of them takes a quiet machine, or a GPU: they are counted on fake tensors. A change that moves
one has to say so, by writing bench/baselines.json anew.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import launches, training
from bench.cases import DTYPES
from fused_resnet import engines, fuse
from fused_resnet.measure import kept_bytes, write_json
from fused_resnet.plan import MEMORY

PATH = Path(__file__).with_name("baselines.json")
NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d")
BATCH, SIZE = 8, 224
#: With another torch than that of the baselines a figure may grow by this: of what is launched
#: around our kernels its version decides.
ALLOWED = 1.02

Figures = dict[str, int]


def _launches(network: str, train: bool, engine: str) -> Figures:
    found = launches.count(network, engine, train, torch.bfloat16, BATCH, SIZE)
    return {"large": found.large, "small": found.small, "bytes": found.bytes}


def _kept(network: str, dtype: str, memory: str) -> Figures:
    # The engine is named: "auto" asks the processor.
    with FakeTensorMode(), engines.use_engine("native"):
        model = fuse(launches.network(network, torch.float32).train(), memory=memory)
        x = torch.empty(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        with training.autocast(DTYPES[dtype], "cpu"):
            return {"kept": kept_bytes(model, x)}


def counts(network: str) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """What is counted of a network here, by name."""
    for engine in launches.ENGINES:
        if engines.unavailable(engine) is None:
            for task, train in (("inference", False), ("training step", True)):
                name = f"{network}, {task}, bf16, {engine}"
                yield name, functools.partial(_launches, network, train, engine)
    for dtype in ("fp32", "bf16"):
        for memory in MEMORY:
            name = f"{network}, memory={memory}, {dtype}"
            yield name, functools.partial(_kept, network, dtype, memory)


def differences(name: str, was: Figures | None, found: Figures, exact: bool) -> Iterator[str]:
    """In words, what is not as it was, or, if not ``exact``, is more than it may be."""
    if was is None:
        yield f"{name}: is not among the baselines"
        return
    for figure, value in found.items():
        before = was.get(figure)
        if before is None or (value != before if exact else value > ALLOWED * before):
            yield f"{name}: {figure} was {before}, is {value}"


def check(network: str) -> list[str]:
    """What of a network is not as bench/baselines.json has it."""
    known = json.loads(PATH.read_text(encoding="utf-8"))
    exact = known["torch"] == torch.__version__
    found: list[str] = []
    for name, count in counts(network):
        found += differences(name, known["figures"].get(name), count(), exact)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench baselines",
        description="Counts launches, bytes moved and memory kept, and tells what is not as "
        "bench/baselines.json has it. Exit status 1: something is not.",
    )
    parser.add_argument("--write", action="store_true", help="write them anew instead")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for its kernels to take the CPU's tensors
    if args.write:
        if (reason := engines.unavailable("triton")) is not None:
            print(f"bench baselines: they are of all engines: {reason}", file=sys.stderr)
            return 1
        figures = {name: count() for network in NETWORKS for name, count in counts(network)}
        known = {"schema": 1, "command": "baselines", "torch": torch.__version__}
        write_json(PATH, {**known, "batch": BATCH, "size": SIZE, "figures": figures})
        print(f"baselines  {PATH}")
        return 0
    found = [line for network in NETWORKS for line in check(network)]
    print("\n".join(found) or "all is as it was")
    return 1 if found else 0
