"""The energy of a call on a GPU, from the counter that its driver keeps."""

import time
from collections.abc import Callable
from typing import Any

import torch

#: Between two readings: the counter moves on about ten times a second.
SECONDS = 1.0
#: So many calls are launched before the host waits for them.
LAUNCHED = 8


def counter() -> Callable[[], float]:
    """Reads the joules that the current GPU has taken; it keeps count since Volta.

    Raises:
        RuntimeError: there is none to be read, and why.
    """
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise RuntimeError("pynvml is not installed (pip install nvidia-ml-py)") from error
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except pynvml.NVMLError as error:
        raise RuntimeError(f"the driver does not tell: {error}") from error
    return lambda: 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)


def absent(device: str) -> dict[str, str]:
    """Why there is no energy among the figures, if so, as it stands beside absent peers."""
    if device != "cuda":
        return {"energy": "it is read from GPUs"}
    try:
        counter()
    except RuntimeError as error:
        return {"energy": str(error)}
    return {}


def of_calls(call: Callable[[], Any]) -> dict[str, float]:
    """The joules of one of many calls in a row, with what the GPU takes at rest."""
    read = counter()
    torch.cuda.synchronize()
    start, before, calls = time.perf_counter(), read(), 0
    while time.perf_counter() - start < SECONDS:
        for _ in range(LAUNCHED):
            call()
        torch.cuda.synchronize()
        calls += LAUNCHED
    return {"joules": (read() - before) / calls}
