"""The calls that go by what was measured, and the facts that it is measured for.

See :mod:`fused_resnet.tuning`, which knows nothing of blocks and layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import engines, functional, vendor
from .conditions import hooked, params_of, uses_batch_statistics
from .modules import conv_bn, in_steps
from .sync_batch_norm import SyncBatchNorm
from .tuning import EAGER, Site, going, known, resolve

#: Modules of these packages do nothing but compute: a network of them may be run to be timed.
_KNOWN = ("fused_resnet.", "timm.", "torch.nn.", "torchvision.")


class Facts(NamedTuple):
    """What a choice depends on. As text, a key of :class:`fused_resnet.tune_cache.Cache`."""

    op: str
    shape: torch.Size
    dtype: torch.dtype
    layout: str
    autocast: torch.dtype | None
    gradients: tuple[bool, ...]  #: in training: whether autograd records, whether x needs one
    layers: tuple[tuple[Any, ...], ...]  #: the shape of its weight first
    rest: tuple[Any, ...]  #: what else tells one call from another
    deterministic: bool
    tf32: bool


def facts_of(
    op: str, x: Tensor, layers: tuple[Any, ...], *rest: Any, training: bool = False
) -> Facts:
    """Those of a call of ``op`` for x, and of the state that torch is in."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    gradients = (torch.is_grad_enabled(), x.requires_grad) if training else ()
    must = vendor.must_be_deterministic()
    tf32 = engines.allows_tf32()
    return Facts(op, x.shape, x.dtype, layout_of(x), cast, gradients, layers, rest, must, tf32)


def layout_of(t: Tensor) -> str:
    """The order in which a tensor lies in memory."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous" if t.is_contiguous() else "strided"


def _layer(training: bool, conv: Any, bn: Any) -> tuple[Any, ...]:
    """What matters of a convolution and its BatchNorm."""
    weight, *rest = params_of(conv, bn)
    learned = (weight, *rest[:3]) if training else ()
    gradients = tuple(t is not None and t.requires_grad for t in learned)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    kind = (type(bn).__name__, uses_batch_statistics(bn), rest[0] is not None)
    return (weight.shape, weight.dtype, layout_of(weight), *geometry, *kind, gradients)


#: Of a module in one mode, the fused ones inside it. Looking at each again at every call would take
#: longer than a small network's own call.
_inside: WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, ...]]] = WeakKeyDictionary()


def inside(m: Any, training: bool) -> tuple[Any, ...]:
    """The layers of the fused modules in a network; of a block, none."""
    modes, mode = _inside.setdefault(m, {}), (m.training, training)
    # Processes that train together must see the same, and another may have begun to since.
    if mode not in modes or (dist.is_available() and dist.is_initialized()):
        fused = [n for n in m.modules() if n is not m and hasattr(type(n), "fused_groups")]
        modes[mode] = tuple(layer for n in fused for layer in _layers(n, training))
    return modes[mode]


def _layers(m: Any, training: bool) -> list[Any]:
    kind = type(m).__name__
    return [(*_layer(training, *m.modules_of(p)), kind, m.memory) for p in m.pairs()]


def _computes(m: nn.Module) -> bool:
    """Whether calls of ``m`` do nothing else, and may be made to be timed.

    Not where processes wait for each other, which must all go the same way, nor in modules that
    nobody here knows, or that are watched.
    """
    for inner in m.modules():
        foreign = not type(inner).__module__.startswith(_KNOWN)
        if foreign or isinstance(inner, nn.SyncBatchNorm | SyncBatchNorm):
            return False
        if inner is not m and (hooked(inner) or "forward" in inner.__dict__):
            return False
        if any(p is not None and p._backward_hooks for p in inner._parameters.values()):
            return False
    return True


def forward(m: Any, x: Tensor, original: Callable[..., Any]) -> Any:
    """A fused module's call that nothing stands against: fused, on an engine, or ``original``."""

    def call(way: str, modules: Sequence[Any], inputs: Sequence[Any]) -> Any:
        if way == "auto":
            return modules[0].run(*inputs)
        with going(way):
            return original(*modules, *inputs) if way == EAGER else modules[0].run(*inputs)

    training = m.trains(x)
    network = inside(m, training)
    if not network and not training and not x.is_cuda:
        return m.run(x)  # what it consists of is measured
    layers = (*_layers(m, training), *network)
    facts = facts_of(type(m).__name__, x, layers, training=training)
    if (way := known(facts, x.device)) is None:
        names = ("native", "triton") if x.is_cuda else ("native", "vendor") if training else ()
        ways = ["auto"]
        if _computes(m):
            ways += _able(names, x)
            # Who asks for little memory would not have twice that of "auto" for a little time.
            ways += [] if training and m.memory == "lean" else [EAGER]
        way = resolve(Site(facts, (m,), (x,), ways, call))
    return call(way, (m,), (x,))


def pair(conv: Any, bn: Any, x: Tensor, act: str, residual: Tensor | None) -> Tensor:
    """A convolution and its BatchNorm in evaluation, with what follows them."""

    def call(way: str, modules: Sequence[Any], inputs: Sequence[Any]) -> Tensor:
        (own, norm), (given, added) = modules, inputs
        if way == "auto":
            return conv_bn(own, norm, given, act, added)
        if way == EAGER:
            return in_steps(own, norm, given, act, added)
        with going(way):
            return conv_bn(own, norm, given, act, added)

    weight = conv.weight
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    layer = (weight.shape, layout_of(weight), *geometry, conv.bias is not None)
    facts = facts_of("conv_bn_act", x, (layer,), act, residual is not None)
    modules, inputs = (conv, bn), (x, residual)
    if (way := known(facts, x.device)) is None:
        names = ("native", "triton", "vendor") if x.is_cuda else ("native", "vendor")
        ways = (functional.conv_engine(x, weight, conv.groups), *_able(names, x), EAGER)
        way = resolve(Site(facts, modules, inputs, [*dict.fromkeys(ways)], call))
    return call(way, modules, inputs)


def _able(names: Sequence[str], x: Tensor) -> list[str]:
    """Those of some engines that run convolutions of x."""
    kind = x.device.type
    return [e for e in names if engines.why_not(e, "conv_bn_act", kind, x.dtype) is None]


def engine_of(m: Any, path: str) -> str:
    """What a fused module's convolution runs on: as tuned; untuned, on images in channels_last."""
    conv = m.get(path)
    if m.frozen_pairs is not None:
        return conv.engine
    if m.tuned:
        return m.tuned.get(path, "auto")
    weight, op = conv.weight, "conv_bn_act"
    suited = engines.suits(op, True, weight.shape, conv.groups)
    return engines.choose(op, weight.device.type, weight.dtype, engines.wish(), suited)
