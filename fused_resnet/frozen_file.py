"""Files of frozen models: safetensors with a description in JSON. Nothing in them is executed."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .blocks import Fused, Pair
from .calibrate import stems_of
from .convert import joined
from .freeze import Frozen, frozen_copy
from .frozen_conv import FrozenConv, untuned
from .int8 import Grid, Int8Conv

#: Of what is in a file: raised when a reader of the last could not make sense of the next.
FORMAT = 2

#: Where the description is among the file's metadata.
_KEY = "fused_resnet"

#: What a frozen model tells about itself.
_REPORTS = ("errors", "layer_errors", "unfolded", "failed")

#: How many names a message lists.
_SHOWN = 5


def _require() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "files of frozen models need safetensors: pip install fused_resnet[serve]",
            name=error.name,
        ) from error


def save_frozen(frozen: Frozen, path: str | os.PathLike[str]) -> None:
    """Write a frozen model to a safetensors file, without pickle.

    In it are the constant weights by the names they have in the model, plain (they are packed again
    for the processor they are loaded on), and as JSON in the file's metadata: the dtype, and of
    every layer what it computes and the engine it was tuned to. ``path`` is replaced at once, when
    all is written.

    Args:
        frozen: what :func:`freeze` returned.
        path: where to; ``.safetensors`` by custom.

    Raises:
        TypeError: ``frozen`` is not a frozen model, or its state holds something besides tensors.
        ModuleNotFoundError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    if not isinstance(frozen, Frozen):
        raise TypeError(
            f"save_frozen: frozen must be what freeze returns, got {type(frozen).__name__}"
        )
    _require()
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, value in frozen.model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"save_frozen: the state must hold tensors, got {type(value).__name__} for {name!r}"
            )
        # Names that share memory, which safetensors refuses, get a copy each: nothing changes them.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    description = {
        "format": FORMAT,
        "version": __version__,
        "dtype": str(frozen.dtype).removeprefix("torch."),
        **{key: getattr(frozen, key) for key in _REPORTS},
        "layers": {
            where: {
                **_computes(layer, p),
                "folded": layer.folded,
                "engine": layer.engine,
                "winograd": layer.winograd,
                **({"grids": _plain(layer.grids)} if isinstance(layer, Int8Conv) else {}),
            }
            for where, layer, p in _layers(frozen.model)
        },
        "stems": _plain({where: m.grid for where, m in stems_of(frozen.model).items()}),
    }
    content = save(tensors, {_KEY: json.dumps(description)})
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_frozen(path: str | os.PathLike[str], model: nn.Module) -> Frozen:
    """Read a frozen model from a file of :func:`save_frozen`.

    As with a ``state_dict``, structure comes from code and tensors from the file; names, shapes,
    dtypes and what each layer computes are compared before anything is loaded.

    Args:
        path: the file.
        model: a freshly built model of the same architecture, on the device to serve on. It is
            copied, not changed, and its weights are not read: built under
            ``torch.device("meta")`` it costs nothing, and the result is on the CPU.

    Returns:
        What was saved: the same outputs, to the bit, on the same machine and torch. A layer whose
        engine cannot run here is on the one that an untuned layer is on.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the file is damaged, of another kind or format, or does not fit ``model``.
        ModuleNotFoundError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    _require()
    with _opened(Path(path)) as file:
        described = _description(file.metadata() or {}, path)
        layers, dtype = described["layers"], described["dtype"]

        def empty(conv: Any, bn: Any, p: Pair, where: str, kind: torch.dtype) -> FrozenConv:
            # One that the file does not have is missed by its name, below.
            layer = layers.get(where, {})
            if layer.get("grids"):
                return Int8Conv.blank(conv, **layer["grids"])
            return FrozenConv.empty(conv, layer.get("folded", True), kind)

        frozen = frozen_copy("load_frozen", model, dtype, empty)
        if frozen.device.type == "meta":
            frozen.device = torch.device("cpu")
        own = frozen.model.state_dict()
        stems = stems_of(frozen.model)
        extra = (f"the model has no stem {name!r}" for name in described["stems"].keys() - stems)
        problems = [*_misfits(file, own), *_differences(frozen.model, layers), *extra]
        if problems:
            more = f"; {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise RuntimeError(
                f"{path}: does not fit {type(model).__name__}: {'; '.join(problems[:_SHOWN])}{more}"
            )
        # Laid out as in the model: a layer's weight in channels_last.
        state = {
            name: torch.empty_like(t, device=frozen.device).copy_(file.get_tensor(name))
            for name, t in own.items()
        }
    frozen.model.load_state_dict(state, assign=True)
    _check_loaded(frozen.model, path)
    for where, layer, _ in _layers(frozen.model):
        engine = layers[where]["engine"]
        layer.winograd = layers[where]["winograd"]
        here = layer.can_run(engine)
        layer.engine = engine if here else untuned(frozen.device, frozen.dtype)
        layer.failed = described["failed"].get(where, {})
    for where, grid in described["stems"].items():
        stems[where].grid = grid
    for key in _REPORTS:
        setattr(frozen, key, described[key])
    return frozen


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # in Python's words, if it cannot be
        pass
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise RuntimeError(f"{path}: not a safetensors file, or damaged: {error}") from error
    with file:
        yield file


def _description(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file's description, its dtype as torch's."""
    if _KEY not in metadata:
        raise RuntimeError(
            f"{path}: not a frozen model: a safetensors file that save_frozen did not write"
        )
    try:
        described = json.loads(metadata[_KEY])
        if described["format"] != FORMAT:
            raise RuntimeError(
                f"{path}: format {described['format']} of fused_resnet {described['version']}; "
                f"this is {__version__} and reads format {FORMAT}: freeze the model again"
            )
        described["dtype"] = getattr(torch, described["dtype"])
        if not isinstance(described["dtype"], torch.dtype):
            raise TypeError(f"dtype {described['dtype']}")
        for layer in described["layers"].values():
            layer["folded"], layer["engine"] = bool(layer["folded"]), str(layer["engine"])
            if "grids" in layer:
                layer["grids"] = _grids(layer["grids"])
            layer["winograd"] = bool(layer.get("winograd"))
        described["stems"] = _grids(described.get("stems", {}))
        for key in _REPORTS:
            described[key] = dict(described[key])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path}: its description is damaged: {error!r}") from error
    return described


def _plain(grids: dict[str, Grid | None]) -> dict[str, Any]:
    """Those that there are, for JSON."""
    return {name: dataclasses.asdict(grid) for name, grid in grids.items() if grid is not None}


def _grids(described: dict[str, Any]) -> dict[str, Grid]:
    return {name: Grid(float(grid["scale"]), int(grid["zero"])) for name, grid in described.items()}


def _layers(model: nn.Module) -> Iterator[tuple[str, FrozenConv, Pair]]:
    """The frozen layers: where they are, and what follows them."""
    for path, m in model.named_modules():
        for p in (m.frozen_pairs or ()) if isinstance(m, Fused) else ():
            yield joined(path, p.conv), m.get(p.conv), p


def _computes(layer: FrozenConv, p: Pair) -> dict[str, Any]:
    """What the shapes of a layer's tensors do not tell."""
    stride, padding, dilation, groups = layer.geometry
    return {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "act": p.act,
        "residual": p.residual,
    }


def _differences(model: nn.Module, layers: dict[str, Any]) -> Iterator[str]:
    """In what the model's layers are not those of a file."""
    for where, layer, p in _layers(model):
        for key, value in _computes(layer, p).items():
            if where in layers and value != layers[where].get(key):
                yield f"{where} has {key} {value}, the file {layers[where].get(key)}"


def _misfits(file: Any, own: dict[str, Tensor]) -> Iterator[str]:
    """Which of the model's tensors are not those of a file."""
    saved = set(file.keys())
    for name in sorted(saved - own.keys()):
        yield f"the model has no {name}"
    for name, t in own.items():
        if name not in saved:
            yield f"the file has no {name}"
            continue
        found = file.get_tensor(name)
        if (found.shape, found.dtype) != (t.shape, t.dtype):
            yield f"{name} is {_kind(t)}, in the file {_kind(found)}"


def _kind(t: Tensor) -> str:
    return f"{tuple(t.shape)} of {t.dtype}"


def _check_loaded(model: nn.Module, path: str | os.PathLike[str]) -> None:
    for name, t in model.named_buffers():
        if t.is_meta:
            raise RuntimeError(
                f"{path}: cannot hold {name}, a buffer that is not persistent; build the model on "
                "a device, not on meta"
            )
