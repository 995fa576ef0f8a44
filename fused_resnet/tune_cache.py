"""Where measured choices are kept: a JSON file for each device and its software.

In the user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``; nothing in it is executed. What is
not such a file, of this user, this format, this device and these versions, is ignored.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch

from . import __version__
from ._C import isa
from .facts import processor, versions
from .measure import write_json

#: Of the files: raised when what an older one says must not be taken.
FORMAT = 1


class Entry(NamedTuple):
    """What was measured for some facts."""

    way: str  #: the one that is taken
    seconds: dict[str, float]  #: the median of each that was timed
    failed: dict[str, str]  #: why others were not


def folder() -> Path:
    """Where the files are."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fused_resnet"


@functools.cache
def _kernels(device: str) -> str:
    """A digest of the kernels for a device type: whoever builds them anew measures anew."""
    files = sorted(Path(__file__).parent.glob(f"_ops_{device}*.so"))
    if device == "cuda":  # in a clone that package's folder lies elsewhere
        found = importlib.util.find_spec(f"{__package__}.triton_kernels")
        places = (found and found.submodule_search_locations) or ()
        files += sorted(path for place in places for path in Path(place).glob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement on ``device`` holds for, and nothing else."""
    if device.type == "cuda":
        own = {
            "device": torch.cuda.get_device_name(device),
            "cudnn": f"{torch.backends.cudnn.version()}",
        }
    else:
        own = {"device": processor(), "isa": isa(), "threads": f"{torch.get_num_threads()}"}
    return {
        **own,
        "fused_resnet": __version__,
        "kernels": _kernels(device.type),
        "torch": torch.__version__,
        "triton": versions()["triton"] or "none",
    }


class Cache:
    """The file of one environment, and what is known of it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        name = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder() / f"tuned-{name}.json"
        self.entries: dict[str, Entry] = {}
        self._threads = threading.RLock()
        self._processes = filelock.FileLock(self.path.with_suffix(".lock"))

    def read(self) -> None:
        """Take up what the file has; one that is not to be trusted is ignored with a warning."""
        try:
            if self.path.stat().st_uid != os.getuid():
                raise ValueError("it belongs to another user")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.entries.update(_checked(content, self.environment))
        except FileNotFoundError:
            return
        except (OSError, RecursionError, ValueError) as error:  # JSON's and Unicode's are of them
            warnings.warn(f"{self.path}: ignored, as if nothing were tuned: {error}", stacklevel=2)

    def add(self, key: str, entry: Entry) -> None:
        """Add an entry and write the file, at once or not at all; hold the :meth:`lock`."""
        self.entries[key] = entry
        entries = {key: entry._asdict() for key, entry in sorted(self.entries.items())}
        content = {"format": FORMAT, "environment": self.environment, "entries": entries}
        with self._or_warn():
            write_json(self.path, content)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One thread of one process at a time; the same thread may take it again and again."""
        with self._threads, contextlib.ExitStack() as held:
            with self._or_warn():
                own = self.path.parent
                own.mkdir(mode=0o700, parents=True, exist_ok=True)
                own.chmod(0o700)
                held.enter_context(self._processes)
            yield

    @contextlib.contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        except (NotImplementedError, OSError) as error:  # a file system may know no locks
            warnings.warn(f"{self.path}: tuned for this process alone: {error}", stacklevel=4)


def _checked(content: Any, environment: dict[str, str]) -> dict[str, Entry]:
    """The entries of a file's content. Raises ValueError if it is not what :meth:`add` writes."""
    _expect(isinstance(content, dict), "it holds no object")
    found = content.get("format")
    _expect(found == FORMAT, f"its format is {found!r}, this version reads {FORMAT}")
    _expect(content.get("environment") == environment, "it is of another device or version")
    entries = content.get("entries")
    _expect(isinstance(entries, dict), "it has no entries")
    result = {}
    for key, entry in entries.items():
        well = isinstance(entry, dict) and entry.keys() == set(Entry._fields)
        _expect(well, f"entry {key!r} has other fields than {', '.join(Entry._fields)}")
        seconds, failed = entry["seconds"], entry["failed"]
        well = isinstance(seconds, dict) and all(map(_is_time, seconds.values()))
        _expect(well, f"entry {key!r} has seconds that are no times")
        well = isinstance(failed, dict) and all(isinstance(why, str) for why in failed.values())
        _expect(well, f"entry {key!r} has failures without a reason")
        _expect(entry["way"] in [*seconds], f"entry {key!r} takes what was not timed")
        result[key] = Entry(**entry)
    return result


def _expect(well: bool, otherwise: str) -> None:
    if not well:
        raise ValueError(otherwise)


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
