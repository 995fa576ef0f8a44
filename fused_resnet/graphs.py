"""CUDA graphs: the kernels of a call, launched at once. A frozen model's, by shape of inputs."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import engines, measure, tuning, vendor
from .frozen_conv import FrozenConv

#: Calls before a capture: by then everything is compiled, tuned and allocated.
WARM_UP = 3
#: So many shapes are captured; each holds its inputs and all that is between them and the outputs.
MOST = 32
#: The two ways of a call.
KERNELS, GRAPH = "kernels", "graph"


class Recording:
    """A call's kernels, to be launched again on the same memory.

    Attributes:
        outputs: what the call returned; each :meth:`replay` writes there.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.outputs = call()
        self._done = torch.cuda.Event()

    def replay(self) -> None:
        self._graph.replay()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Between a turn that another stream has taken and the next."""
        self._done.wait()
        yield
        self._done.record()


class _Captured:
    """A model on inputs of one shape."""

    def __init__(self, run: Callable[..., Any], leaves: list[Any]) -> None:
        self._static = [_copy(t) for t in leaves]
        self._recording = Recording(functools.partial(run, self._static))

    def __call__(self, leaves: list[Any]) -> Any:
        with self._recording.in_turn():
            for own, given in zip(self._static, leaves, strict=True):
                if isinstance(given, Tensor):
                    own.copy_(given)
            self._recording.replay()
            return tree_map(_copy, self._recording.outputs)


def _copy(t: Any) -> Any:
    return t.clone(memory_format=torch.preserve_format) if isinstance(t, Tensor) else t


class Graphs:
    """Runs a frozen model, each shape of inputs as a CUDA graph where that is measured faster.

    A shape is captured and timed at its first call. Threads take turns on a shape's graph; what it
    returns is a copy, the caller's own.

    Attributes:
        ways: by shape, ``"graph"``, ``"kernels"`` where that is as fast, or why it must be.
    """

    def __init__(self) -> None:
        self.ways: dict[str, str] = {}
        self._captured: dict[str, _Captured | None] = {}
        self._changes = FrozenConv.changes
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()  # a copy of a model has memory of its own

    def run(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if not _possible(leaves):
            return model(*args, **kwargs)

        def call(leaves: list[Any]) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return model(*args, **kwargs)

        shape = ", ".join(map(_description, leaves))
        key = f"{shape} {spec} {_conditions()}"
        with self._lock, torch.cuda.device_of(leaves[0]):
            if self._changes != FrozenConv.changes:  # graphs read memory that may be gone
                self._captured.clear()
                self._changes = FrozenConv.changes
            if key not in self._captured and len(self._captured) < MOST:
                self._captured[key], self.ways[shape] = _attempt(model, call, leaves)
            if (captured := self._captured.get(key)) is not None:
                return captured(leaves)
        return call(leaves)


def _attempt(
    model: nn.Module, call: Callable[[list[Any]], Any], leaves: list[Any]
) -> tuple[_Captured | None, str]:
    """The capture, if it is to be used, and what to say about it."""
    for path, m in model.named_modules():
        if m._forward_hooks or m._forward_pre_hooks:
            return None, f"{path or 'the model'} has hooks, which a graph would not call"
    try:
        captured = _Captured(call, leaves)
    except RuntimeError as error:  # something waits for the GPU, or is not allowed in a capture
        return None, f"cannot be captured: {error}".splitlines()[0]
    ways = {KERNELS: lambda: call(leaves), GRAPH: lambda: captured(leaves)}
    samples = measure.interleave(ways, tuning.PACE, seconds=measure.clock_in_sequence("cuda"))
    way = tuning.fastest(samples)
    return captured if way == GRAPH else None, way


def _possible(leaves: list[Any]) -> bool:
    """Whether a graph would do what the call does."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    return (
        all(t.is_cuda and type(t) is Tensor and t.numel() for t in tensors)
        and isinstance(leaves[0], Tensor)
        and all(isinstance(t, (Tensor, int, float, str, type(None))) for t in leaves)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.cuda.is_current_stream_capturing()
    )


def _description(t: Any) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    return f"{'x'.join(map(str, t.shape))} of {t.dtype} with strides {t.stride()}"


def _conditions() -> Any:
    """What else decides which kernels run."""
    tf32 = engines.allows_tf32(), torch.backends.cuda.matmul.fp32_precision
    return engines.wish(), vendor.must_be_deterministic(), tf32
