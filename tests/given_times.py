"""Tuning by times that are given, so that no test depends on a clock, nor on what you tuned."""

from pathlib import Path

import pytest

from fused_resnet import measure, tuning


def prefer(patch: pytest.MonkeyPatch, way: str = "none", *ops: str) -> list[tuple[str, str]]:
    """``way`` takes half the time of others, in all ops or some; the list gets what is timed."""
    timed = []

    def seconds(attempt, repeats):
        op = attempt.site.facts.op
        timed.append((op, attempt.way))
        return 0.5 if attempt.way == way and (not ops or op in ops) else 1.0

    patch.setattr(measure, "clock_in_sequence", lambda device: seconds)
    return timed


def keep_in(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Choices are kept below ``folder``, and none is known yet."""
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.setattr(tuning, "_tables", {})
    return folder / "fused_resnet"
