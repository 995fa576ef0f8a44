"""Training steps: forward, loss and backward of whole networks, with what each keeps and grows."""

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import graph, peers
from bench.cases import (
    DTYPES,
    Asked,
    Case,
    Work,
    images,
    memory_of,
    network_flops,
    on_each_engine,
    seeded_network,
)
from bench.layers import table
from fused_resnet import checkpoints, engines, fuse, tune
from fused_resnet.measure import EAGER, OURS, PEER, Runner, Variant, kept_bytes
from fused_resnet.plan import MEMORY
from fused_resnet.variants import LAYOUTS, TUNED

CLASSES = 1000
COMPILE = "torch.compile"


def cases(asked: Asked) -> Iterator[Case]:
    """One training step of every network."""
    for batch in asked.batches:
        for name in asked.dtypes:
            for network in checkpoints.MODELS:
                given = (network, batch, DTYPES[name], asked.size, asked.device)
                make = functools.partial(_network_work, *given)
                memory = batch * memory_of(table(network, asked.size), steps=True)
                yield Case(f"train/{network}", "", batch, name, make, memory)


def autocast(dtype: torch.dtype, device: str) -> contextlib.AbstractContextManager:
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, dtype) if half else contextlib.nullcontext()


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Forward, cross entropy and backward; half types by autocast. Returns the loss."""
    target = torch.arange(x.size(0), device=x.device) % CLASSES
    with autocast(dtype, x.device.type):
        y = model(x)
    loss = F.cross_entropy(y if dtype == torch.float64 else y.float(), target)
    loss.backward()
    return loss


def prepared(
    network: nn.Module, variant: str, x: Tensor, dtype: torch.dtype
) -> tuple[nn.Module, torch.memory_format]:
    """A copy of a network as the variant of that name runs it on ``x``, and the layout it wants."""
    layout = LAYOUTS["NCHW" if variant == "eager NCHW" else "NHWC"]
    model = copy.deepcopy(network).to(memory_format=layout).train()
    if variant.startswith(COMPILE):
        torch._dynamo.reset()
        mode = variant.removeprefix(COMPILE).strip() or "default"
        model = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    elif variant in peers.NORMS:
        peers.swap_norms(model, variant)
    elif variant == TUNED:
        fuse(model)
        with autocast(dtype, x.device.type):
            tune(model, x.contiguous(memory_format=layout))
    elif variant.startswith("fused"):
        fuse(model, memory=variant.removeprefix("fused").strip() or "auto")
    return model, layout


def variant_names(device: str) -> dict[str, str]:
    """Every variant and its kind."""
    ours = {"fused" if memory == "auto" else f"fused {memory}": OURS for memory in MEMORY}
    ours[TUNED] = OURS
    others = [COMPILE]
    if device == "cuda":
        there = [name for name in peers.NORMS if name not in peers.absent(device)]
        others += [f"{COMPILE} reduce-overhead", f"{COMPILE} max-autotune", *there]
    return {"eager NCHW": EAGER, "eager NHWC": EAGER, **dict.fromkeys(others, PEER), **ours}


def _network_work(name: str, batch: int, dtype: torch.dtype, size: int, device: str) -> Work:
    network = copy.deepcopy(seeded_network(name, size)).to(device)
    # Three batches are judged together: in one alone, which ReLU rounding tips decides.
    batches = list(images(3 * batch, size).to(device).split(batch))
    # Backward computes as much for the input and for the weight of each convolution.
    flops = 3 * network_flops(name, batch, size)

    def grown(title: str) -> int:
        return growth(name, batch, dtype, title, size)

    return step_work(network, batches, dtype, step, flops, None, grown)


#: Runs a module forward and backward on an input, half types by autocast.
Step = Callable[[nn.Module, Tensor, torch.dtype], Any]


def step_work(
    network: nn.Module,
    batches: list[Tensor],
    dtype: torch.dtype,
    advance: Step,
    flops: int,
    bytes_moved: int | None,
    grown: Callable[[str], int] | None = None,
) -> Work:
    """Steps of a network, or of a part of one, judged by the gradients of its parameters.

    Args:
        grown: asked on a CPU for the growth of memory under the variant of that name.
    """
    x = batches[0]
    device = x.device.type
    exact = copy.deepcopy(network).double().train()
    scales: list[float] = []

    def gradients(model: nn.Module) -> Tensor:
        found = zip(model.parameters(), scales, strict=True)
        return torch.cat([(p.grad.double() / scale).flatten() for p, scale in found])  # type: ignore[union-attr]

    truth = []
    for each in batches:
        exact.zero_grad()
        advance(exact, each.double(), torch.float64)
        # Each gradient counts alike, however large its values are.
        scales = scales or [float(p.grad.abs().max()) or 1.0 for p in exact.parameters()]  # type: ignore[union-attr]
        truth.append(gradients(exact))

    def variant(title: str, kind: str) -> Variant:
        def prepare() -> Runner:
            model, layout = prepared(network, title, x, dtype)

            def run(x: Tensor) -> nn.Module:
                model.zero_grad()
                with torch.enable_grad():
                    advance(model, x, dtype)
                return model

            return Runner(run, lambda x: x.contiguous(memory_format=layout), gradients)

        return Variant(title, kind, prepare)

    def facts(title: str) -> dict:
        if title not in variant_names(device) or title.startswith((COMPILE, *peers.NORMS)):
            # Compiled code keeps what it likes, a peer may have failed, and an engine keeps what
            # "fused" keeps.
            return {}
        model, layout = prepared(network, title, x, dtype)
        fed = x.contiguous(memory_format=layout)
        with autocast(dtype, device):
            kept = kept_bytes(model, fed)
        if device == "cuda":
            return {"kept": kept, "growth": _growth_on_cuda(model, fed, dtype, advance)}
        return {"kept": kept} if grown is None else {"kept": kept, "growth": grown(title)}

    several = [variant(title, kind) for title, kind in variant_names(device).items()]
    if device == "cuda":
        fused = next(v for v in several if v.name == "fused")
        graphed = [v for v in several if v.name in ("fused", "eager NHWC")]
        several += [graph.replayed(v, x) for v in graphed]
        several += on_each_engine(fused, device, dtype, engines.OPS)
    return Work(several, batches, torch.cat(truth), flops, bytes_moved, facts)


def _growth_on_cuda(model: nn.Module, x: Tensor, dtype: torch.dtype, advance: Step) -> int:
    """By how many bytes what is allocated grows over a step."""
    advance(model, x, dtype)  # the gradients are there then
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    advance(model, x, dtype)
    return torch.cuda.max_memory_allocated() - before


def growth(name: str, batch: int, dtype: torch.dtype, title: str, size: int) -> int:
    """By how many bytes resident memory grows over a step, in a process of its own.

    There every block of memory of 64 KiB and more goes back to the system when it is freed, so
    that the highest mark is what was in use.
    """
    words = [name, str(batch), str(dtype).removeprefix("torch."), title, str(size)]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.training", *words],
        env={**os.environ, **malloc, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"growth of {title}: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout)["growth"])


def _resident(line: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(text.split()[1]) for text in status if text.startswith(line))


def _measure_growth(name: str, batch: str, dtype: str, title: str, size: str) -> int:
    x, kind = images(int(batch), int(size)), getattr(torch, dtype)
    model, layout = prepared(checkpoints.build(name), title, x, kind)
    x = x.contiguous(memory_format=layout)
    step(model, x, kind)  # code, weights' copies and the gradients are there then
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as mark:
        mark.write("5")  # the highest mark starts anew
    step(model, x, kind)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"growth": _measure_growth(*sys.argv[1:])}))
