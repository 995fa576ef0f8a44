"""What a machine can build with: C++ compiler, CUDA toolkit, GPU architectures.

For setup.py, the checks in .ci and the tests. `env` is os.environ or a dict in its place.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class BuildError(Exception):
    """Something the build needs is not there, or a wish about the build cannot be met."""


class Toolkit(NamedTuple):
    home: Path
    nvcc: str
    version: str


def output_of(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def find_compiler(env):
    """The command in CXX, else g++."""
    command = shlex.split(env.get("CXX", "")) or ["g++"]
    if shutil.which(command[0], path=env.get("PATH", "")):
        return command
    how = "Install one (apt install g++, dnf install gcc-c++, conda install gxx) or set CXX."
    raise BuildError(f"no C++ compiler: there is no {command[0]}. {how}")


def find_toolkit(env):
    """CUDA_HOME's toolkit, else that of the nvcc on PATH: it may be a wrapper, so it is asked."""
    home = env.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc", path=env.get("PATH", ""))
    if not nvcc:
        raise BuildError(
            f"there is no nvcc in CUDA_HOME={home}" if home else "there is no nvcc on PATH"
        )
    named = re.findall(r"^#\$ TOP=(.+)$", output_of(nvcc, "-v", "--dryrun", "x.cu"), re.MULTILINE)
    for folder in [home] if home else [*named, Path(nvcc).resolve().parents[1]]:
        if Path(folder, "include/cuda_runtime.h").is_file():
            version = re.search(r"release ([\d.]+\d)", output_of(nvcc, "--version"))
            return Toolkit(Path(folder).resolve(), nvcc, version[1] if version else "unknown")
    raise BuildError(
        f"{nvcc} comes without include/cuda_runtime.h; CUDA_HOME can name another toolkit"
    )


def plan_cuda(env, torch_cuda):
    """(toolkit, "") to build CUDA, (None, why) to leave it out; a wish made in vain raises."""
    wish = env.get("FUSED_RESNET_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"FUSED_RESNET_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "FUSED_RESNET_CUDA=0"
    try:
        if not torch_cuda:
            raise BuildError("this torch is built without CUDA")
        toolkit = find_toolkit(env)
        if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
            raise BuildError(f"nvcc is {toolkit.version} and torch is built for CUDA {torch_cuda}")
        return toolkit, ""
    except BuildError as why:
        if wish == "1":
            raise BuildError(f"FUSED_RESNET_CUDA=1, but {why}") from None
        return None, str(why)


def arch_list(env, gpus):
    """TORCH_CUDA_ARCH_LIST, else the (major, minor) in `gpus`, else two and PTX for later ones."""
    wish = ";".join(re.findall(r"[^;\s]+", env.get("TORCH_CUDA_ARCH_LIST", "")))
    present = ";".join(f"{major}.{minor}" for major, minor in sorted(set(gpus)))
    return wish or present or "8.0;9.0+PTX"


def gencode(archs):
    """nvcc's flags for a list like 8.0;9.0a+PTX."""
    flags = []
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST takes 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        for code in ("sm", "compute") if match[3] else ("sm",):
            flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


def run_ninja(root, folder, lines):
    """Writes build.ninja into `folder`, which is relative to `root`, and runs it there."""
    Path(root, folder).mkdir(parents=True, exist_ok=True)
    Path(root, folder, "build.ninja").write_text("\n".join(lines) + "\n")
    beside_python = str(Path(sys.executable).parent)
    ninja = shutil.which("ninja", path=os.pathsep.join([beside_python, os.environ["PATH"]]))
    if not ninja:
        raise BuildError("there is no ninja: pip install ninja")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run([ninja, "-f", f"{folder}/build.ninja", *jobs], cwd=root).returncode:
        raise BuildError("the compiler failed: see above")
