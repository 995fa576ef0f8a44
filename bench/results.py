"""Files of results: where they are, and reading them."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench import floors
from fused_resnet.command import CommandError

RESULTS = Path(__file__).parent / "results"
#: Commands that write them.
BENCH, LAUNCHES = "bench", "launches"


def commit() -> str | None:
    """The commit that is measured, + if the tree has changes on top of it; None outside git."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(RESULTS.parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and git("status", "--porcelain") else head


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"{path}: is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def read(path: Path, *commands: str) -> dict[str, Any]:
    """A file of results of one of some commands, by default of measuring.

    Floors are added to those that have none.
    """
    content = _load(path)
    command = content.get("command")
    if content.get("schema") != 1 or command not in (commands or (BENCH,)):
        raise CommandError(f"{path}: does not hold results of this benchmark")
    if command == BENCH:
        try:
            on = floors.machine(content["environment"])
            for row in content["results"]:
                row.setdefault("floor", floors.floor(row, content["size"], on))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CommandError(f"{path}: its results are damaged: {what}") from error
    return content


def kept(*commands: str) -> dict[str, dict[str, Any]]:
    """By name, the results of some commands among those in RESULTS."""
    paths = sorted(RESULTS.glob("*.json"))
    return {p.stem: read(p, *commands) for p in paths if _load(p).get("command") in commands}
