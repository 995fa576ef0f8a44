"""Loads the C++ op libraries and completes what they declare.

Adds to every op its fake kernel (shared by all engines, so that output shapes and strides are one
contract) and the refusal to be differentiated raw: a raw op has no backward, and torch only warns.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter

from . import native_chain, native_int8, native_training, reference, whole_chain

NAMESPACES = ("fused_resnet", "fused_resnet_triton")

_HERE = Path(__file__).parent


def _load(name: str) -> str | None:
    """Load one op library; why it could not be, or None."""
    path = _HERE / name
    if not path.exists():
        return f"{name} was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _load("_ops_cuda.so")


cpu_why_not = _load("_ops_cpu.so")
if cpu_why_not is not None:
    raise ImportError(
        f"fused_resnet: {cpu_why_not}; install it with `pip install -e .` in its source folder"
    )
cuda_why_not = _load_cuda()


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Where no gradient is needed: skips the dispatch key that would ask again, in Python."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _fake_eltwise_act(inputs: list[Tensor], op: str, coeff: list[float] | None, act: str) -> Tensor:
    return torch.empty_like(inputs[0])


def _fake_bn_scale_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(running_mean.dtype)
    return (
        running_mean.new_empty(running_mean.shape, dtype=dtype),
        running_mean.new_empty(running_mean.shape, dtype=dtype),
    )


def _fake_bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    return reference.empty_image(x, x.shape, x)


def _fake_bn_act_(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> None:
    return None


def _fake_batch_norm_act_(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str,
) -> None:
    # One tensor without data among others is enough to be called here instead of the kernel.
    for t in (running_mean, running_var, weight, bias, residual):
        if t is not None and t.device != x.device:
            raise RuntimeError("batch_norm_act_: every tensor must be on the device of x")


def _fake_bn_act_maxpool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    act: str,
) -> Tensor:
    y = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    return reference.empty_image(x, y.shape, x)


def _fake_global_avg_pool(x: Tensor) -> Tensor:
    return reference.empty_image(x, (*x.shape[:2], 1, 1), x)


def _refuse(op: str, *args: Any) -> Tensor:
    # A length depends on the processor: packing belongs outside compiled and exported programs.
    raise NotImplementedError(f"{op}: weights cannot be packed inside a traced program")


def _fake_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    packed: Tensor | None = None,
    tf32: bool = False,
    wgmma: bool = False,
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return reference.empty_image(x, y.shape, x, weight)


def _fake_conv_bn_act_winograd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    padding: list[int],
    tile: int,
    act: str,
    packed: Tensor | None = None,
) -> Tensor:
    y = F.conv2d(x, weight, None, 1, padding)
    return reference.empty_image(x, y.shape, x, weight)


def _fake_conv_bn_act_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    kernel_size: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
    pool_dilation: list[int],
    ceil_mode: bool,
    act: str,
    tf32: bool = False,
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    windows = (kernel_size, pool_stride, pool_padding, pool_dilation)
    y = F.max_pool2d(y, *windows, ceil_mode=ceil_mode)
    return reference.empty_image(x, y.shape, x, weight)


def _fake_conv_bn_act_avgpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    tf32: bool = False,
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return reference.empty_image(x, (*y.shape[:2], 1, 1), x, weight)


_FAKES: dict[str, Callable[..., Any]] = {
    "eltwise_act": _fake_eltwise_act,
    "bn_scale_shift": _fake_bn_scale_shift,
    "bn_act": _fake_bn_act,
    "bn_act_": _fake_bn_act_,
    "batch_norm_act_": _fake_batch_norm_act_,
    "bn_act_maxpool": _fake_bn_act_maxpool,
    "global_avg_pool": _fake_global_avg_pool,
    **{
        op: functools.partial(_refuse, op)
        for op in ("conv_pack", "conv_winograd_pack", "conv_int8_pack")
    },
    "conv_bn_act": _fake_conv_bn_act,
    "conv_bn_act_winograd": _fake_conv_bn_act_winograd,
    "conv_bn_act_maxpool": _fake_conv_bn_act_maxpool,
    "conv_bn_act_avgpool": _fake_conv_bn_act_avgpool,
    **native_training.FAKES,
    **native_chain.FAKES,
    **native_int8.FAKES,
    **whole_chain.FAKES,
}


def _refuse_autograd(library: torch.library.Library, namespace: str, name: str) -> None:
    op = getattr(getattr(torch.ops, namespace), name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.is_write]

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in tree_iter((args, kwargs))
        ):
            raise RuntimeError(
                f"{namespace}::{name}: an input requires grad and a raw op has no backward; call "
                "it through fused_resnet.functional, or under torch.no_grad()"
            )
        for t in tree_iter([args[i] for i in written]):
            if t is not None and not t.is_inference():
                torch.autograd.graph.increment_version(t)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def complete(namespace: str) -> torch.library.Library:
    """Give every op of ``namespace`` what all engines share, for as long as the result lives."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        _refuse_autograd(library, namespace, name)
    return library


_libraries = [complete(namespace) for namespace in NAMESPACES]
