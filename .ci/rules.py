"""The rules that no linter knows. Prints each breach, exits with 1 if there are any."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "bench", "csrc", "examples", "fused_resnet", "tests", "triton_kernels")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
MAX_LINES = 450
TORCH_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')


def breaches(name: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for a file called `name`, a path relative to the repository."""
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        yield len(lines), f"more than {MAX_LINES} lines: split the file"
    for number, line in enumerate(lines, 1):
        if name.startswith("csrc/kernels/") and TORCH_INCLUDE.search(line):
            yield number, "a kernel includes a torch header"
        if name.startswith("triton_kernels/") and "make_block_ptr" in line:
            yield number, "tl.make_block_ptr is deprecated: use pointers and masks"
    if name.endswith(".py") and name.startswith(("fused_resnet/", "triton_kernels/")):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assert):
                yield node.lineno, "assert vanishes under python -O: raise instead"


def main() -> int:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    found = 0
    for path in (ROOT / "setup.py", *files):
        if path.suffix in SUFFIXES:
            name = path.relative_to(ROOT).as_posix()
            for line, what in breaches(name, path.read_text(encoding="utf-8")):
                print(f"{name}:{line}: {what}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
