"""What a machine can do at best, measured: for floors."""

import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.cases import DTYPES
from fused_resnet.measure import Pace, clock, interleave

#: For the bandwidth of a copy: more than any cache holds.
COPIED_BYTES = 2**28
#: For the peak: a 1x1 convolution of so many channels and pixels an image, of images by device.
CHANNELS, PIXELS = 1024, 32
IMAGES = {"cpu": 1, "cuda": 256}


def available_memory(device: str) -> int:
    """Bytes that can be had without taking them from others, or from what is limited to us."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = 1024 * int(value.split()[0])
    group = Path("/sys/fs/cgroup")
    limit, used = (group / name for name in ("memory.max", "memory.current"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return found["MemAvailable"]
    return min(found["MemAvailable"], int(limit.read_text()) - int(used.read_text()))


def copy_bandwidth(device: str, pace: Pace) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = clock(device, cold=True)
    samples = interleave({"copy": lambda: target.copy_(source)}, pace, seconds=seconds)["copy"]
    return 2 * COPIED_BYTES / statistics.median(samples)


def peak_flops(device: str, dtype: str, pace: Pace) -> float:
    """FLOPs a second of a large convolution, under torch's settings (TF32 or not), at its best."""
    shape = (IMAGES[device], CHANNELS, PIXELS, PIXELS)
    x = torch.ones(shape, dtype=DTYPES[dtype], device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(CHANNELS, CHANNELS, 1, 1, dtype=x.dtype, device=device)
    weight = weight.contiguous(memory_format=torch.channels_last)
    calls = {dtype: lambda: F.conv2d(x, weight)}
    with torch.no_grad():
        samples = interleave(calls, pace, seconds=clock(device))[dtype]
    return 2 * x.numel() * CHANNELS / min(samples)
