"""Kernels launched and bytes moved by a network, counted on fake tensors: no GPU, nothing computed.

Eager torch is counted by a table of what it launches on CUDA for each of its ops. An op of ours is
one launch, which reads every tensor it is given and writes what it returns or changes; one of the
Triton engine is what its ``launch`` says. Each tensor counts whole, once a launch.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import training
from bench.cases import DTYPES
from fused_resnet import checkpoints, engines, fuse

EAGER = "eager"
#: The variants: eager, and ours on every engine; "vendor" is what "auto" takes on a GPU, untuned.
ENGINES = ("vendor", "native", "triton")


class Launch(NamedTuple):
    """One kernel, and the tensors it reads and writes; one that is read twice is there twice."""

    name: str
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    finalizes: bool = False  #: what other launches have reduced

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, (*self.reads, *self.writes)))


def _bytes(t: Tensor) -> int:
    """What is in memory: expanded dimensions are there once."""
    count = t.element_size() if t.numel() else 0
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else 1
    return count


# --- What torch launches for its ops on CUDA. ---

#: These allocate or ask, and compute nothing.
_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "device")
#: These write all of what they return or change, without a look at what was there.
_FILLS = ("zeros", "new_zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
_OVERWRITES = ("copy_", "zero_", "fill_")


def _batch_norm(name: str, args: Sequence[Any], out: Any) -> list[Launch]:
    """In training x is read for its statistics, and again to be normalised."""
    x, weight, bias, mean, var, training, *_ = args
    vectors = [t for t in (weight, bias, mean, var) if t is not None]
    if not training:
        return [Launch(name, [x, *vectors], [out[0]])]
    return [Launch(name, [x, x, *vectors], [*out, *(t for t in (mean, var) if t is not None)])]


def _batch_norm_backward(name: str, args: Sequence[Any], out: Any) -> list[Launch]:
    """The gradient and x are read for two sums, and again."""
    grad, x, *rest = args
    vectors = [t for t in rest if isinstance(t, Tensor)]
    return [Launch(name, [grad, grad, x, x, *vectors], [t for t in out if t is not None])]


def _convolution_backward(name: str, args: Sequence[Any], out: Any) -> list[Launch]:
    grad, x, weight, *_ = args
    of = ((weight, "dgrad"), (x, "wgrad"), (None, "bias"))
    return [
        Launch(f"{name} {what}", [grad] if other is None else [grad, other], [made])
        for (other, what), made in zip(of, out, strict=True)
        if made is not None
    ]


def _max_pool_backward(name: str, args: Sequence[Any], out: Any) -> list[Launch]:
    """From the indices: the pooling's input is an argument that only tells the shape."""
    return [Launch(name, [args[0], args[-1]], [out])]


_TABLE: dict[str, Callable[[str, Sequence[Any], Any], list[Launch]]] = {
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "convolution_backward": _convolution_backward,
    "max_pool2d_with_indices_backward": _max_pool_backward,
}


def launches_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Launch]:
    """What an op launches for these arguments, having returned ``out``."""
    name = func._schema.name.split("::")[1]
    if name in _NOTHING or torch.Tag.inplace_view in func.tags:
        return []
    if name in _TABLE:
        return _TABLE[name](name, args, out)
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata for t in given}
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    fresh = [t for t in made if t.untyped_storage()._cdata not in storages]
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.is_write
    ]
    written = [t for t in tree_leaves(changed) if isinstance(t, Tensor)]
    if not fresh and not written:
        return []  # a view, or nothing to do
    reads = [] if name in _FILLS else given
    if name in _OVERWRITES:
        reads = given[1:]
    return [Launch(name, reads, [*written, *fresh])]


# --- Counting. ---


class Count(TorchDispatchMode):
    """Collects the launches of what is called inside the ``with``, in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fused_resnet_triton":
            return self._triton(func, args, kwargs)
        out = func(*args, **kwargs)
        self.launches += launches_of(func, args, kwargs, out)
        return out

    def _triton(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The engine's own function, which launches nothing on fake tensors, and says so."""
        from fused_resnet.triton_kernels import launch, ops

        op = func._schema.name.split("::")[1]
        with self, launch.recording() as made:
            out = ops.IMPLEMENTATIONS[op](*args, **kwargs)
        for each in made:
            reads, writes = (
                [t for t in tree_leaves(part) if isinstance(t, Tensor)]
                for part in (each.reads, each.writes)
            )
            self.launches.append(Launch(op, reads, writes, each.finalizes))
        return out


class Tally(NamedTuple):
    """What a network launches and moves in one call."""

    large: int  #: launches that touch an activation
    small: int  #: the others: vectors of channels, weights, the loss
    bytes: int
    kernels: dict[str, int]  #: the large ones by name


def tally(launches: Iterable[Launch], batch: int, weights: set[torch.Size]) -> Tally:
    """An activation is a 4-D tensor of ``batch`` images that has not the shape of a weight."""

    def touches(launch: Launch) -> bool:
        tensors = (*launch.reads, *launch.writes)
        return not launch.finalizes and any(
            t.dim() == 4 and t.size(0) == batch and t.shape not in weights for t in tensors
        )

    launches = list(launches)
    large = [launch for launch in launches if touches(launch)]
    names = Counter(launch.name for launch in large)
    moved = sum(launch.bytes for launch in launches)
    return Tally(len(large), len(launches) - len(large), moved, dict(names.most_common()))


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """A network in channels_last, made so that fake tensors bear it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = checkpoints.build(name)
    finally:
        torch.set_default_dtype(before)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight = nn.Parameter(m.weight.detach().contiguous(memory_format=torch.channels_last))
    return model


def count(name: str, variant: str, train: bool, dtype: torch.dtype, batch: int, size: int) -> Tally:
    """A training step (half types by autocast) or an inference in ``dtype``, in channels_last."""
    ours = variant != EAGER
    engine = engines.use_engine(variant) if ours else contextlib.nullcontext()
    with FakeTensorMode(), engine:
        model = network(name, torch.float32 if train else dtype).train(train)
        weights = {p.shape for p in model.parameters()}
        if ours:
            fuse(model)
        x = torch.empty(batch, 3, size, size, dtype=torch.float32 if train else dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        with Count() as counted, torch.set_grad_enabled(train):
            if train:
                training.step(model, x, dtype)
            else:
                model(x)
        return tally(counted.launches, batch, weights)


def run(names: Iterable[str], dtypes: Iterable[str], batch: int, size: int) -> list[dict[str, Any]]:
    """A row for every network, dtype, task and variant that can be counted here."""
    rows: list[dict[str, Any]] = []
    for name, dtype, train in itertools.product(names, dtypes, (False, True)):
        eager = None
        for variant in (EAGER, *ENGINES):
            task = "training step" if train else "inference"
            row = {"network": name, "dtype": dtype, "task": task, "batch": batch}
            row["variant"] = variant
            why_not = None if variant == EAGER else engines.unavailable(variant)
            if why_not is None:
                try:
                    found = count(name, variant, train, DTYPES[dtype], batch, size)
                except engines.EngineError as error:  # it lacks an op
                    why_not = str(error)
            if why_not is None:
                eager = eager or found
                ratios = {"of_eager": {"bytes": found.bytes / eager.bytes}}
                ratios["of_eager"]["large"] = found.large / eager.large
                row |= found._asdict() | ratios
            rows.append({**row, "why_not": why_not})
    return rows
