"""The one way a kernel is launched, and what can be known of a launch without a GPU.

A kernel's parameters come in a fixed order: the tensors it reads, those it writes, plain numbers,
then constexprs by name. So each launch says what it reads and writes, and on tensors of the meta
device, or fake ones, it says nothing else: ``recording`` counts launches and bytes there, and
``aot`` compiles what it is told ahead of time.
"""

import contextlib
import contextvars
import functools
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor

#: Whether kernels are interpreted, on CPU tensors: TRITON_INTERPRET=1 when triton was imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: Compute capability that kernels are planned for where there is no GPU to ask.
planned_arch = 90

#: The index of the config to take, of each kernel's, instead of the one picked. For tests.
forced_config: int | None = None
if _forced := os.environ.get("FUSED_RESNET_TRITON_CONFIG"):
    forced_config = int(_forced)

#: Of every kernel: a multiplication and an addition are one instruction, rounded once.
OPTIONS = {"enable_fp_fusion": True}

# Triton's launcher is not safe against two threads compiling, its interpreter not against two.
_LOCK = threading.Lock()

#: What Triton compiled, by all that it looks at in a launch: its own search takes several times as
#: long. With the arguments behind the numbers. Emptied when full, which shapes that never end do.
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_MOST_COMPILED = 4096


class Launch(NamedTuple):
    """What one launch is."""

    kernel: Any
    grid: tuple[int, ...]
    reads: tuple[Any, ...]  # tensors, None, tuples of tensors
    writes: tuple[Any, ...]
    numbers: tuple[Any, ...]
    meta: dict[str, Any]  # constexprs, num_warps and num_stages
    finalizes: bool  # it handles what other launches have reduced: no tensor of a layer's size

    def bytes(self) -> int:
        """How many are moved if every tensor is read or written once."""
        return sum(t.numel() * t.element_size() for t in tensors_in((self.reads, self.writes)))


_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches inside the ``with``, of all threads."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def tensors_in(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, tuple):
        for each in nest:
            yield from tensors_in(each)


def launch(
    kernel: Any,
    grid: Sequence[int],
    reads: Sequence[Any],
    writes: Sequence[Any],
    numbers: Sequence[Any] = (),
    *,
    finalizes: bool = False,
    **meta: Any,
) -> None:
    """Run ``kernel(*reads, *writes, *numbers, **meta)`` on the device of what it writes.

    Args:
        grid: programs in each dimension; nothing happens if one is zero.
        reads, writes: tensors, None for those left out, tuples of tensors.
        numbers: integers.
        finalizes: see :class:`Launch`.
        meta: constexprs, ``num_warps`` and ``num_stages``.
    """
    if 0 in grid:
        return
    if _recorders:
        this = Launch(
            kernel, tuple(grid), tuple(reads), tuple(writes), tuple(numbers), meta, finalizes
        )
        for launches in _recorders:
            launches.append(this)
    first = next(tensors_in(tuple(writes)))
    if first.is_meta or isinstance(first, FakeTensor):
        return
    device = first.get_device()
    args = (kernel, grid, (*reads, *writes), numbers, meta, device)
    if device < 0 or device == torch.cuda.current_device():
        _run(*args)
    else:
        with torch.cuda.device(device):
            _run(*args)


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _run_with_memory(*args: Any) -> None:
    triton.set_allocator(_memory)
    _enqueue(*args)


def _run(*args: Any) -> None:
    """On the current device."""
    if args[4].get("DESCRIPTORS"):  # which a kernel makes in memory that Triton asks us for
        contextvars.copy_context().run(_run_with_memory, *args)
    else:
        _enqueue(*args)


def _kind(argument: Any) -> Any:
    """What Triton compiles a pointer for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else argument


def _enqueue(
    kernel: Any,
    grid: Sequence[int],
    pointers: tuple[Any, ...],
    numbers: Sequence[Any],
    meta: dict[str, Any],
    device: int,
) -> None:
    kinds = tuple([each if each is None else _kind(each) for each in pointers])
    key = (id(kernel), device, kinds, tuple(numbers), *meta, *meta.values())
    if (found := _compiled.get(key)) is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*pointers, *numbers, *constants)
        return
    with _LOCK:
        compiled = kernel[tuple(grid)](*pointers, *numbers, **meta, **OPTIONS)
        if compiled is not None:  # not interpreted
            if len(_compiled) == _MOST_COMPILED:
                _compiled.clear()
            names = kernel.arg_names[len(pointers) + len(numbers) :]
            _compiled[key] = compiled, tuple(meta[name] for name in names)


def arch(x: Tensor) -> int:
    """The compute capability kernels for ``x`` are planned for: 90 for 9.0."""
    if not x.is_cuda or isinstance(x, FakeTensor):
        return planned_arch
    return _arch_of(x.get_device())


@functools.cache
def _arch_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Triton's own of these two, which kernels can call too, take microseconds.
def cdiv(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below a positive ``n``."""
    return 1 << (n - 1).bit_length()


Config = TypeVar("Config")


def chosen(configs: Sequence[Config], picked: int) -> Config:
    """``configs[picked]``, or the one that is forced."""
    index = picked if forced_config is None else min(forced_config, len(configs) - 1)
    return configs[index]


def bits(number: float) -> int:
    """The bits of a double, to pass one: a float would arrive in fp32. See ``tiles.double``."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
