"""Compiles csrc/torch against the headers of the oldest torch supported, without installing it.

python .ci/headers.py torch==2.11.0 [--may-skip]

TORCH_TARGET_VERSION does not guard header-only code and macros, so building on a newer torch proves
nothing about them. The headers come from torch's wheel for macOS, a tenth of the size of the Linux
one, and are kept under build/. With --may-skip, headers that cannot be had are reported, not fatal.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolkit  # noqa: E402


def headers_of(requirement: str, folder: Path) -> Path | None:
    """Where torch's include/ is: the installed torch, else `folder`, filled if need be."""
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin and version("torch").split("+")[0] == requirement.split("==")[1]:
        return Path(torch.origin).parent
    if (folder / "include").is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = ["--platform=macosx_11_0_arm64", "--python-version=3.11", "--only-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", scratch, *wheel]
        if subprocess.run([*pip, requirement]).returncode:
            return None
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(scratch, names)
        (Path(scratch) / "torch/include").rename(folder / "include")
    return folder


def cuda_home() -> Path | None:
    """Where cuda_runtime.h is: the toolkit, else what torch's own dependencies brought."""
    try:
        return toolkit.find_toolkit(os.environ).home
    except toolkit.BuildError:
        nvidia = importlib.util.find_spec("nvidia")
        places = [Path(place) for place in nvidia.submodule_search_locations] if nvidia else []
        found = [header for place in places for header in place.glob("*/include/cuda_runtime.h")]
        return found[0].parent.parent if found else None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("requirement")
    parser.add_argument("--may-skip", action="store_true")
    args = parser.parse_args()
    folder = ROOT / "build" / f"headers-{args.requirement.split('==')[1]}"
    torch = headers_of(args.requirement, folder)
    if torch is None:
        print(f"headers: SKIPPED, {args.requirement} could not be downloaded")
        return 0 if args.may_skip else 1
    flags = {"schema": "$glue", "ops_cpu": "$glue"}
    home = cuda_home()
    if home:
        flags["ops_cuda"] = "$cuda_glue"
    else:
        print("headers: SKIPPED csrc/torch/ops_cuda.cpp, there is no cuda_runtime.h")
    lines = [
        f"builddir = {folder.relative_to(ROOT)}",
        f"cxx = {shlex.join(toolkit.find_compiler(os.environ))}",
        f"torch = {shlex.quote(str(torch))}",
        f"toolkit = {shlex.quote(str(home))}",
        "include csrc/rules.ninja",
    ]
    for name, flag in flags.items():
        lines += [f"build $builddir/{name}.o: cxx csrc/torch/{name}.cpp", f"  flags = {flag}"]
    print(f"headers: {', '.join(flags)} against {args.requirement}", flush=True)
    toolkit.run_ninja(ROOT, folder.relative_to(ROOT), lines)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except toolkit.BuildError as error:
        sys.exit(f"headers: {error}")
