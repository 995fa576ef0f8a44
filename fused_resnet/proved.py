"""Fused twins of modules that call their layers in a forward of their own, where that is proved.

The source says that every call makes the same operations as long as a few attributes stay as they
are (:mod:`.forward_source`); torch.fx tells which operations; :mod:`.graph_units` finds what of
them may run as one. Anything else leaves the module as it is, and says why.
"""

import contextlib
import functools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from .blocks import Sequential
from .caffe_layers import Eltwise
from .conditions import BATCH_NORMS, hooked, obstacle
from .forward_source import FUNCTIONS, Reads, UnprovableError, reads_of
from .frozen_conv import FrozenConv
from .graph_units import Call, FusedGraph, Step, Unit, Value, spent_after, units
from .int8 import Int8Conv

#: What a trace may call: of :mod:`operator`, what an expression calls.
_OPERATORS = {name: getattr(operator, name) for name in operator.__all__}
_CALLABLES: dict[str, Any] = {
    **FUNCTIONS,
    **{f"operator.{name}": value for name, value in _OPERATORS.items()},
    "getattr": getattr,
}
#: Those that write to their first argument.
_IN_PLACE = [
    name
    for name in _OPERATORS
    if name[0] == "i" and not _OPERATORS.keys().isdisjoint((name[1:], f"{name[1:]}_"))
]

#: Steps that are a ReLU, and a sum of two.
_RELUS = ("F.relu", "torch.relu", "relu", "relu_")
_SUMS = ("operator.add", "operator.iadd", "torch.add", "add", "add_")

#: Children that matter to what is found; all others are called as they are.
_KINDS = (nn.Conv2d, *BATCH_NORMS, nn.ReLU, type(None))

#: What a forward may read besides modules and tensors: what cannot change unnoticed.
_PLAIN = (bool, int, float, str, type(None))

#: Modules that write to nothing but what they return, and what runs them in a row.
_PURE = (nn.Conv2d, *BATCH_NORMS, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_ROWS = (nn.Sequential, Sequential, FrozenConv, Int8Conv)


class Proof(NamedTuple):
    """What a forward does, as long as what it reads is as it was: plain data.

    Attributes:
        reads: by name, see :func:`_fact`.
        inputs: how many it takes; they are the first values.
        result: what it returns, with a :class:`Value` for each value.
        links: convolutions, each with a BatchNorm that reads what it makes.
    """

    reads: dict[str, Any]
    inputs: int
    units: list[Unit]
    spent: list[list[int]]
    result: Any
    links: list[tuple[str, str]]


class Proved(FusedGraph):
    """What the twins of such classes share."""

    if TYPE_CHECKING:
        original: type[Any]
        methods: Mapping[str, Callable[..., Any]]
        proofs: Sequence[Proof]
    else:
        proofs = ()  # of an instance that its class's constructor made

    __jit_unused_properties__ = ("proof", "units")  # torch.jit.script would compile them

    @property
    def proof(self) -> Proof | None:
        """What holds in this mode, of training or evaluation."""
        for proof in self.proofs:
            if proof.reads.get("training", (bool, self.training)) == (bool, self.training):
                return proof
        return None

    @property
    def units(self) -> list[Unit]:
        return [] if self.proof is None else self.proof.units

    def static_obstacle(self) -> str | None:
        if self.proof is None:
            return "it is not proved in this mode"
        for name, method in self.methods.items():
            if getattr(self.original, name) is not method or name in self.__dict__:
                return f"its {name} is another than when it was fused"
        for name, fact in self.proof.reads.items():
            frozen = self.frozen_pairs is not None and isinstance(fact, type)
            if not frozen and _fact(self, name) != fact:
                return f"its {name} is another than when it was fused"
        for unit in self.units:
            for name in unit.beside:
                if (reason := _writes(self.get(name))) is not None:
                    return f"{name}, called inside of a chain: {reason}"
        return None

    def obstacle(self, *inputs: Any) -> str | None:
        if (reason := self.static_obstacle()) is not None:
            return reason
        if self.proof is None or len(inputs) != self.proof.inputs:
            return "it is called with another number of inputs than its forward has"
        return obstacle([], [], inputs[0])

    def run(self, *inputs: Any) -> Any:
        proof: Any = self.proof
        values = dict(enumerate(inputs))
        for unit, spent in zip(proof.units, proof.spent, strict=True):
            self.run_unit(unit, values)
            for value in spent:
                values.pop(value, None)
        return _filled(proof.result, values)

    def run_steps(self, unit: Unit, values: dict[int, Any]) -> None:
        for step in unit.steps:
            values[step.output] = self.run_step(step, values)

    def run_step(self, step: Step, values: dict[int, Any]) -> Any:
        call = step.call
        if call is None:
            return self.get(step.module)(values[step.inputs[0]])
        if call.kind == "attribute":
            return functools.reduce(getattr, call.target.split("."), self)
        args, kwargs = _filled(call.args, values), _filled(dict(call.kwargs), values)
        if call.kind == "method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        run = self.get(call.target) if call.kind == "module" else _CALLABLES[call.target]
        return run(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, (self.original,), *state


def twin_of(m: nn.Module) -> Proved:
    """A view of ``m`` as its fused twin; ``m`` itself is not changed.

    Raises:
        UnprovableError: its forward is not proved, or nothing of it would run fused.
    """
    kind: type = m.original if isinstance(m, Proved) else type(m)
    view: Any = object.__new__(_twin(kind))
    if not isinstance(m, Proved) and (taken := _NAMES.intersection(dir(m))):
        raise UnprovableError(f"it has a {min(taken)!r} of its own, which fused modules have, too")
    proofs = [_prove(m.__dict__, kind)]
    if "training" in proofs[0].reads:
        with contextlib.suppress(UnprovableError):
            proofs.append(_prove({**m.__dict__, "training": not m.training}, kind))
    view.__dict__ = {**m.__dict__, "proofs": proofs}
    return view


def may_have_twin(m: nn.Module) -> bool:
    """Whether ``m`` holds what could be a pair."""
    kinds = {type(child) for child in m._modules.values()}
    return nn.Conv2d in kinds and not kinds.isdisjoint(BATCH_NORMS)


def _fact(m: Any, name: str) -> Any:
    """What must not change: a child's kind, whether a tensor is there, or a plain value."""
    for found in (m.__dict__, *(vars(kind) for kind in type(m).__mro__)):
        if name in found:
            return type(found[name]), found[name]
    if name in m._modules:
        kind = type(m._modules[name])
        return kind if kind in _KINDS else nn.Module
    for tensors in (m._parameters, m._buffers):
        if name in tensors:
            return Tensor, tensors[name] is None
    return None


def _writes(m: nn.Module) -> str | None:
    """Why ``m`` might change its input in place, or None."""
    for inner in m.modules():
        kind = type(inner)
        pure = kind in _PURE or kind in _ROWS or (kind is nn.ReLU and not inner.inplace)
        if not pure:
            return f"a {kind.__name__} may change its input"
        if hooked(inner) and not isinstance(inner, FrozenConv):  # those have the tuner's
            return "it has hooks"
    return None


@functools.cache
def _reads(kind: type) -> Reads:
    return reads_of(kind)


@functools.cache
def _twin(kind: type) -> type[Proved]:
    """The fused twin of a class."""
    given: Any = nn.Module
    for name in ("__reduce__", "__reduce_ex__", "__getattr__", "__getattribute__", "__setattr__"):
        if getattr(kind, name) is not getattr(given, name):
            raise UnprovableError(f"it has a {name} of its own")
    if type(kind) is not type or hasattr(kind.__init_subclass__, "__func__"):
        raise UnprovableError("its subclasses are made in a way of their own")
    original: Any = kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or self.obstacle(*args) is not None:
            return original.forward(self, *args, **kwargs)
        return self.run(*args)

    # torch.jit.script reads the original's source, with the globals of what it is given.
    scope, closure = original.forward.__globals__, forward.__closure__
    forward = types.FunctionType(forward.__code__, scope, "forward", None, closure)
    functools.update_wrapper(forward, original.forward)
    facts = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"original": kind, "methods": _reads(kind).methods, "forward": forward}
    return type(kind.__name__, (Proved, kind), {**facts, **own})


def _empty(kind: type) -> Any:
    return object.__new__(_twin(kind))


#: What a twin has of its own, which must not stand in for what the class has.
_NAMES = {name for name in dir(Proved) if not hasattr(nn.Module, name)} | {
    "memory",
    "methods",
    "original",
}

_PROOFS: dict[type, list[Proof]] = {}


def _prove(state: dict[str, Any], kind: type) -> Proof:
    """The proof of a forward of ``kind`` with these attributes; modules alike share theirs."""
    m: Any = object.__new__(kind)
    m.__dict__ = state
    reads = _reads(kind)
    facts = {name: _fact(m, name) for name in sorted(reads.names - reads.methods.keys())}
    proofs = _PROOFS.setdefault(kind, [])
    for proof in proofs:
        if proof.reads == facts:
            return proof
    for name, fact in facts.items():
        child = isinstance(fact, type)
        if fact is None or not (child or _is_plain(fact[1])):
            what = "which is none of its attributes" if fact is None else f"a {fact[0].__name__}"
            raise UnprovableError(f"its forward reads {name!r}, {what}")
        if name in reads.decisive and (child or fact[0] is Tensor):
            raise UnprovableError(f"its forward decides by {name!r}, a module or tensor")
    proofs.append(_trace(m, facts))
    return proofs[-1]


def _is_plain(value: Any) -> bool:
    several = type(value) is tuple and all(map(_is_plain, value))
    return several or type(value) in _PLAIN


class _Proxy(fx.Proxy):
    """Writes to itself where the value would: torch.fx takes ``x += y`` for ``x = x + y``."""


def _in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_OPERATORS[_name]))


class _Tracer(fx.Tracer):
    """Records a forward; children are what it calls, whatever is in them."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise UnprovableError("its forward uses a tensor that is neither input nor parameter")
        return super().create_arg(a)


def _trace(m: nn.Module, facts: dict[str, Any]) -> Proof:
    try:
        graph = _Tracer().trace(m)
    except UnprovableError:
        raise
    except Exception as error:  # the forward is somebody else's, and runs on what is no tensor
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnprovableError(f"torch.fx cannot trace its forward: {text}") from error
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    steps, modules = [], {}
    inputs, result = 0, None
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs += 1
        elif node.op == "output":
            result = _numbered(node.args[0], numbers)
        else:
            step = _step(m, node, numbers)
            steps.append(step)
            modules[step.module] = _stand_in(m, step)
    outputs = [numbers[node] for node in graph.output_node().all_input_nodes]
    found = units(modules, steps, outputs)
    if not any(unit.chain for unit in found):
        raise UnprovableError(
            "no convolution it calls once is read by a BatchNorm alone, called once"
        )
    convs = {step.output: step.module for step in steps if type(modules[step.module]) is nn.Conv2d}
    norms = [step for step in steps if type(modules[step.module]) in BATCH_NORMS]
    links = [(convs[n.inputs[0]], n.module) for n in norms if n.inputs[0] in convs]
    return Proof(facts, inputs, found, spent_after(found, outputs), result, links)


def _step(root: Any, node: fx.Node, numbers: dict[fx.Node, int]) -> Step:
    read = tuple(numbers[n] for n in node.all_input_nodes)
    target: Any = node.target
    if node.op == "call_module" and list(node.args) == node.all_input_nodes and len(read) == 1:
        _check_single(root.named_modules(remove_duplicate=False), target)
        return Step(target, read, numbers[node])
    args, kwargs = _numbered(node.args, numbers), _numbered(node.kwargs, numbers)
    kind = node.op.removeprefix("call_")
    writes = (
        kind == "module" or "out" in kwargs or any(a is True for a in (*args, *kwargs.values()))
    )
    if node.op == "get_attr":
        kind = "attribute"
        _check_single(root.named_parameters(remove_duplicate=False), target)
        _check_single(root.named_buffers(remove_duplicate=False), target)
    elif kind == "module":
        _check_single(root.named_modules(remove_duplicate=False), target)
    elif kind == "function":
        names = [name for name, function in _CALLABLES.items() if function is target]
        if not names:
            raise UnprovableError(f"its forward calls {target}")
        target = names[0]
        writes = writes or target.removeprefix("operator.") in _IN_PLACE
    else:
        writes = writes or target.endswith("_")
    call = Call(kind, target, args, tuple(kwargs.items()), writes)
    return Step(f"{node.name}()", read, numbers[node], call)


def _check_single(named: Any, path: str) -> None:
    """Fail if what is at a path is at another, too: the trace does not say which is meant."""
    every = dict(named)
    if sum(value is every[path] for value in every.values() if path in every) > 1:
        raise UnprovableError(f"what it calls {path!r} has another name, too")


def _stand_in(root: Any, step: Step) -> nn.Module:
    """A module of the kind that a step is."""
    call = step.call
    if call is None:
        return root._modules.get(step.module, nn.Identity())
    if call.kind == "module":
        return nn.Identity()
    if call.target in _RELUS and len(step.inputs) == 1 and type(call.args[0]) is Value:
        return nn.ReLU()
    two = len(call.args) == 2 and all(type(a) is Value for a in call.args)
    if call.target in _SUMS and two and not call.kwargs and len(step.inputs) == 2:
        return Eltwise("sum")
    return nn.Identity()


def _numbered(a: Any, numbers: dict[fx.Node, int]) -> Any:
    return fx.node.map_arg(a, lambda node: Value(numbers[node]))


def _filled(a: Any, values: Mapping[int, Any]) -> Any:
    """``a`` with the values that it names."""
    if type(a) is Value:
        return values[a.number]
    if isinstance(a, dict):
        return {key: _filled(value, values) for key, value in a.items()}
    if isinstance(a, slice):
        return slice(*(_filled(part, values) for part in (a.start, a.stop, a.step)))
    if isinstance(a, tuple | list):
        parts = [_filled(part, values) for part in a]
        return parts if isinstance(a, list) else tuple(parts)
    return a
