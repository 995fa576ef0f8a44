"""The ways to run a network that everyone has with torch, and ours."""

import copy
import logging

import torch
from torch import Tensor, nn

from .convert import fuse
from .freeze import freeze
from .measure import EAGER, OURS, PEER, Runner, Variant
from .tune import tune
from .winograd import amplification

TUNED, FROZEN, WINOGRAD, INT8 = "fused tuned", "frozen", "frozen winograd", "frozen int8"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def _runner(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Runner:
    def feed(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=layout)

    return Runner(model, feed)


def _converted(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(dtype).to(memory_format=layout)


def eager(model: nn.Module, dtype: torch.dtype, layout: str) -> Variant:
    """The network as torchvision runs it, in the layout "NCHW" or "NHWC"."""
    order = LAYOUTS[layout]

    def prepare() -> Runner:
        converted = _converted(model, dtype, order)
        return _runner(converted, dtype, order)

    return Variant(f"eager {layout}", EAGER, prepare)


def compiled(model: nn.Module, dtype: torch.dtype, mode: str = "default") -> Variant:
    """torch.compile in one of its modes with inductor's freezing, its best for inference."""

    def prepare() -> Runner:
        # Inductor looks for a CUDA toolkit and logs that it has found no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        torch._dynamo.reset()
        program = torch.compile(
            copy.deepcopy(model).to(dtype), fullgraph=True, dynamic=False, mode=mode
        )
        started = False

        def run(x: Tensor) -> Tensor:
            nonlocal started
            if started:
                return program(x)
            started = True
            with torch._inductor.config.patch(freezing=True):
                return program(x)

        # Faster than contiguous input, or than weights in channels_last too: inductor packs those.
        # What is returned may be memory that the next call writes: it is copied to be read.
        return Runner(run, _runner(model, dtype, torch.channels_last).feed, Tensor.clone)

    return Variant("torch.compile" if mode == "default" else f"torch.compile {mode}", PEER, prepare)


def fused(model: nn.Module, dtype: torch.dtype) -> Variant:
    """``fuse``: the same parameters, in channels_last."""

    def prepare() -> Runner:
        converted = _converted(model, dtype, torch.channels_last)
        return _runner(fuse(converted), dtype, torch.channels_last)

    return Variant("fused", OURS, prepare)


def tuned(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Variant:
    """:func:`fused`, tuned on ``example``."""

    def prepare() -> Runner:
        converted = _converted(model, dtype, torch.channels_last)
        runner = _runner(fuse(converted), dtype, torch.channels_last)
        with torch.no_grad():
            tune(converted, runner.feed(example))
        return runner

    return Variant(TUNED, OURS, prepare)


def frozen(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Variant:
    """``freeze``, tuned on ``example``."""

    def prepare() -> Runner:
        return _runner(freeze(model, example=example, dtype=dtype), dtype, torch.channels_last)

    return Variant(FROZEN, OURS, prepare)


def winograd(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Variant:
    """:func:`frozen`, with convolutions in Winograd's form, whose errors may be larger."""

    def prepare() -> Runner:
        served = freeze(model, example=example, dtype=dtype, winograd=True)
        return _runner(served, dtype, torch.channels_last)

    return Variant(WINOGRAD, OURS, prepare, amplification(4))


def int8(model: nn.Module, example: Tensor, calibration: Tensor) -> Variant:
    """``freeze`` in 8 bits, of inputs in float32.

    Half of a 255th of a range is lost where float32 loses 2**-24 of a number.
    """

    def prepare() -> Runner:
        served = freeze(model, example=example, dtype=torch.int8, calibration=[calibration])
        return _runner(served, torch.float32, torch.channels_last)

    return Variant(INT8, OURS, prepare, 2.0**15)


def standard(model: nn.Module, dtype: torch.dtype, example: Tensor) -> list[Variant]:
    """All of the above but what is tuned, which takes its time."""
    return [
        eager(model, dtype, "NCHW"),
        eager(model, dtype, "NHWC"),
        compiled(model, dtype),
        fused(model, dtype),
        frozen(model, dtype, example),
    ]
