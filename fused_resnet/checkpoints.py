"""Where a network's weights come from: a file, torchvision, or a seed."""

import http.client
import queue
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from . import models
from .command import CommandError, require

MODELS: tuple[str, ...] = tuple(models.__all__)

#: Seconds the network has to answer before it counts as absent.
PATIENCE = 5.0


def build(name: str, **kwargs: Any) -> nn.Module:
    """torchvision's network of that name."""
    return torchvision.models.get_model(name, weights=None, **kwargs)


def from_file(name: str, path: Path) -> nn.Module:
    """torchvision's network of that name with a checkpoint, see :func:`read`."""
    state = read(path)
    model = build(name, **classes_of(state))
    fill(model, state, name, path)
    return model.eval()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a state_dict, alone or under "state_dict" or "model".

    Nothing in the file is executed: it is safetensors by its name, or read with
    ``weights_only=True``.
    """
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror or error}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in found.items()
    ):
        raise CommandError(f"{path}: holds a {type(found).__name__}, not a state_dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in found.items()}


def _safetensors(path: Path) -> Any:
    require("serve", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise CommandError(f"{path}: not a safetensors file, or damaged: {error}") from error


def _pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load fails on bad files in every way there is
        raise CommandError(
            f"{path}: not a file of weights, or damaged (read with weights_only=True): "
            f"{_gist(error)}"
        ) from error


def classes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """What a network of these weights is to be built with."""
    head = state.get("fc.weight")
    return {"num_classes": len(head)} if head is not None and head.dim() == 2 else {}


def fill(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load the tensors of the file ``path`` into a network; it must have all of them."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise CommandError(f"{path}: does not fit {name}: {why[:200]}") from error


def _gist(error: BaseException) -> str:
    """What is wrong: torch.load wraps the unpickler's own words in advice to be less careful."""
    cause = error.__context__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]


class NotThereError(Exception):
    """torchvision's weights are neither on this machine nor to be had from the network."""


def from_torchvision(name: str) -> tuple[nn.Module, str]:
    """The network with torchvision's best weights, and their name.

    Raises:
        NotThereError: with the reason.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    kept = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if kept.is_file():
        return from_file(name, kept), weights.name
    if (reason := no_answer(weights.url, PATIENCE)) is not None:
        raise NotThereError(f"{weights.url} does not answer: {reason}")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torch.hub has no timeout of its own
    try:
        torch.hub.download_url_to_file(weights.url, str(_made(kept)), _hash_prefix(kept))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise NotThereError(f"{weights.url}: {error}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return from_file(name, kept), weights.name


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _hash_prefix(path: Path) -> str:
    """torchvision's files carry the start of their SHA-256: name-0123abcd.pth."""
    return path.stem.rpartition("-")[2]


def no_answer(url: str, seconds: float) -> str | None:
    """Why ``url`` cannot be had, or None. Asked in a thread: looking up a name has no timeout."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answers.put(None)
        except urllib.error.URLError as error:
            answers.put(str(error.reason))
        except (OSError, http.client.HTTPException) as error:
            answers.put(str(error) or type(error).__name__)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return f"nothing within {seconds:.0f} s"


def seeded(model: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """An untrained network whose activations are like a trained one's, in place.

    Weights come from ``seed``. BatchNorm's affine parameters vary from channel to channel, and its
    statistics are those of ``images``, so every layer sees values of order one.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                fan_in = m.weight[0].numel()
                m.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if m.bias is not None:
                    m.bias.zero_()
        for bn in norms:
            bn.weight.uniform_(0.5, 1.5, generator=generator)
            bn.bias.normal_(0, 0.2, generator=generator)
            bn.reset_running_stats()
            bn.momentum = None  # the mean over all batches
        model.train()
        for batch in images.chunk(-(-len(images) // 16)):
            model(batch)
    for bn in norms:
        bn.momentum = 0.1
    return model.eval()
