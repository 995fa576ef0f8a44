"""``tune``: time the ways that parts of a model can go on an example, and keep the fastest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import engines, tuning
from .blocks import Fused
from .convert import check_model
from .freeze import Frozen, tune_layers
from .tune_cache import Entry


@dataclass(frozen=True)
class Choice:
    """What was measured of one part of a model, or of several alike."""

    op: str  #: the class of a fused module, or an op
    shape: tuple[int, ...]  #: of its input
    weight: tuple[int, ...]  #: of its first convolution
    entry: Entry

    def __str__(self) -> str:
        taken = self.entry.seconds
        times = ", ".join(f"{way} {1e3 * t:.3f}" for way, t in sorted(taken.items(), key=_by_time))
        where = f"{self.op} {_by(self.shape)} * {_by(self.weight)}"
        failed = "".join(f"; {way}: {why}" for way, why in self.entry.failed.items())
        return f"{where:<58}  {self.entry.way:<9}  ({times} ms{failed})"


def _by_time(item: tuple[str, float]) -> float:
    return item[1]


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


class Choices(list[Choice]):
    """The choices that a call of a model asks for; prints as a table.

    Attributes:
        path: the file they are kept in.
    """

    def __init__(self, choices: list[Choice], path: Path) -> None:
        super().__init__(choices)
        self.path = path

    def __str__(self) -> str:
        return "\n".join([*map(str, self), f"kept in {self.path}"])


def tune(model: nn.Module, example: Any) -> Choices:
    """Measure which way each part of a model is fastest, on an example of what it will see.

    The ways are the engines, and always torch's own modules: one that is faster than ours, in a
    block or in the whole network, is taken. All keep to the rule for errors on the example, at most
    twice torch's own error against float64 and 1.5 times in the mean, or they are out. Another than
    the untuned way is taken only where it is faster beyond the noise.

    A fused model in training mode is tuned for training, forward and backward together, else for
    inference. In training torch's modules keep twice the memory for backward; where ``memory`` is
    ``"lean"`` they are no way to go.

    The model runs several times and is not changed by it: neither buffers nor gradients, nor random
    generators. From now on its calls go by what was measured, of this and of earlier examples;
    calls of other sizes, and compiled programs, go as untuned ones. Under
    ``torch.use_deterministic_algorithms`` only what was measured under it counts. Of a frozen model
    each layer is moved to the engine it is fastest on.

    What was measured is kept in the user's cache folder, by device and versions, and not measured
    again; see also :func:`use_tuning`.

    Args:
        model: a model that :func:`fuse` or :func:`freeze` made.
        example: an input, or a tuple of inputs; run it under the autocast that will be in force.

    Returns:
        The choices, a list that prints as a table; ``report(model, engines=True)`` has them by
        layer.

    Raises:
        TypeError: ``model`` is not a module, or ``example`` holds no tensor.
        RuntimeError: ``model`` is neither fused nor frozen, is compiled, or there is a tracer or a
            CUDA graph being captured; an engine other than ``"auto"`` is asked for.
    """
    check_model("tune", model)
    inputs = example if isinstance(example, tuple) else (example,)
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(f"tune: example must hold a tensor, got {type(example).__name__}")
    device = tensors[0].device
    _check_moment(device)
    seen = tuning.Seen({}, {})
    token = tuning.seen.set(seen)
    try:
        with tuning.use_tuning():
            if isinstance(model, Frozen):
                with torch.no_grad():
                    tune_layers(model, inputs)
            elif any(isinstance(m, Fused) for m in model.modules()):
                with (
                    tuning.undisturbed([model], device),
                    torch.set_grad_enabled(model.training),
                ):
                    model(*inputs)
                _mark(model, seen)
            else:
                raise RuntimeError("tune: model must be fused or frozen; call fuse(model) first")
    finally:
        tuning.seen.reset(token)
    return Choices(list(_choices(seen)), tuning.path(device))


def _check_moment(device: torch.device) -> None:
    """Raise where nothing can be measured now."""
    if engines.wish() != "auto":
        raise RuntimeError(f'tune: the engine must be "auto", got {engines.wish()!r}')
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise RuntimeError("tune: not while a program is traced")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: not while a CUDA graph is captured")


def _mark(model: nn.Module, seen: tuning.Seen) -> None:
    """Have fused modules ask for what was measured, and know how the example went."""
    inherited: dict[str, str] = {}
    for path, m in model.named_modules():
        above = path.rpartition(".")[0] if path else None
        way = "auto" if above is None else inherited[above]
        if isinstance(m, Fused):
            way = seen.ways.get(m, "auto") if way == "auto" else way
            convs = [p.conv for p in m.pairs()]
            m.tuned = {c: seen.ways.get(m.get(c), "auto") if way == "auto" else way for c in convs}
        inherited[path] = way


def _choices(seen: tuning.Seen) -> Iterator[Choice]:
    for facts, entry in seen.entries.items():
        op = f"{facts.op} + residual" if facts.rest[-1:] == (True,) else facts.op
        yield Choice(op, tuple(facts.shape), tuple(facts.layers[0][0]), entry)
