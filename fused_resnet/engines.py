"""Which implementation of an op runs: one pure function chooses, from facts and a wish.

========== ================================================================================
engine     what it is
========== ================================================================================
reference  plain torch, any floating dtype; the specification
native     our C++ kernels
triton     our Triton kernels
vendor     torch's own convolution with our kernels around it; elsewhere the same as native
========== ================================================================================

The ops of 8-bit inference (INT8_OPS), which :func:`fused_resnet.freeze` alone takes, are on
``reference`` and, on CPUs, on ``native``: elsewhere they have no kernels.

``auto``, the default, takes the safe choice for what is asked. Any other wish is met or raises.
What was measured to be faster is wished for, around a call: see :mod:`fused_resnet.tuning`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from . import native, reference, reference_chain, reference_int8, reference_training, vendor
from ._C import cpu_features

ENGINES = ("auto", "reference", "native", "triton", "vendor")
#: Those of inference, each a function of :mod:`fused_resnet.functional`.
INFERENCE_OPS = (
    "eltwise_act",
    "bn_scale_shift",
    "bn_act",
    "bn_act_maxpool",
    "global_avg_pool",
    "conv_bn_act",
)
#: Those that training is made of; :mod:`fused_resnet.autograd` calls them.
TRAINING_OPS = (
    "bn_stats",
    "bn_finalize",
    "bn_act_backward_reduce",
    "bn_act_backward",
    "bn_act_gram",
    "gram_moments",
    "gram_stats",
    "gram_gradients",
    "relu_backward_reduce",
    "bn_act_maxpool_train",
    "bn_act_maxpool_backward_reduce",
    "bn_act_maxpool_backward",
    "eltwise_act_backward",
    "conv_dgrad",
    "conv_wgrad",
)
OPS = INFERENCE_OPS + TRAINING_OPS
#: Those that a chain of convolutions is trained with where an engine has them, see :func:`fuses`.
CHAIN_OPS = (
    "bn_act_conv_stats",
    "bn_act_conv_bn_act",
    "bn_backward_conv_dgrad",
    "bn_backward_conv_wgrad",
    "bn_act_gram_backward",
    "relu_backward_conv_wgrad",
)
#: Those that pool what they convolve where an engine has them, see :func:`pools`.
POOL_OPS = ("conv_bn_act_maxpool", "conv_bn_act_avgpool")
#: Those of 8-bit inference, which CPUs alone have. In place of a dtype they are asked for float32.
INT8_OPS = ("quantize", "conv_int8")
#: Those that only frozen models call, where an engine has them.
FROZEN_OPS = ("conv_bn_act_winograd",)
ALL_OPS = OPS + CHAIN_OPS + POOL_OPS + INT8_OPS + FROZEN_OPS
# What torch has convolutions for, our kernels being around them.
_CONVOLUTIONS = ("conv_bn_act", "conv_dgrad", "conv_wgrad")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Whether this processor has units for matrices of bf16, which torch's convolution uses and ours
# does not. Without them ours is the faster, with the weight packed at every call: by 1.0 (batch 16)
# to 1.3 times (batch 1) where the processor multiplies pairs of bf16, by 3 times where it does not.
_HAS_MATRIX_UNITS = "amx-bf16" in cpu_features()


def registered(namespace: str, key: str) -> frozenset[str]:
    """The ops that a namespace implements for a dispatch key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in ALL_OPS if has(f"{namespace}::{op}", key))


class Library(NamedTuple):
    """Where the ops of an engine are, and which of them it has kernels for, by device type.

    Of Triton that is known once its package is imported, see :func:`unavailable`.
    """

    namespace: str
    kernels: dict[str, frozenset[str]]


_NATIVE = {device: registered("fused_resnet", device.upper()) for device in ("cpu", "cuda")}
LIBRARIES = {
    "native": Library("fused_resnet", _NATIVE),
    "vendor": Library("fused_resnet", _NATIVE),
    "triton": Library("fused_resnet_triton", {}),
}
#: Device types with whole_chain's ops.
_RUN_WHOLE = [
    device
    for device in _NATIVE
    if torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet::chain_forward", device.upper())
]


class EngineError(RuntimeError):
    """The engine asked for cannot run the op; the message says why."""


def _check_name(name: str) -> str:
    if name not in ENGINES and name not in LIBRARIES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return name


_DEFAULT = _check_name(os.environ.get("FUSED_RESNET_ENGINE") or "auto")
_wish: ContextVar[str] = ContextVar("fused_resnet_engine", default=_DEFAULT)


# torch.compile of 2.11 cannot read a ContextVar: there it reads, and guards, what was wished last.
_TRACES_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
_wished_last = _DEFAULT


def wish() -> str:
    """The engine asked for by the innermost :func:`use_engine`, else by ``FUSED_RESNET_ENGINE``."""
    if not _TRACES_CONTEXT and torch.compiler.is_compiling():
        return _wished_last
    return _wish.get()


@contextlib.contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` on the engine ``name``, in this thread or task.

    Args:
        name: ``"auto"``, ``"reference"``, ``"native"``, ``"triton"`` or ``"vendor"``.

    Raises:
        ValueError: ``name`` is no engine.
        EngineError: on entry, if the engine can run nothing here; later, by an op it cannot run.
    """
    reason = unavailable(_check_name(name))
    if reason is not None:
        raise EngineError(f"engine {name!r} is not available: {reason}")
    with wishing(name):
        yield


@contextlib.contextmanager
def wishing(name: str) -> Iterator[None]:
    """:func:`use_engine` of an engine that is known to be one."""
    global _wished_last
    token = _wish.set(name)
    _wished_last = name
    try:
        yield
    finally:
        _wish.reset(token)
        _wished_last = _wish.get()


@functools.cache
def _triton_why_not() -> str | None:
    """Load the Triton kernels; why they could not be, or None."""
    try:
        from .triton_kernels import ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed"
    library = LIBRARIES["triton"]
    for device in ops.DEVICES:
        library.kernels[device] = registered(library.namespace, device.upper())
    if "cpu" not in ops.DEVICES and not torch.cuda.is_available():
        return "there is no CUDA device, and tensors on the CPU need TRITON_INTERPRET=1"
    return None


def unavailable(engine: str) -> str | None:
    """Why ``engine`` can run nothing at all here, or None."""
    return _triton_why_not() if engine == "triton" else None


def why_not(engine: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``engine`` cannot run ``op`` for tensors of ``dtype`` on a ``device`` type, or None."""
    if engine == "reference":
        return None if dtype.is_floating_point else f"{op} is for floating point, got {dtype}"
    if (reason := unavailable(engine)) is not None:
        return reason
    if dtype not in DTYPES:
        return f"{op} is for float32, float64, bfloat16 and float16, got {dtype}"
    kernels = LIBRARIES[engine].kernels
    if engine == "triton" and device == "cpu" and device not in kernels:
        return "tensors on the CPU need TRITON_INTERPRET=1"
    if device not in kernels:
        return f"there are no kernels for device {device!r}"
    if engine != "triton" and device == "cuda" and native.cuda_why_not is not None:
        return native.cuda_why_not
    # The vendor's convolutions need our bn_act around them.
    needed = "bn_act" if engine == "vendor" and op in _CONVOLUTIONS else op
    if needed not in kernels[device]:
        return f"{needed} has no {device} kernel in this version"
    return None


def choose(
    op: str, device: str, dtype: torch.dtype, wished: str = "auto", suited: bool = True
) -> str:
    """The engine that runs ``op`` for tensors of ``dtype`` on a ``device`` type. Pure.

    A convolution that is not ``suited``, see :func:`suits`, goes to the vendor. So does one of bf16
    on a CPU that multiplies matrices of it, and every one on a GPU, as long as nothing is measured.

    Raises:
        EngineError: ``wished`` is not ``auto`` and cannot run the op.
        NotImplementedError: no engine can, because ``dtype`` is not floating point.
    """
    if wished != "auto":
        reason = why_not(wished, op, device, dtype)
        if reason is not None:
            raise EngineError(f"{op}: engine {wished!r} cannot run it: {reason}")
        return wished
    by_matrices = device == "cpu" and dtype == torch.bfloat16 and _HAS_MATRIX_UNITS
    prefer_vendor = op in _CONVOLUTIONS and (not suited or by_matrices or device == "cuda")
    for engine in ("vendor", "native") if prefer_vendor else ("native", "vendor"):
        if why_not(engine, op, device, dtype) is None:
            return engine
    if (reason := why_not("reference", op, device, dtype)) is not None:
        raise NotImplementedError(f"{op}: {reason}")
    return "reference"


def fuses(engine: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a chain of convolutions is trained by CHAIN_OPS on the wish ``engine``. Pure."""
    return engine != "auto" and all(why_not(engine, op, device, dtype) is None for op in CHAIN_OPS)


def pools(op: str, engine: str, device: str, dtype: torch.dtype) -> bool:
    """Whether ``op`` of POOL_OPS is run on the wish ``engine``, and not its two steps. Pure.

    Untuned it is not: nothing is measured yet.
    """
    own = engine in LIBRARIES and engine != "vendor"
    return own and why_not(engine, op, device, dtype) is None


def runs_whole(engine: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a chain may be trained by one op each way on the wish ``engine``. Pure.

    That op has torch's convolutions, our C++ kernels around them, and no choice.
    """
    kinds = {dtype, reference.accumulation_dtype(dtype)}
    return (
        device in _RUN_WHOLE
        and dtype in DTYPES
        and engine in ("auto", "vendor")
        and all(choose(op, device, k, engine) == "vendor" for op in _CONVOLUTIONS for k in kinds)
    )


def suits(op: str, channels_last: bool, weight: Sequence[int] = (), groups: int = 1) -> bool:
    """Whether our convolution is the one to take for a weight of that shape. Pure.

    Contiguous tensors would be converted and back. Ours multiplies other groups' channels by zero:
    only narrow groups' weight gradients, in which the vendor is slow, are faster so. And an image
    of three channels does not fill the vectors that the gradient of a weight is computed by.
    """
    if op == "conv_wgrad":
        return channels_last and (weight[1] <= 8 if groups > 1 else weight[1] >= 16)
    return channels_last and groups == 1


# Asking the driver at every convolution would cost as much as starting it.
_has_gpu = functools.cache(torch.cuda.is_available)


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether torch's convolutions multiply float32 as TF32, which has float16's precision.

    A compiled program keeps the answer of when it was traced. CPUs have no TF32.
    """
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return _has_gpu() and setting.fp32_precision == "tf32"


def implementation(op: str, engine: str) -> Callable[..., Any]:
    """The callable that runs ``op`` on ``engine``; all take the arguments of the op's schema."""
    if engine == "reference":
        several = (reference, reference_training, reference_chain, reference_int8)
        return next(getattr(where, op) for where in several if hasattr(where, op))
    if engine == "vendor" and op.removesuffix("_") in _CONVOLUTIONS:
        return getattr(vendor, op)
    implemented = getattr(getattr(torch.ops, LIBRARIES[engine].namespace), op).default
    # Triton's kernels are launched from Python, and ask there.
    multiplies = op in POOL_OPS + CHAIN_OPS or op.removesuffix("_") in _CONVOLUTIONS
    if multiplies and engine != "triton" and allows_tf32():
        return functools.partial(implemented, tf32=True)
    return implemented


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Our ops of inference in torch's own, by the specification.

    For exporters that know no others: an argument of
    :meth:`torch.export.ExportedProgram.run_decompositions`, before :func:`torch.onnx.export`.
    """
    return {
        getattr(getattr(torch.ops, namespace), op).default: implementation(op, "reference")
        for namespace in native.NAMESPACES
        for op in INFERENCE_OPS
    }
