"""What must hold for a conv/BatchNorm pair to run fused.

Asked at every call, because hooks, pruning, a converted BatchNorm or sharded parameters can come at
any time after fusing.
"""

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torchvision.ops import FrozenBatchNorm2d

from . import engines
from .plan import Params
from .sync_batch_norm import SyncBatchNorm, group_of

# Modules are typed Any below: nn.Module's attributes are Tensor | Module to a type checker.

#: Whether fused modules are to run as torch has them, for that was measured to be faster.
as_torch: ContextVar[bool] = ContextVar("fused_resnet_as_torch", default=False)

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, FrozenBatchNorm2d)


def hooked(m: nn.Module) -> bool:
    """Whether anything watches calls of ``m``."""
    return bool(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    )


def plain(m: nn.Module, kinds: Iterable[type]) -> str | None:
    """Why skipping ``m``'s own call would be noticed, or None.

    It must be of one of these very types, unhooked, with its class's forward.
    """
    if type(m) not in kinds:
        return f"it is a {type(m).__name__}"
    if hooked(m):
        return "it has hooks"
    if "forward" in m.__dict__:
        return "its forward is overridden on the instance"
    return None


def params_of(conv: Any, bn: Any) -> Params:
    """A pair's tensors as they are now."""
    # Asked at every call: nn.Module's own dictionaries answer in a fifth of the time of its
    # __getattr__. What is not there is a buffer, of FrozenBatchNorm2d, or a plain attribute.
    own, norm, running = conv._parameters, bn._parameters, bn._buffers
    try:
        return Params(
            own["weight"],
            own["bias"],
            norm["weight"],
            norm["bias"],
            running["running_mean"],
            running["running_var"],
        )
    except KeyError:
        return Params(conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)


def pair_obstacle(conv: Any, bn: Any, norms: Iterable[type] = BATCH_NORMS) -> str | None:
    """Why this pair can never run fused as the modules stand now, or None.

    ``norms``: the types the BatchNorm may be of.
    """
    if (reason := plain(conv, (nn.Conv2d,))) is not None:
        return f"conv: {reason}"
    if (reason := plain(bn, norms)) is not None:
        return f"bn: {reason}"
    if conv.padding_mode != "zeros":
        return f"conv: padding_mode is {conv.padding_mode!r}"
    if not isinstance(conv.padding, tuple):
        return f"conv: padding is {conv.padding!r}"
    weight, _, gamma, _, mean, var = params_of(conv, bn)
    if (norm := gamma if mean is None else mean) is not None and norm.device != weight.device:
        return f"conv and bn are {apart((weight, norm))}"
    if type(weight) is not nn.Parameter and hasattr(weight, "placements"):
        return "parameters are sharded"
    if (mean is None) != (var is None):
        return "bn: it keeps one running statistic and not the other"
    channels = bn.num_features if mean is None else mean.shape[0]
    if channels != conv.out_channels:
        return "bn: it has another number of channels than conv"
    return None


def apart(tensors: Iterable[Tensor]) -> str | None:
    """Where tensors are, if that is not one device."""
    devices = sorted({str(t.device) for t in tensors})
    return f"on different devices: {', '.join(devices)}" if len(devices) > 1 else None


def norm_takes(norm: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether torch takes activations of ``dtype`` with a BatchNorm's tensors; half with fp32."""
    kinds = {t.dtype for t in norm if t is not None}
    half = dtype in (torch.float16, torch.bfloat16)
    return kinds <= {dtype} or (half and kinds == {torch.float32})


def _tensor_obstacle(
    tensors: Params, x: Tensor, device: torch.device, autocast: torch.dtype | None
) -> str | None:
    """Types torch refuses, or computes with another meaning, and devices are left to torch."""
    weight = tensors.weight
    if autocast is None and weight.dtype != x.dtype:
        return "input and weight differ in dtype"
    if not norm_takes(tensors[2:], autocast or x.dtype):
        return "bn and activations differ in dtype"
    if weight.device != device:
        return "tensors are on different devices"
    return None


def uses_batch_statistics(bn: Any) -> bool:
    """Whether a BatchNorm's next forward takes its statistics from the batch."""
    if isinstance(bn, FrozenBatchNorm2d):
        return False
    if bn.training:
        return True
    kept = bn._buffers.get("running_mean") is not None  # as in params_of
    return not kept and bn.running_mean is None and bn.running_var is None


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record an op over these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def trains(pairs: Iterable[tuple[Any, Any]], *inputs: Tensor | None) -> bool:
    """Whether a call needs more than inference: statistics of the batch, or a backward."""
    pairs = list(pairs)
    if any(uses_batch_statistics(bn) for _, bn in pairs):
        return True
    if not torch.is_grad_enabled():
        return False
    tensors = [t for pair in pairs for t in params_of(*pair)[:4]]
    return needs_grad([*inputs, *tensors])


def _normalises_one_value(pairs: Sequence[tuple[Any, Any]], x: Tensor) -> bool:
    """Whether a batch is so small that some BatchNorm may see one value per channel."""
    sizes = list(x.shape[2:])
    if x.size(0) > 1 or min(sizes) > 64:
        return False
    for conv, _ in pairs:
        for i in (0, 1):
            reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
            sizes[i] = (sizes[i] + 2 * conv.padding[i] - reach) // conv.stride[i] + 1
    return sizes[0] * sizes[1] <= 1


def _training_obstacle(pairs: Sequence[tuple[Any, Any]], x: Tensor) -> str | None:
    """Why a call that trains is left to torch, or None."""
    if engines.wish() == "reference":
        return "the reference engine trains as torch does"
    for conv, bn in pairs:
        if any(t is not None and t.requires_grad for t in params_of(conv, bn)[4:]):
            return "bn: its running statistics require grad"
        synchronised = group_of(bn) is not None
        if synchronised and torch.compiler.is_compiling():
            return "bn: processes are synchronised, inside a compiled program"
        if uses_batch_statistics(bn) and not synchronised:
            if not x.numel():
                return "the batch is empty"
            if _normalises_one_value(pairs, x):
                return "the batch has one value per channel, or nearly"
    return None


def recording() -> str | None:
    """What is watching operations that ours could not be seen by, or None."""
    if torch.compiler.is_compiling():
        return None
    if as_torch.get():
        return "torch's own forward was measured to be faster"
    if torch.jit.is_tracing():
        return "torch.jit.trace is recording"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a functorch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def obstacle(
    pairs: Sequence[tuple[Any, Any]],
    skipped: Sequence[tuple[nn.Module, type]],
    x: Tensor,
    residual: Tensor | None = None,
    norms: Iterable[type] = BATCH_NORMS,
) -> str | None:
    """Why ``pairs`` cannot run fused for input ``x`` right now, or None.

    Args:
        pairs: the convolutions and their BatchNorms.
        skipped: other modules whose call is skipped, each with the type it must be of.
        x: the input, of any type: anything but a 4-D tensor (an fx proxy, say) is an obstacle.
        residual: a further input.
        norms: the types a BatchNorm may be of.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.dtype.is_floating_point:
        return "input is not a 4-D floating point tensor"
    if x.is_meta:
        return "input is on the meta device"
    if (reason := recording()) is not None:
        return reason
    if nn_module._has_any_global_hook():
        return "global module hooks are set"
    for m, kind in skipped:
        if (reason := plain(m, (kind,))) is not None:
            return f"{kind.__name__}: {reason}"
    device = x.device
    where = device.type
    autocast = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
    for conv, bn in pairs:
        if (reason := pair_obstacle(conv, bn, norms)) is not None:
            return reason
        if bn.eps <= 0:
            return "bn: eps is not positive"
        if (reason := _tensor_obstacle(params_of(conv, bn), x, device, autocast)) is not None:
            return reason
    if trains(pairs, x, residual) and (reason := _training_obstacle(pairs, x)) is not None:
        return reason
    if engines.wish() == "auto" and engines.choose("conv_bn_act", where, x.dtype) == "reference":
        return f"there are no kernels for {x.dtype} on {where}"
    return None
