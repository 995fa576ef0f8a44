"""How implementations are compared: correctness first, then time, every one of them in turn.

The core of ``fused-resnet demo`` and of ``python -m bench``. :func:`kept_bytes` counts memory.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: What is compared may have this many times eager torch's error at the same dtype, plus a floor.
MAX_FACTOR, MAX_FLOOR = 2.0, 1e-5
MEAN_FACTOR, MEAN_FLOOR = 1.5, 1e-6

EAGER, PEER, OURS = "eager", "peer", "ours"

#: Takes a call and how often to make it; returns the seconds one takes. See :func:`clock`.
Clock = Callable[[Callable[[], Any], int], float]


class Error(NamedTuple):
    """The error of an output against float64, relative to the largest value there."""

    mean: float
    max: float


def error_of(output: Tensor, truth: Tensor) -> Error:
    """The mean and the maximum of ``|output - truth| / max|truth|``."""
    error = (output.to(truth.device, torch.float64) - truth).abs() / (
        float(truth.abs().max()) or 1.0
    )
    return Error(float(error.mean()), float(error.max()))


def error_of_all(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> Error:
    """The same over several outputs, relative to the largest value of all."""
    largest = max((float(t.abs().max()) for t in truth if t.numel()), default=0.0) or 1.0
    pairs = zip(outputs, truth, strict=True)
    errors = [(a.double() - b.double()).abs().flatten() for a, b in pairs]
    every = torch.cat(errors) / largest if any(e.numel() for e in errors) else torch.zeros(1)
    return Error(float(every.mean()), float(every.max()))


def likeliest_shared(output: Tensor, truth: Tensor, count: int) -> float:
    """How many of the ``count`` likeliest classes are those of ``truth``, from 0 to 1."""
    found, best = (t.double().topk(count).indices for t in (output, truth))
    return float((found[:, :, None] == best[:, None]).any(2).double().mean())


def floating(nest: Any) -> list[Tensor]:
    """The tensors of floating point in what a module takes or returns."""
    return [t for t in tree_leaves(nest) if isinstance(t, Tensor) and t.is_floating_point()]


def within(error: Error, eager: Error, times: float = 1.0) -> bool:
    """Whether an error is acceptable beside eager torch's; NaN is not.

    ``times`` is how many times as much what was asked for may lose, such as Winograd's form.
    """
    return error.mean <= times * (MEAN_FACTOR * eager.mean + MEAN_FLOOR) and error.max <= times * (
        MAX_FACTOR * eager.max + MAX_FLOOR
    )


class Spread(NamedTuple):
    """The median of some samples, the quartiles around it, and the ends."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        several = samples if len(samples) > 1 else [*samples] * 2
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, low, high, min(samples), max(samples))


def _identity(x: Any) -> Any:
    return x


class Runner(NamedTuple):
    """Something that runs: only ``run`` is timed."""

    run: Callable[[Any], Any]
    feed: Callable[[Any], Any] = _identity  #: turns an input into what ``run`` takes
    read: Callable[[Any], Tensor] = _identity  #: turns what ``run`` returns into a tensor


@dataclass(frozen=True)
class Variant:
    """One of the implementations compared.

    Attributes:
        kind: ``EAGER``, what the others are compared with; ``PEER``, which may fail and is then
            named; ``OURS``, which is not timed unless it is correct.
        prepare: makes the runner; compilation belongs in here, its time is reported.
        times: see :func:`within`.
    """

    name: str
    kind: str
    prepare: Callable[[], Runner]
    times: float = 1.0


@dataclass
class Result:
    """What came of one variant."""

    variant: str
    kind: str
    prepare_seconds: float | None = None  #: until there is a first output, the cold start
    first_call_seconds: float | None = None  #: of these the first call, in which some compile
    error: Error | None = None
    within: bool = False
    samples: list[float] = field(default_factory=list)  #: seconds a call, one sample a round
    speedup: Spread | None = None  #: over the faster eager, round by round
    to_peer: Spread | None = None  #: over the fastest peer, round by round
    why_not: str | None = None  #: why there is no time
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> Spread | None:
        return Spread.of(self.samples) if self.samples else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: named fields, and None for what is not finite."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts = values.pop("facts")
        samples = values.pop("samples")
        return _plain({**values, **facts, "seconds": self.seconds, "samples": samples})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds until ``seconds`` are over, within limits."""

    seconds: float = 20.0
    least_rounds: int = 5
    most_rounds: int = 50
    sample_seconds: float = 0.1  #: shorter calls are repeated until a sample lasts this long
    pause_seconds: float = 0.005  #: so that the thread pool of whoever ran last goes to sleep


def measure(
    variants: Iterable[Variant],
    inputs: Sequence[Any],
    truth: Tensor,
    pace: Pace,
    tick: Callable[[str, float], None] = lambda what, part: None,
    inspect: Callable[[Tensor], dict[str, Any]] = lambda output: {},
    seconds: Clock | None = None,
    patience: float | None = None,
    watch: Callable[[Callable[[], Any]], dict[str, Any]] | None = None,
) -> list[Result]:
    """Compare variants of one computation.

    Args:
        variants: at least one of them eager; the larger error of eager ones sets that allowed, as
            torch's layouts differ in nothing but how they round.
        inputs: what is run to judge correctness; the first is what is timed.
        truth: the outputs for all ``inputs``, concatenated, in float64.
        pace: how long to measure.
        tick: called with what happens now and how much of the whole is done, from 0 to 1.
        inspect: makes further facts of a variant's outputs.
        seconds: a :func:`clock`, by default the CPU's.
        patience: for how many seconds a peer may prepare; after that it has failed.
        watch: makes further facts of a variant by calling it, when all are timed.

    Returns:
        A result for each variant, in their order.
    """
    if not torch.isfinite(truth).all():
        raise ValueError("the float64 reference is not finite")
    variants = list(variants)
    results: dict[str, Result] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        for i, v in enumerate(variants):
            tick(f"preparing {v.name}", 0.5 * i / len(variants))
            results[v.name] = result = Result(v.name, v.kind)
            try:
                with at_most(patience if v.kind == PEER else None, "not ready"):
                    runner, output = _prepare(v, inputs, result)
            except Exception as error:
                if v.kind != PEER:
                    raise
                result.why_not = (str(error) or type(error).__name__).splitlines()[0][:200]
                continue
            result.error = error_of(output, truth)
            result.facts = inspect(output)
            fed = runner.feed(inputs[0])
            calls[v.name] = functools.partial(runner.run, fed)
        _judge(results, calls, {v.name: v.times for v in variants})
        samples = interleave(calls, pace, lambda what, part: tick(what, 0.5 + 0.5 * part), seconds)
        for name, taken in samples.items():
            results[name].samples = taken
            results[name].facts |= watch(calls[name]) if watch is not None else {}
    _compare(list(results.values()))
    return list(results.values())


@contextlib.contextmanager
def at_most(
    seconds: float | None, what: str, kind: type[BaseException] = TimeoutError
) -> Iterator[None]:
    """Raise ``kind``, that ``what`` has not happened, inside the ``with`` after so many seconds.

    None: never. Main thread only.

    A compiler that runs away would otherwise take the time of everyone after it. One inside another
    ends with it.
    """
    if seconds is None:
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise kind(f"{what} within {seconds:.0f} s")

    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, left or seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            # Not 0, which would be never.
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3))


def _prepare(v: Variant, inputs: Sequence[Any], result: Result) -> tuple[Runner, Tensor]:
    start = time.perf_counter()
    runner = v.prepare()
    fed = runner.feed(inputs[0])
    called = time.perf_counter()
    first = runner.read(runner.run(fed))
    end = time.perf_counter()
    result.prepare_seconds, result.first_call_seconds = end - start, end - called
    rest = [runner.read(runner.run(runner.feed(x))) for x in inputs[1:]]
    return runner, torch.cat([first, *rest])


def _judge(
    results: dict[str, Result], calls: dict[str, Callable[[], Any]], times: dict[str, float]
) -> None:
    """Apply the rule; what is ours and outside it is not timed."""
    found = [r.error for r in results.values() if r.kind == EAGER and r.error is not None]
    eager = Error(max(e.mean for e in found), max(e.max for e in found))
    for result in results.values():
        if result.error is None:
            continue
        result.within = result.kind == EAGER or within(result.error, eager, times[result.variant])
        if result.kind == OURS and not result.within:
            result.why_not = "its error is outside the rule"
            del calls[result.variant]


def interleave(
    calls: dict[str, Callable[[], Any]],
    pace: Pace,
    tick: Callable[[str, float], None] = lambda what, part: None,
    seconds: Clock | None = None,
) -> dict[str, list[float]]:
    """Time calls in turn, round after round, so that a slow moment of the machine meets them all.

    ``seconds`` is a :func:`clock`, by default the CPU's.

    Returns:
        Per name, the seconds a call took in each round.
    """
    seconds = seconds or clock("cpu")
    repeats = {}
    for name, call in calls.items():
        once = seconds(call, 1)
        repeats[name] = max(1, math.ceil(pace.sample_seconds / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    for done in range(pace.most_rounds):
        elapsed = time.perf_counter() - start
        if done >= pace.least_rounds and elapsed >= pace.seconds:
            break
        least = elapsed / max(done, 1) * pace.least_rounds
        by_time = elapsed / max(pace.seconds, least, 1e-9)
        tick("measuring", min(max(by_time, done / pace.most_rounds), 1.0))
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(pace.pause_seconds)
            if repeats[name] > 1:
                calls[name]()  # brings its weights back to the caches
            samples[name].append(seconds(calls[name], repeats[name]))
    tick("measured", 1.0)
    return samples


def clock(device: str, cold: bool = False) -> Clock:
    """What times calls on a ``device`` type: given a call and how often, the seconds one takes.

    On a GPU by events on the current stream. ``cold``: with nothing of the last call's data in its
    second-level cache, as a kernel finds it inside a network; what empties the cache is not timed.
    """
    if device == "cuda":
        return _CudaClock(cold)
    return _seconds


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class _CudaClock:
    def __init__(self, cold: bool) -> None:
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        self.flush = torch.empty(2 * cache if cold else 0, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        # Apart only where the cache is emptied between: an event costs more than a small kernel.
        parts = [1] * repeats if self.flush.numel() else [repeats]
        spans = []
        for count in parts:
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3 / repeats


def clock_in_sequence(device: str) -> Clock:
    """:func:`clock` of calls in the middle of others, which a GPU runs while more are launched.

    What a call then costs is the longer of two: the host's time to launch it, the GPU's to run it.
    """
    return _in_sequence if device == "cuda" else _seconds


#: For so long a GPU is kept waiting, about a millisecond, while a call is launched.
_HELD_CYCLES = 2_000_000


def _in_sequence(call: Callable[[], Any], repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HELD_CYCLES)
        start.record()
        launching = _seconds(call, 1)
        end.record()
        torch.cuda.synchronize()
        total += max(launching, start.elapsed_time(end) / 1e3)
    return total / repeats


def _compare(results: list[Result]) -> None:
    """Ratios are taken within each round, then summed up: what slows a round slows both sides."""
    for kind in (EAGER, PEER):
        timed = [r for r in results if r.kind == kind and r.samples]
        if not timed:
            continue
        best = min(timed, key=lambda r: statistics.median(r.samples))
        for r in results:
            if r.samples:
                ratio = Spread.of([b / s for b, s in zip(best.samples, r.samples, strict=True)])
                if kind == EAGER:
                    r.speedup = ratio
                else:
                    r.to_peer = ratio


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward of ``model`` on ``x`` keeps for its backward.

    What autograd is given to keep (:class:`torch.autograd.graph.saved_tensors_hooks`), each storage
    once and whole, however many tensors look into it. Not counted is what is there anyway,
    parameters and buffers, nor a parameter cast to another dtype, which autocast makes for a
    convolution. ``x`` counts where it is kept. Under
    :class:`torch._subclasses.fake_tensor.FakeTensorMode` the count is the same, and nothing is
    computed.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}
    for p in model.parameters():
        dtypes.setdefault(tuple(sorted(p.shape)), set()).add(p.dtype)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        shape = tuple(sorted(t.shape))  # a cast may be transposed, too
        cast = shape in dtypes and t.dtype not in dtypes[shape]
        if storage._cdata not in own and not cast:
            kept[storage._cdata] = storage.nbytes()
        # Alive until all are counted, so that no address is used twice; t itself, which may have
        # its graph, would keep that alive for good.
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    total = sum(kept.values())
    del output
    return total


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` so that ``path`` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(path)
