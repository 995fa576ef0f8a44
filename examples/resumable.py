"""What the training scripts share: checkpoints that survive anything, and stopping when told to.

A checkpoint is written beside its place, forced to the disk and only then renamed, so whatever
happens (a crash, a full disk, SIGKILL, a power cut), the file of that name is a whole one. It is
read with ``weights_only=True``: nothing in it is executed.
"""

import contextlib
import copy
import os
import random
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fused_resnet.command import CommandError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Part(Protocol):
    """What a checkpoint is made of: models, optimizers, scalers, RandomState."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class RandomState:
    """The states of all generators a training draws from, with ``loader``, the data loader's.

    NumPy's is not among them: neither torchvision's transforms nor these scripts draw from it.
    """

    def __init__(self, loader: torch.Generator) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        states = {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}
        return {**states, "loader": self.loader.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])
        if torch.cuda.is_available() and state_dict["cuda"] is not None:
            torch.cuda.set_rng_state(state_dict["cuda"])
        random.setstate(state_dict["python"])
        self.loader.set_state(state_dict["loader"])


def save(path: Path, epochs: int, parts: Mapping[str, Part], recipe: Mapping[str, Any]) -> None:
    """Write the state after ``epochs`` epochs to ``path``, whole or not at all.

    Args:
        recipe: what :func:`restore` insists on: the model's name, its classes, the options.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    scratch = path.with_name(path.name + ".tmp")  # the same folder: renaming is atomic there
    try:
        with scratch.open("wb") as file:
            torch.save({"epochs": epochs, "recipe": dict(recipe), **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        scratch.unlink(missing_ok=True)
        raise CommandError(f"{path}: cannot be written: {_reason(error)}") from error


def restore(path: Path, parts: Mapping[str, Part], recipe: Mapping[str, Any]) -> int:
    """Give ``parts`` the state in ``path``; the number of epochs it has behind it.

    Raises:
        CommandError: the file cannot be read, is no checkpoint of this script, or is of another
            recipe; ``parts`` are as before then.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails on bad files in every way there is
        raise CommandError(f"{path}: damaged, or not a checkpoint: {_reason(error)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("recipe"), dict):
        raise CommandError(f"{path}: holds no state of a training, but a {type(state).__name__}")
    for name, now in recipe.items():
        if (before := state["recipe"].get(name)) != now:
            raise CommandError(
                f"{path}: is of another training: {name} was {reprlib.repr(before)} there, "
                f"and is {reprlib.repr(now)} now"
            )
    if missing := {"epochs", *parts} - set(state):
        raise CommandError(f"{path}: lacks {', '.join(sorted(missing))}")
    previous = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        for each, state in previous.items():
            parts[each].load_state_dict(state)
        raise CommandError(f"{path}: {name} does not fit: {_reason(error)}") from error
    return int(state["epochs"])


def find(resume: str | None, target: Path) -> Path | None:
    """The checkpoint that ``--resume FILE|auto`` means, where ``target`` is going to be written.

    Raises:
        CommandError: ``target`` holds another training, which would be lost.
    """
    found = target if resume == "auto" else Path(resume) if resume else None
    if target.exists() and (found is None or found.resolve() != target.resolve()):
        raise CommandError(f"{target} exists: go on with --resume auto, or choose another folder")
    return found if resume != "auto" or target.exists() else None


def _reason(error: BaseException) -> str:
    """What is wrong, in one line.

    Asked of the first error of the chain: torch wraps the system's words in complaints about the
    position in the file, and the unpickler's in advice to be less careful.
    """
    while error.__context__ is not None:
        error = error.__context__
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split())[:240] or type(error).__name__


class StoppedError(Exception):
    """Training was told to stop, by the signal of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Makes SIGINT (Ctrl-C) and SIGTERM wait for :meth:`check`; a second one ends at once."""

    def __init__(self, *, quiet: bool) -> None:
        self.number = 0
        self.quiet = quiet
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.quiet:  # print is not to be used within a signal handler
            os.write(2, b"stopping after this step; once more stops at once\n")

    def check(self) -> None:
        """Raise StoppedError if a signal came. Called between steps."""
        if self.number:
            raise StoppedError(self.number)

    @contextlib.contextmanager
    def explained(self, checkpoint: Path) -> Iterator[None]:
        """Says, if what is inside is stopped, how to go on."""
        try:
            yield
        except StoppedError:
            if self.quiet:
                pass
            elif checkpoint.exists():
                held = f"{checkpoint} holds the state after the last whole epoch"
                print(f"{held}: go on with the same command and --resume auto", file=sys.stderr)
            else:
                print("no epoch was finished: use the same command again", file=sys.stderr)
            raise


def ignore_signals(worker: int) -> None:
    """For ``DataLoader(worker_init_fn=)``: Ctrl-C reaches the whole group, and the main process
    still wants the batch. Workers end when it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def guarded(program: Callable[[Stop], int], *, quiet: bool = False) -> int:
    """Run ``program``: its exit status, or 1 after a CommandError, 130 or 143 after a signal.

    Args:
        quiet: for all but one of several processes: say nothing of signals.
    """
    stop = Stop(quiet=quiet)
    try:
        return program(stop)
    except CommandError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    except StoppedError as stopped:
        if not quiet:
            print(stopped, file=sys.stderr)
        return 128 + stopped.number
