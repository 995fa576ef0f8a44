"""``freeze`` in 8 bits: which activations go on as bytes, and what the bytes stand for."""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .blocks import Fused, Stem
from .convert import joined
from .frozen_conv import FrozenConv
from .graph_units import FusedGraph
from .int8 import Grid, Int8Conv
from .measure import error_of_all, floating, likeliest_shared

#: Bytes multiplied in one step: a convolution of fewer channels a group stays in float32. It is a
#: network's first, whose image would lose more by rounding than it gains in time, or one of groups
#: so narrow that most of what is multiplied would be zeros.
_LEAST_CHANNELS = 4

#: Classes that are compared to tell whether an image is taken for what float32 takes it for.
_LIKELIEST = 5

#: Where a layer reads: its path, and whether as what it convolves or as what it adds.
_Slot = tuple[str, str]


def batches_of(calibration: Iterable[Any] | None, inputs: int) -> list[Any]:
    """The inputs of each batch; of what else a loader yields, such as labels, nothing.

    Raises:
        TypeError: ``calibration`` cannot be iterated, or a batch is no tensor and holds too few.
        ValueError: it has no batch, or a value that is not finite.
    """
    if calibration is None:
        raise TypeError(
            "freeze: calibration must be given for dtype torch.int8, an iterable of inputs like "
            "those to come, got None"
        )
    try:
        batches = [*calibration]
    except TypeError as error:
        raise TypeError(
            f"freeze: calibration must be an iterable of inputs, got {type(calibration).__name__}"
        ) from error
    if not any(t.numel() for t in tree_leaves(batches) if isinstance(t, Tensor)):
        raise ValueError("freeze: calibration must hold at least one batch of images, got none")
    return [_inputs(i, batch, inputs) for i, batch in enumerate(batches)]


def _inputs(index: int, batch: Any, inputs: int) -> tuple[Any, ...]:
    several = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    given = several[:inputs]
    if len(given) < inputs or not all(isinstance(t, Tensor) for t in given[:1]):
        raise TypeError(
            "freeze: calibration must yield tensors, or tuples that begin with the "
            f"{inputs} inputs that example has, got {type(batch).__name__} as number {index}"
        )
    if not all(torch.isfinite(t).all() for t in floating(given)):
        raise ValueError(
            f"freeze: calibration must be finite, batch number {index} has NaN or infinity"
        )
    return given


def to_int8(frozen: Any, batches: list[tuple[Any, ...]]) -> dict[str, float]:
    """Put the layers of a frozen model of float32 that can be into 8 bits.

    A layer's ranges are the least and the largest values over ``batches``. What a layer makes goes
    on as bytes where all that reads it are such layers, and nothing but code of ours, or torch's
    Sequential, lies between; elsewhere it is float32.

    Returns:
        How far the outputs on ``batches`` are from those of float32: ``mean`` and ``max``, relative
        to the largest output, and, where there is one output of more than five classes, ``top5``,
        the share of the five likeliest that both have.
    """
    model = frozen.model
    layers = {path: m for path, m in model.named_modules() if type(m) is FrozenConv and _suits(m)}
    flow = _Flow()
    with _watching(model, flow.begins, flow.ends), flow:
        flow.sees(frozen(*batches[0]))
    ranges = _Ranges()
    with _watching(model, ranges.begins, ranges.ends):
        exact = [frozen(*batch) for batch in batches]
    stems = stems_of(model)
    makers = {*layers, *(joined(path, "maxpool") for path in stems)}
    grids = {
        site: Grid.of(*ranges.found[site])
        for site, slots in flow.readers.items()
        if site in makers and flow.stays_inside(site, slots, layers, model)
    }

    def grid_of(slot: _Slot) -> Grid | None:
        return next((grids[site] for site in flow.sources[slot] if site in grids), None)

    for path, layer in layers.items():
        if path not in ranges.found:  # nobody calls it
            continue
        x = grid_of((path, "x")) or Grid.of(*ranges.found[joined(path, "x")])
        parent, _, name = path.rpartition(".")
        rounded = Int8Conv.rounded(layer, x, grid_of((path, "residual")), grids.get(path))
        model.get_submodule(parent)._modules[name] = rounded
    for path, m in stems.items():
        m.grid = grids.get(joined(path, "maxpool"))
    return _agreement(exact, [frozen(*batch) for batch in batches])


def _suits(layer: FrozenConv) -> bool:
    weight, scale = layer.weight, layer.scale
    finite = all(torch.isfinite(t).all() for t in (weight, layer.shift, scale) if t is not None)
    most = (2**31 - 1) // (255 * 128)  # products that 32 bits can hold the sum of
    return finite and weight.size(1) >= _LEAST_CHANNELS and weight[0].numel() <= most


def stems_of(model: nn.Module) -> dict[str, Stem]:
    """By path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Stem)}


class _Seen:
    """In the place of a stem's grid: tells what it is given."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        self.tell = tell

    def quantize(self, x: Tensor) -> Tensor:
        self.tell(x)
        return x


@contextlib.contextmanager
def _watching(
    model: nn.Module,
    begins: Callable[[str, Tensor, Tensor | None], None],
    ends: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Tell what every frozen layer is given and makes, and what stems pass on."""
    hooks, stems = [], []
    for path, m in model.named_modules():
        if isinstance(m, FrozenConv):

            def before(m: Any, args: Any, path: str = path) -> None:
                x, residual = (*args, None, None)[:3:2]
                begins(path, x, residual)

            def after(m: Any, args: Any, y: Tensor, path: str = path) -> None:
                ends(path, y)

            hooks += [m.register_forward_pre_hook(before), m.register_forward_hook(after)]
        elif isinstance(m, Stem):

            def pooled(y: Tensor, path: str = joined(path, "maxpool")) -> None:
                ends(path, y)

            m.grid = _Seen(pooled)
            stems.append(m)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for m in stems:
            m.grid = None


class _Ranges:
    """The least and the largest value of what each layer is given, and of what it makes."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def begins(self, path: str, x: Tensor, residual: Tensor | None) -> None:
        self.ends(joined(path, "x"), x)

    def ends(self, path: str, y: Tensor) -> None:
        least, most = self.found.get(path, (math.inf, -math.inf))
        if y.numel():
            low, high = map(float, y.aminmax())
            least, most = min(least, low), max(most, high)
        self.found[path] = least, most


class _Flow(TorchDispatchMode):
    """Who reads what the layers of a model make, found by running it.

    Attributes:
        readers: by what makes it, the slots of layers that read it.
        sources: the other way round, None standing for all that makes no layer of ours.
        seen: what an operation of torch's, or the caller, reads as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, set[_Slot]] = defaultdict(set)
        self.sources: dict[_Slot, set[str | None]] = defaultdict(set)
        self.seen: set[str] = set()
        self._made: dict[int, str] = {}
        self._alive: list[Tensor] = []  # no other tensor is given the id of one
        self._inside = False

    def begins(self, path: str, x: Tensor, residual: Tensor | None) -> None:
        for name, t in (("x", x), ("residual", residual)):
            if t is not None:
                maker = self._made.get(id(t))
                self.sources[path, name].add(maker)
                if maker is not None:
                    self.readers[maker].add((path, name))
        self._inside = True

    def ends(self, path: str, y: Tensor) -> None:
        self._inside = False
        self._made[id(y)] = path
        self._alive.append(y)

    def sees(self, nest: Any) -> None:
        self.seen.update(self._made[id(t)] for t in tree_leaves(nest) if id(t) in self._made)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._inside:
            self.sees((args, kwargs))
        return func(*args, **(kwargs or {}))

    def stays_inside(
        self, site: str, slots: set[_Slot], layers: dict[str, FrozenConv], model: nn.Module
    ) -> bool:
        """Whether ``layers`` alone read what ``site`` makes, at every call, and nothing else."""
        return site not in self.seen and all(
            path in layers and self.sources[path, name] == {site} and _passes(model, site, path)
            for path, name in slots
        )


def _passes(model: nn.Module, maker: str, reader: str) -> bool:
    """Whether all modules that an activation comes through between two layers only pass it on."""
    above, below = maker.split(".")[:-1], reader.split(".")[:-1]
    alike = (a == b for a, b in zip(above, below, strict=False))
    depth = sum(itertools.takewhile(bool, alike))
    between = {".".join(way[:i]) for way in (above, below) for i in range(depth, len(way) + 1)}
    return all(_passes_on(model.get_submodule(path)) for path in between)


def _passes_on(m: nn.Module) -> bool:
    # A proved forward adds only what is of one type.
    ours = isinstance(m, Fused) and not isinstance(m, FusedGraph)
    return (ours or type(m) is nn.Sequential) and "forward" not in m.__dict__


def _agreement(exact: list[Any], got: list[Any]) -> dict[str, float]:
    truth, outputs = ([t for t in floating(nest) if t.numel()] for nest in (exact, got))
    if not truth:
        return {}
    found = error_of_all(outputs, truth)._asdict()
    if len(truth) == len(exact) and all(t.dim() == 2 and t.size(1) > _LIKELIEST for t in truth):
        each = zip(outputs, truth, strict=True)
        total = sum(len(b) * likeliest_shared(a, b, _LIKELIEST) for a, b in each)
        found["top5"] = total / sum(map(len, truth))
    return found
