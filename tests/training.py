"""Runs the example scripts in processes of their own, forked from one that has torch imported.

Importing takes seconds, a training of the tiny network below tens of milliseconds: so are twenty
killed and resumed trainings affordable. Only the network is small: loop, loader, checkpoints and
signals are the scripts' own.
"""

import atexit
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
IMAGEFOLDER = EXAMPLES / "train_imagefolder.py"
#: Options of train_imagefolder.py that make it quick.
SMALL = ("--size", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--threads", 1)
PATIENCE = 60.0  # for what must come, on a machine that is busy
#: One thread: the tests' workers share the cores. This clone, whatever else is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Server:
    """Starts one script at a time."""

    def __init__(self) -> None:
        self.child: int | None = None  # not waited for yet
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=ENVIRONMENT, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, script: Path, *args: object, log: Path, **job: object) -> int:
        """The process's id.

        Args:
            log: where its standard output and error go.
            job: what else is to be done, see :func:`prepare`.
        """
        self.end()
        argv = [str(script), *map(str, args)]
        print(json.dumps({"argv": argv, "log": str(log), **job}), file=self.process.stdin)
        self.child = int(self.process.stdout.readline())
        return self.child

    def wait(self) -> int:
        """Its exit status; negative: the signal that killed it. Until then its id is its own."""
        print(file=self.process.stdin)
        ended, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ended:
            os.kill(self.child, signal.SIGKILL)
        status, self.child = int(self.process.stdout.readline()), None
        assert ended, f"the training went on for {PATIENCE:.0f} s"
        return status

    def run(self, script: Path, *args: object, log: Path, **job: object) -> int:
        self.start(script, *args, log=log, **job)
        return self.wait()

    def end(self) -> None:
        """Kill what a test that failed has left running."""
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
            self.wait()

    def close(self) -> None:
        self.end()
        self.process.stdin.close()
        self.process.wait(PATIENCE)


def wait_for(words: str, log: Path, start: int = 0) -> None:
    """Until ``words`` are in ``log``, ``start`` characters from its beginning."""
    end = time.monotonic() + PATIENCE
    while not log.exists() or words not in log.read_text()[start:]:
        assert time.monotonic() < end, f"{words!r} did not come"
        time.sleep(0.002)


def make_images(folder: Path, size: int = 32, classes: str = "ab", count: int = 12) -> Path:
    """PNGs in PATH/train and PATH/val whose classes differ in colour."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 4)):
        for k, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = draws.integers(0, 156, (size, size, 3), dtype=np.uint8)
                pixels[..., k % 3] += 100
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def same(a, b) -> bool:
    """Whether two states are equal to the bit."""
    import torch

    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape
        flat = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
        return equal and (not a.numel() or torch.equal(*flat))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder: Path):
    import torch

    return torch.load(folder / "checkpoint.pth", weights_only=True)


def tiny(classes: int, seconds: float):
    """Some thousand parameters; ``seconds`` to sleep in every call."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    class Slow(nn.Module):
        def forward(self, x):
            print("a step begins", flush=True)
            time.sleep(seconds)
            return x

    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        BasicBlock(8, 8),
        Slow() if seconds else nn.Identity(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def prepare(job: dict) -> None:
    """What a job asks for, in the process that runs it.

    - tiny: the network is the tiny one (unless false); seconds: how long each call of it sleeps.
    - die: [name, n], name one of the functions of os: SIGKILL instead of the n-th call of it.
    - limit: no file may get longer than that many bytes, as on a full disk.
    """
    import torchvision

    if job.get("tiny", True):
        seconds = job.get("seconds", 0.0)
        torchvision.models.get_model = lambda name, num_classes: tiny(num_classes, seconds)
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    if "die" in job:
        name, left = job["die"]
        original = getattr(os, name)

        def dying(*args):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, name, dying)


def serve() -> None:
    """Read a job, print the id of the process that runs it; read a line, print its exit status."""
    sys.path.insert(0, str(EXAMPLES))
    import rich.progress  # noqa: F401
    import torch
    import train_imagefolder  # noqa: F401 (imported here, it is there in every fork)

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        return
    os.setpgid(0, 0)  # a group of its own, as a shell gives it
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    prepare(job)
    sys.argv = job["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        # As the interpreter would, but for freeing every module: that takes most of a second.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(stop.code or 0)


if __name__ == "__main__":
    serve()
