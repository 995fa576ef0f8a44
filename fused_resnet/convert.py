"""``fuse``, ``unfuse`` and ``report``: swap modules to fused twins, and say what came of it."""

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from . import heads  # noqa: F401 (adds its classes to TWINS)
from .blocks import TWINS, Fused
from .conditions import BATCH_NORMS, apart, pair_obstacle, plain
from .forward_source import UnprovableError
from .frozen_conv import FrozenConv
from .plan import MEMORY
from .proved import Proved, may_have_twin, twin_of
from .sites import engine_of
from .tuning import EAGER

M = TypeVar("M", bound=nn.Module)


def _originals() -> dict[type, type]:
    """The class each fused twin stands for."""
    if "timm.models.resnet" in sys.modules:
        from . import timm_blocks  # noqa: F401 (adds its classes to TWINS)
    return {twin: original for original, twin in TWINS.items()}


@dataclass(frozen=True)
class Entry:
    """A convolution and its BatchNorm: their paths in the model, and why they are not fused."""

    conv: str
    bn: str
    reason: str | None
    engine: str | None = None  #: what it runs on, where :func:`report` was asked for that

    @property
    def fused(self) -> bool:
        return self.reason is None


class Report(list[Entry]):
    """The conv/BatchNorm pairs of a model; prints as a table."""

    @property
    def unfused(self) -> "list[Entry]":
        return [e for e in self if not e.fused]

    @property
    def summary(self) -> str:
        """How many are fused, in words."""
        return f"{len(self) - len(self.unfused)} of {len(self)} conv/BatchNorm pairs fused"

    def __str__(self) -> str:
        width = max((len(e.conv) for e in self), default=0)
        named = max((len(e.engine or "") for e in self), default=0)
        engines = (f"{e.engine:<{named}}  " if e.engine else "" for e in self)
        lines = [f"{e.conv:<{width}}  {next(engines)}{e.reason or 'fused'}" for e in self]
        return "\n".join([*lines, self.summary])


def check_model(op: str, model: nn.Module) -> None:
    """Raise unless ``model`` is a module that nothing wraps."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    # Looked up by name: a class whose module was never imported has no instances.
    wrappers = {
        "torch._dynamo.eval_frame": ("OptimizedModule", "torch.compile"),
        "torch.nn.parallel.distributed": ("DistributedDataParallel", "DistributedDataParallel"),
        "torch.distributed.fsdp": ("FullyShardedDataParallel", "FSDP"),
        "torch.distributed.fsdp._fully_shard": ("FSDPModule", "fully_shard"),
        "torch.jit": ("ScriptModule", "torch.jit.script"),
    }
    for source, (name, what) in wrappers.items():
        kind = getattr(sys.modules.get(source), name, None)
        for path, m in model.named_modules():
            if kind is not None and isinstance(m, kind):
                where = f"{path!r} is" if path else "the model is"
                raise RuntimeError(f"{op}: {op} before {what}, not after; {where} already wrapped")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Fused]]:
    """Modules that hold a pair and have a fused twin, and that, swapped already or not."""
    inside: set[nn.Module] = set(_refused(model))
    for path, m in model.named_modules():
        if m in inside:
            continue
        twin = _as_twin(m)
        if isinstance(twin, str) or not twin.pairs():
            continue
        # A block runs its own shortcut: that Sequential is not swapped beside it.
        shortcut = m._modules.get("downsample")
        if shortcut is not None and any(p.conv.startswith("downsample.") for p in twin.pairs()):
            inside.add(shortcut)
        yield path, m, twin


def _refused(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are left alone whatever they are, and why."""
    return {
        inner: f"{type(m).__name__} is made for quantization, whose fuse_model() fuses it"
        for m in model.modules()
        if type(m).__module__.startswith("torchvision.models.quantization")
        for inner in m.modules()
    }


def _as_twin(m: nn.Module) -> Fused | str:
    """A view of ``m`` as its fused twin, or why there is none; ``m`` itself is not changed."""
    originals = _originals()  # before TWINS is looked at: it may add timm's
    if isinstance(m, Fused) and (isinstance(m, Proved) or type(m) in originals):
        return m
    if type(m) in TWINS:
        view: Any = object.__new__(TWINS[type(m)])
        view.__dict__ = m.__dict__
        return view
    if not may_have_twin(m):
        return "it holds no pair"
    try:
        return twin_of(m)
    except UnprovableError as error:
        return str(error)


def _restore(m: Any) -> None:
    """Give a module its own class back."""
    m.__class__ = m.original if isinstance(m, Proved) else _originals()[type(m)]
    for name in ("memory", "proofs", "tuned"):
        m.__dict__.pop(name, None)


def joined(path: str, name: str) -> str:
    """The path of a module's child."""
    return f"{path}.{name}" if path else name


def _entries(model: nn.Module) -> Report:
    report = Report()
    seen: set[tuple[nn.Module, nn.Module]] = set()
    for path, _, twin in _candidates(model):
        static = twin.static_obstacle()
        for pairs, skipped in twin.fused_groups():
            overridden = static
            together = apart(p for pair in pairs for p in twin.get(pair.conv).parameters())
            for other, kind in skipped:
                if overridden is None and (reason := plain(other, (kind,))) is not None:
                    overridden = f"the block's {kind.__name__}: {reason}"
            for p in pairs:
                conv, bn = twin.get(p.conv), twin.get(p.bn)
                if (conv, bn) in seen:  # a block and its own Sequential both run it
                    continue
                seen.add((conv, bn))
                reason = overridden or pair_obstacle(conv, bn, twin.norms) or together
                if isinstance(conv, FrozenConv):
                    reason = None
                report.append(Entry(joined(path, p.conv), joined(path, p.bn), reason))
    refused = _refused(model)
    for path, m in model.named_modules():
        own = _as_twin(m)
        for name, following in _in_a_row(m, own):
            conv, bn = m._modules[name], m._modules[following]
            if not isinstance(conv, _ConvNd) or (conv, bn) in seen:
                continue
            if isinstance(bn, (*BATCH_NORMS, _NormBase, nn.GroupNorm)):
                reason = refused.get(m) or pair_obstacle(conv, bn) or _why_alone(m, own)
                report.append(Entry(joined(path, name), joined(path, following), reason))
    return report


def _in_a_row(m: nn.Module, twin: Fused | str) -> Iterable[tuple[str, str]]:
    """Children that may be a pair: by the proof of what a module does, else by their order."""
    if isinstance(twin, Proved) and twin.proof is not None:
        return twin.proof.links
    return itertools.pairwise(m._modules)


def _why_alone(m: nn.Module, twin: Fused | str) -> str:
    """Why a module does not run as one a convolution and the BatchNorm that is named after it."""
    if isinstance(twin, str):
        return f"{type(m).__name__} is not a class that can be fused: {twin}"
    return "what is between them is used elsewhere, too, or one of them is called twice"


def fuse(model: M, *, strict: bool = False, memory: str = "auto") -> M:
    """Make ``model`` run fused, in place.

    Modules of known classes (torchvision's and timm's ResNet and their blocks, segmentation heads,
    ``IntermediateLayerGetter``, ``Conv2dNormActivation``, and ``nn.Sequential`` where it holds a
    convolution followed by its BatchNorm) get the class of their fused twin, and so do those that
    call their layers in a forward of their own, where torch.fx and its source prove what that does
    at every call. Parameters, buffers,
    names, ``state_dict`` and ``isinstance`` stay as they are. What cannot run fused, at conversion
    or at any later call, runs as before; :func:`report` says why.

    Args:
        model: any module. Fuse before ``torch.compile``, ``DistributedDataParallel`` and sharding.
        strict: raise if any conv/BatchNorm pair is left unfused; nothing is changed then.
        memory: what training may trade memory for. ``"auto"`` keeps half of what torch keeps for
            backward and computes no convolution twice. ``"lean"`` computes the first convolution of
            every block again in backward and does not keep its output. ``"fast"`` keeps the raw
            output of the last 1x1 convolution of a block, too, where that saves time.

    Returns:
        ``model`` itself. Called again, it sets another ``memory``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown ``memory``.
        RuntimeError: ``model`` is compiled, scripted or wrapped; ``strict``, and a pair is unfused.
    """
    check_model("fuse", model)
    if memory not in MEMORY:
        raise ValueError(f"fuse: memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    for m in model.modules():  # what has been changed since is looked at anew
        if isinstance(m, Proved) and m.frozen_pairs is None and m.static_obstacle() is not None:
            _restore(m)
    if strict and (unfused := _entries(model).unfused):
        reasons = "; ".join(f"{e.conv}: {e.reason}" for e in unfused)
        raise RuntimeError(f"fuse: strict, and {len(unfused)} pairs cannot be fused: {reasons}")
    for _, m, twin in list(_candidates(model)):
        if "forward" not in m.__dict__:
            m.__class__ = type(twin)
        if isinstance(m, Proved):
            m.proofs = twin.proofs
        if isinstance(m, Fused):
            m.memory = memory
    return model


def unfuse(model: M) -> M:
    """Undo :func:`fuse`, in place: every module gets its own class back. Returns ``model``."""
    check_model("unfuse", model)
    originals = _originals()
    for m in model.modules():
        if isinstance(m, Proved) or type(m) in originals:
            _restore(m)
    return model


def report(model: nn.Module, *, engines: bool = False) -> Report:
    """Every convolution and its BatchNorm in ``model``: fused, or why not.

    What depends on a call (training mode, a gradient that is needed, dtypes) is not in it: the
    module's ``obstacle(x)`` tells that.

    Args:
        model: any module.
        engines: tell also what each runs on: an engine; ``"eager"``, torch's own modules; or
            ``"auto"``, of which several may be at work in training. Of a model that :func:`tune`
            has seen, on its example; else on images in channels_last.

    Returns:
        A list of :class:`Entry` that prints as a table.
    """
    entries = _entries(model)
    fused = {path: m for path, m in model.named_modules() if isinstance(m, Fused)}
    result = Report()
    for e in entries:
        owner = _owner(e.conv, fused)
        if e.fused and owner is None:
            e = Entry(e.conv, e.bn, "fuse was not called")
        if engines:
            e = replace(e, engine=_engine_of(e, owner, fused))
        result.append(e)
    return result


def _owner(path: str, owners: Collection[str]) -> str | None:
    """Which of ``owners`` the module at ``path`` lies in, at most through a shortcut."""
    parent, _, _ = path.rpartition(".")
    above = parent.rpartition(".")[0]
    if parent in owners:
        return parent
    return above if parent.endswith("downsample") and above in owners else None


def _engine_of(e: Entry, owner: str | None, fused: dict[str, Fused]) -> str:
    if not e.fused or owner is None:
        return EAGER
    return engine_of(fused[owner], e.conv[len(owner) :].lstrip("."))
