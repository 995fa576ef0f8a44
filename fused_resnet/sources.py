"""The network that a command is about: what ``--model`` and ``--weights`` name."""

import argparse
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torchvision
from torch import nn

from . import checkpoints
from .command import CommandError

FORMS = "torchvision:NAME, timm:NAME, FILE.py:FUNCTION or caffe:FILE.prototxt"


class Network(NamedTuple):
    model: nn.Module  #: in evaluation mode
    untrained: bool  #: an architecture without weights worth keeping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which network."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=FORMS)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="a state_dict, .safetensors or read with weights_only=True; of caffe a .caffemodel",
    )  # fmt: skip


def load(name: str, weights: Path | None) -> Network:
    """The network that ``--model`` names, with the weights of a file."""
    form, _, rest = name.partition(":")
    path, _, function = name.rpartition(":")
    if form in _LIBRARIES and rest:
        return _of_library(name, form, rest, weights)
    if path.endswith(".py"):
        model = _of_file(name, Path(path), function)
        if weights is not None:
            checkpoints.fill(model, checkpoints.read(weights), name, weights)
    elif form == "caffe" and rest:
        model = _checked(name, _guarded(name, lambda: _caffe(rest, weights)))
    else:
        raise CommandError(f"--model {name}: must be {FORMS}{_meant(name)}")
    return Network(model.eval(), untrained=False)


def _meant(name: str) -> str:
    if name.endswith(".py"):
        return f"; name a function of it, {name}:FUNCTION"
    if name in torchvision.models.list_models():
        return f"; did you mean torchvision:{name}?"
    return ""


def _torchvision() -> tuple[list[str], Callable[..., nn.Module]]:
    return torchvision.models.list_models(), torchvision.models.get_model


def _timm() -> tuple[list[str], Callable[..., nn.Module]]:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise CommandError("timm is not installed: pip install timm") from error
    return timm.list_models(), timm.create_model


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm}


def _of_library(name: str, form: str, rest: str, weights: Path | None) -> Network:
    known, build = _LIBRARIES[form]()
    if rest not in known:
        raise CommandError(f"--model {name}: {form} has no {rest}{_close(rest, known)}")
    if weights is None:
        return Network(build(rest).eval(), untrained=True)
    state = checkpoints.read(weights)
    model = build(rest, **checkpoints.classes_of(state))
    checkpoints.fill(model, state, name, weights)
    return Network(model.eval(), untrained=False)


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _of_file(name: str, path: Path, function: str) -> nn.Module:
    """What a function of a Python file returns.

    The file is executed, with the folder it is in to import from.
    """
    if not path.is_file():
        raise CommandError(f"--model {name}: there is no such file")
    # Not by its own name, which a module in use may have.
    spec: Any = importlib.util.spec_from_file_location("fused_resnet_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[spec.name] = module  # dataclasses look for theirs
    _guarded(name, lambda: spec.loader.exec_module(module), spec.origin)
    functions = [key for key, value in vars(module).items() if callable(value)]
    if function not in functions:
        raise CommandError(f"--model {name}: no such function{_close(function, functions)}")
    return _checked(name, _guarded(name, getattr(module, function), spec.origin))


def _caffe(prototxt: str, caffemodel: Path | None) -> Any:
    return importlib.import_module(".caffe", __package__).load(prototxt, caffemodel)


def _checked(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name}: must give a torch.nn.Module, got {_kind(model)}")
    return model


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}; name a function that makes one"
    return type(value).__name__


def _guarded(name: str, call: Callable[[], Any], file: str = "") -> Any:
    """What ``call`` returns; what it raises, in a line, with the place if that is in ``file``."""
    try:
        return call()
    except Exception as error:  # somebody else's code raises what it likes
        text = f"--model {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        raise CommandError(f"{text} (line {lines[-1]})" if lines else text) from error
