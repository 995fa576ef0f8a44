"""What this installation and this machine are, for ``info`` and beside every figure."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import __version__, engines, native
from ._C import build_facts, cpu_features, isa

PACKAGES = ("torch", "torchvision", "triton", "numpy", "onnxruntime", "openvino")


def versions() -> dict[str, str | None]:
    """Of fused_resnet, Python and the packages that matter here; None where not installed."""
    found: dict[str, str | None] = {"fused_resnet": __version__}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # the distribution's version lacks the CUDA it is for
    return found


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with its family and model: a virtual one is called AMD EPYC of any."""
    found: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if "cpu family" not in found or "model" not in found:
        return found["model name"]
    return f"{found['model name']}, family {found['cpu family']} model {found['model']}"


def physical_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def gpus() -> list[str]:
    """Names of the CUDA devices."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def driver() -> str | None:
    """The version of the GPU's driver, None where there is none to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def environment() -> dict[str, Any]:
    """All of it, as JSON: what a figure means nothing without."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "processor": processor(),
        "cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "isa": isa(),
        "cpu_features": cpu_features(),
        "gpus": gpus(),
        "driver": driver() if gpus() else None,
        "cudnn": torch.backends.cudnn.version(),
        "engine": engines.wish(),
        "build": build_facts(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def engine_lines() -> Iterator[tuple[str, str]]:
    """For every engine, where it runs what, and why not elsewhere."""
    for engine in engines.ENGINES:
        if engine == "auto":
            chosen = engines.choose("conv_bn_act", "cpu", torch.float32)
            yield engine, f"the safe choice for each op; convolution on the CPU: {chosen}"
        elif (reason := engines.unavailable(engine)) is not None:
            yield engine, f"not available: {reason}"
        else:
            yield engine, "; ".join(f"{d}: {_coverage(engine, d)}" for d in ("cpu", "cuda"))


def _coverage(engine: str, device: str) -> str:
    reasons = {op: engines.why_not(engine, op, device, torch.float32) for op in engines.OPS}
    able = [op for op, reason in reasons.items() if reason is None]
    if len(able) == len(engines.OPS):
        if device == "cuda" and not torch.cuda.is_available():
            return "all ops, but there is no GPU"
        return "all ops"
    if able:
        return f"{', '.join(able)}; the other ops have no {device} kernel in this version"
    return next(reason for reason in reasons.values() if reason is not None)


def info() -> str:
    """The text of ``fused-resnet info``."""
    found = versions()
    build = build_facts()
    torch_cuda = torch.version.cuda or "none"
    devices = gpus()
    if build["cuda"]:
        cuda = f"for {build['cuda_archs']}, built with CUDA {build['cuda']}"
        if native.cuda_why_not is not None:
            cuda += f", not loaded: {native.cuda_why_not}"
    else:
        cuda = f"left out of this build: {build['cuda_why_not']}"
    rows = [(name, version or "not installed") for name, version in found.items()]
    rows += [
        ("", ""),
        ("processor", f"{processor()}, {physical_cores()} cores"),
        ("features", " ".join(cpu_features()) or "none beyond the baseline"),
        ("CPU kernels", isa()),
        ("threads", str(torch.get_num_threads())),
        ("GPU", ", ".join(devices) or f"none found (torch is built for CUDA {torch_cuda})"),
        ("", ""),
        ("built with", build["compiler"]),
        ("built for", f"torch {build['torch']}"),
        ("CUDA kernels", cuda),
        ("", ""),
        ("engine", f"{engines.wish()} is the one in force"),
        *((f"  {name}", text) for name, text in engine_lines()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)
