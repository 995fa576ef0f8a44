"""Which way a call goes that can go several, by what was measured for its facts.

Such a call is a :class:`Site`: a fused module's, or that of one of its convolutions, or of a frozen
layer. Every way gives the same result within the rule for errors; torch's own is one of them. What
was measured is in a :class:`~fused_resnet.tune_cache.Cache`; what was not goes the untuned way, or,
where :func:`use_tuning` says so, is measured first.
"""

import contextlib
import copy
import functools
import os
import statistics
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import engines, measure, vendor
from .conditions import as_torch
from .tune_cache import Cache, Entry, environment

#: The way of torch's own modules.
EAGER = "eager"

#: Each way is timed five times, in turn with the others, and short calls are repeated. All run on
#: torch's own threads, which need no pause.
PACE = measure.Pace(0, least_rounds=5, most_rounds=5, sample_seconds=0.002, pause_seconds=0)

#: How much faster than the untuned way another must be, in the median, to be taken. In all rounds
#: but one it must be faster at all.
MARGIN = 1.03


def _switch(text: str) -> bool:
    if text not in ("", "0", "1"):
        raise ValueError(f"FUSED_RESNET_TUNE must be 0 or 1, got {text!r}")
    return text == "1"


_DEFAULT = _switch(os.environ.get("FUSED_RESNET_TUNE", ""))
_on: ContextVar[bool] = ContextVar("fused_resnet_tuning", default=_DEFAULT)


@contextlib.contextmanager
def use_tuning(on: bool = True) -> Iterator[None]:
    """Measure inside the ``with`` what is called for the first time, in this thread or task.

    Under the engine ``"auto"``, a fused module that meets new shapes times its ways and keeps the
    fastest for this process and later ones, see :func:`fused_resnet.tune`; ``freeze`` takes from
    there what an earlier one measured. The environment variable ``FUSED_RESNET_TUNE=1`` switches it
    on for a whole process. Nothing is measured under ``torch.compile`` and ``torch.export``, nor
    while a CUDA graph is captured, nor where processes train together by ``SyncBatchNorm``.

    Args:
        on: whether to; ``False`` switches off what is on outside.
    """
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def is_on() -> bool:
    """What the innermost :func:`use_tuning` says, else ``FUSED_RESNET_TUNE``."""
    return _on.get()


def asked(tuned: Any) -> bool:
    """Whether a call goes by what was measured; ``tuned``: whether its module was tuned."""
    if torch.compiler.is_compiling():
        return False
    return (bool(tuned) or _on.get()) and engines.wish() == "auto"


@dataclass(frozen=True)
class Site:
    """A call that can go several ways.

    Attributes:
        facts: all that the choice depends on; as text, the key of what is kept.
        modules: what is called.
        inputs: what with; the first is a tensor.
        ways: by name, the untuned one first.
        call: takes a way, modules and inputs as above, and calls them; ``EAGER`` is one it knows.
        times: by way, how many times the error it may have, see :func:`measure.within`; else once.
    """

    facts: Hashable
    modules: tuple[nn.Module, ...]
    inputs: tuple[Tensor | None, ...]
    ways: Sequence[str]
    call: Callable[[str, Sequence[nn.Module], Sequence[Tensor | None]], Any]
    times: Mapping[str, float] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.inputs[0]  # type: ignore[return-value]


@contextlib.contextmanager
def going(way: str) -> Iterator[None]:
    """Run fused modules inside the ``with`` that way: on an engine, or as torch has them."""
    if way != EAGER:
        with engines.wishing(way):
            yield
        return
    token = as_torch.set(True)
    try:
        yield
    finally:
        as_torch.reset(token)


class _Table(NamedTuple):
    cache: Cache
    ways: dict[Hashable, str]  #: what the cache says, by facts; "" where it says nothing


_tables: dict[tuple[Any, ...], _Table] = {}
_making = threading.Lock()
#: So many facts are remembered without looking at the cache: of networks for images of any size.
_MANY = 10_000


def _table(device: torch.device) -> _Table:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = (device.type, device.index, threads)
    if key not in _tables:
        with _making:
            if key not in _tables:
                cache = Cache(environment(device))
                cache.read()
                _tables[key] = _Table(cache, {})
    return _tables[key]


def path(device: torch.device) -> Any:
    """The file of what is measured on a device."""
    return _table(device).cache.path


class Seen(NamedTuple):
    """What was asked for while a model ran."""

    entries: dict[Any, Entry]  #: by facts
    ways: dict[nn.Module, str]  #: of fused modules and, within those, of convolutions


#: Where it is not None, it is added to.
seen: ContextVar[Seen | None] = ContextVar("fused_resnet_seen", default=None)


def known(facts: Hashable, device: torch.device) -> str | None:
    """The way for some facts, "auto" for those of nothing measured; None: :func:`resolve` tells."""
    if seen.get() is not None:
        return None
    way = _table(device).ways.get(facts)
    return way or (None if way is None or _on.get() else "auto")


def resolve(site: Site) -> str:
    """The way ``site`` goes: as measured, now where it is to be, and else the untuned one."""
    ways = _table(site.x.device).ways
    entry = kept(site)
    if len(ways) >= _MANY:
        ways.clear()
    way = "auto" if entry is None else entry.way
    # A with around each convolution would cost a small network a few per cent.
    ways[site.facts] = "" if entry is None else "auto" if way == site.ways[0] else way
    if (notes := seen.get()) is not None:
        notes.ways[site.modules[0]] = way
    return way


def kept(site: Site) -> Entry | None:
    """What was measured of a site, in this process or another; if tuning is on, it is now."""
    cache = _table(site.x.device).cache
    key = str(site.facts)
    entry = cache.entries.get(key)
    if entry is None and _on.get() and _measurable(site):
        with cache.lock():
            cache.read()  # another process may have been here
            entry = cache.entries.get(key)
            if entry is None and (entry := race(site)) is not None:
                cache.add(key, entry)
    if entry is None or entry.way not in site.ways:
        return None
    if (notes := seen.get()) is not None:
        notes.entries[site.facts] = entry
    return entry


def _measurable(site: Site) -> bool:
    """Whether a measurement would see what it is for, and nobody would see the measurement."""
    plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in site.inputs)
    capturing = site.x.is_cuda and torch.cuda.is_current_stream_capturing()
    watched = torch._C._len_torch_dispatch_stack() or nn_module._has_any_global_hook()
    several = len(site.ways) > 1
    return several and plain and site.x.numel() > 0 and not capturing and not watched


@contextlib.contextmanager
def undisturbed(outer: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Calls inside the ``with`` leave no trace in buffers, generators, or what watches autograd."""
    modules = list({m: None for each in outer for m in each.modules()})
    own = [m._buffers for m in modules]
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        copies: dict[Tensor, Tensor] = {}
        for m in modules:
            m._buffers = {name: _clone(t, copies) for name, t in m._buffers.items()}
        try:
            yield
        finally:
            for m, buffers in zip(modules, own, strict=True):
                m._buffers = buffers


def _clone(t: Tensor | None, copies: dict[Tensor, Tensor]) -> Tensor | None:
    if t is not None and t not in copies:
        copies[t] = t.detach().clone(memory_format=torch.preserve_format)
    return None if t is None else copies[t]


Tensors = Sequence[Tensor | None]


class Attempt:
    """A way of a site, with all that backward would compute where a gradient is needed."""

    def __init__(self, site: Site, way: str, modules: Sequence[nn.Module], inputs: Tensors) -> None:
        self.site, self.way, self.modules = site, way, modules
        self.inputs = [None if t is None else _apart(t) for t in inputs]
        self.wanted = [t for t in self.inputs if t is not None and t.requires_grad]
        self.wanted += [p for m in modules for p in m.parameters() if p.requires_grad]
        self.gradients: list[Tensor] | None = None

    def __call__(self) -> tuple[Tensors, Tensors]:
        """The outputs, and the gradients."""
        roots = measure.floating(self.site.call(self.way, self.modules, self.inputs))
        outputs = [t.detach() for t in roots]
        roots = [t for t in roots if t.requires_grad]
        if not roots or not torch.is_grad_enabled():
            return outputs, []
        if self.gradients is None:
            self.gradients = [_random(t) for t in roots]
        found = torch.autograd.grad(roots, self.wanted, self.gradients, allow_unused=True)
        return outputs, found

    def once(self) -> tuple[Tensors, Tensors]:
        """The same, from the same random numbers every time."""
        torch.default_generator.manual_seed(0)
        if self.site.x.is_cuda:
            torch.cuda.default_generators[self.site.x.device.index].manual_seed(0)
        return self()


def _apart(t: Tensor) -> Tensor:
    own = t.detach().clone(memory_format=torch.preserve_format)
    return own.requires_grad_(t.requires_grad)


def _random(like: Tensor) -> Tensor:
    """A gradient of a tensor, the same in every type."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return torch.empty_like(like, requires_grad=False).copy_(values)


def _error(found: Tensors, truth: Tensors) -> measure.Error:
    """The mean and the maximum over all tensors, each relative to its own largest value."""
    total, largest, count = 0.0, 0.0, 0
    for t, exact in zip(found, truth, strict=True):
        if exact is None or not exact.numel():
            continue
        if t is None or t.shape != exact.shape:
            return measure.Error(torch.nan, torch.nan)
        error = measure.error_of(t, exact)
        total += error.mean * exact.numel()
        largest = max(largest, error.max)
        count += exact.numel()
    return measure.Error(total / max(count, 1), largest)


#: A ReLU's input that is zero but for rounding tips over by chance, and a single one may change
#: gradients by more than all other rounding. So a way whose gradients are outside the rule on the
#: example is tried on its mirror images: along these dimensions.
_MIRRORED = ((), (-1,), (-2,))


class _Reference(NamedTuple):
    """What a site's ways are compared with."""

    inputs: Tensors
    truth: tuple[Tensors, Tensors]  #: outputs and gradients in float64
    eager: tuple[measure.Error, ...]  #: of both, by torch's own way


def _reference(site: Site, mirrored: tuple[int, ...]) -> _Reference:
    inputs = [None if t is None else _mirror(t, mirrored) for t in site.inputs]
    with torch.autocast(site.x.device.type, enabled=False):
        exact = [copy.deepcopy(m).double() for m in site.modules]
        double = [None if t is None else t.double().requires_grad_(t.requires_grad) for t in inputs]
        truth = Attempt(site, EAGER, exact, double).once()
    found = Attempt(site, EAGER, site.modules, inputs).once()
    for t in (t for tensors in (*truth, *found) for t in tensors if t is not None):
        if not t.isfinite().all():
            raise ValueError("nothing can be compared with what is not finite")
    return _Reference(inputs, truth, tuple(map(_error, found, truth)))


def _mirror(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    own = torch.empty_like(t, requires_grad=False).copy_(t.detach().flip(dims))
    return own.requires_grad_(t.requires_grad)


def _unfit(site: Site, way: str, reference: Callable[[tuple[int, ...]], _Reference]) -> str | None:
    """Why a way must not be taken, or None."""
    for mirrored in _MIRRORED:
        inputs, truth, eager = reference(mirrored)
        attempt = Attempt(site, way, site.modules, inputs)
        found = attempt.once()
        if vendor.must_be_deterministic() and not _same(found, attempt.once()):
            return "two runs differ, and algorithms are to be deterministic"
        outputs, gradients = (
            measure.within(_error(*each), by_torch, site.times.get(way, 1.0))
            for *each, by_torch in zip(found, truth, eager, strict=True)
        )
        if not outputs:
            break
        if gradients:
            return None
    return "its error is outside the rule"


def _same(one: tuple[Tensors, Tensors], other: tuple[Tensors, Tensors]) -> bool:
    pairs = zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def race(site: Site) -> Entry | None:
    """Time the ways that are right, in turn; None where there are none.

    Nor where torch's own cannot be run in float64, or its results are not finite: the call itself
    tells what is wrong, if anything is.
    """
    reference = functools.cache(functools.partial(_reference, site))
    attempts, failed = {}, {}
    with undisturbed(site.modules, site.x.device):
        try:
            reference(())
        except Exception:  # libraries raise what they like
            return None
        for way in site.ways:
            try:
                reason = _unfit(site, way, reference)
            except Exception as error:  # compilers, too
                reason = f"{type(error).__name__}: {error}"
            if reason is None:
                attempts[way] = Attempt(site, way, site.modules, site.inputs)
            else:
                failed[way] = reason
        if not attempts:
            return None
        reference.cache_clear()
        clock = measure.clock_in_sequence(site.x.device.type)
        samples = measure.interleave(attempts, PACE, seconds=clock)  # type: ignore[arg-type]
    medians = {way: statistics.median(taken) for way, taken in samples.items()}
    return Entry(fastest(samples), medians, failed)


def fastest(samples: dict[str, list[float]]) -> str:
    """The way to take: the first, unless another is faster beyond the noise."""
    first, *others = samples
    best, gain = first, MARGIN
    for way in others:
        ratio = measure.Spread.of(
            [a / b for a, b in zip(samples[first], samples[way], strict=True)]
        )
        if ratio.low > 1 and ratio.median > gain:
            best, gain = way, ratio.median
    return best
