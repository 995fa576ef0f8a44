"""What of a graph of modules may run as one: of a Caffe network, or of a module's own forward."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .blocks import Fused, Group, Pair
from .caffe_layers import Eltwise
from .conditions import BATCH_NORMS, obstacle
from .frozen_conv import FrozenConv
from .modules import geometry_of
from .reference import conv_shape


class Call(NamedTuple):
    """A step that is no module called with values alone.

    Attributes:
        kind: ``"function"`` (or ``"module"``) of this name, ``"method"`` of the first argument, or
            ``"attribute"``, a tensor of the module that runs.
        args, kwargs: what it is called with, with a :class:`Value` where a step's output goes.
    """

    kind: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    writes: bool = False  #: into its first argument


class Value(NamedTuple):
    """A value among a call's arguments, by number."""

    number: int


class Step(NamedTuple):
    """A module, by name, and what it reads and makes: values by number, 0 is the input.

    Where it is a ``call``, ``module`` is a name for it alone.
    """

    module: str
    inputs: tuple[int, ...]
    output: int
    call: Call | None = None


class Unit(NamedTuple):
    """Steps that may run as one: a chain of convolutions, or an Eltwise; else a single step.

    Attributes:
        steps: in order; the last one makes ``output``.
        inputs: of a chain its input and, unless its shortcut makes it, what is added to its end.
        chain: its convolutions and BatchNorms.
        shortcut: one more pair, of the same input, whose result is added to the chain's end.
        skipped: modules whose call is part of the chain or the Eltwise, with their types.
        beside: modules that are called between its steps.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    output: int
    chain: tuple[Pair, ...] = ()
    shortcut: Pair | None = None
    skipped: tuple[tuple[str, type], ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[Pair]:
        return [*self.chain] if self.shortcut is None else [*self.chain, self.shortcut]


class _Link(NamedTuple):
    """A convolution, its BatchNorm and the ReLU behind them, if there is one: indices of steps."""

    conv: int
    bn: int
    relu: int | None


class _Finder:
    def __init__(
        self, modules: Mapping[str, nn.Module], steps: Sequence[Step], outputs: Iterable[int]
    ) -> None:
        self.steps = steps
        self.modules: list[Any] = [modules[step.module] for step in steps]
        self.kept = set(outputs)
        self.calls = Counter(step.module for step in steps)
        self.makers = {step.output: i for i, step in enumerate(steps)}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, step in enumerate(steps):
            for value in step.inputs:
                self.readers[value].append(i)

    def follower(self, i: int, *kinds: type) -> int | None:
        """The step that alone reads what step ``i`` makes, if it is of one of these kinds."""
        value = self.steps[i].output
        readers = self.readers[value]
        alone = len(readers) == 1 and value not in self.kept
        return readers[0] if alone and type(self.modules[readers[0]]) in kinds else None

    def once(self, i: int) -> bool:
        """Whether this step alone calls its module."""
        return self.calls[self.steps[i].module] == 1

    def chains(self) -> list[list[_Link]]:
        """Convolutions in a row, each with its BatchNorm, and all but the last with a ReLU."""
        links: dict[int | None, _Link] = {}
        for i, m in enumerate(self.modules):
            bn = self.follower(i, *BATCH_NORMS) if type(m) is nn.Conv2d and self.once(i) else None
            if bn is not None and self.once(bn):
                links[i] = _Link(i, bn, self.follower(bn, nn.ReLU))
        after = {
            link: links[conv]
            for link in links.values()
            if link.relu is not None and (conv := self.follower(link.relu, nn.Conv2d)) in links
        }
        inner = set(after.values())
        chains = [[link] for link in links.values() if link not in inner]
        for chain in chains:
            while chain[-1] in after:
                chain.append(after[chain[-1]])
        return chains

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        ends: dict[int, list[list[_Link]]] = defaultdict(list)  # by the sum they end in
        for chain in self.chains():
            add = self.follower(chain[-1].bn, Eltwise)
            if add is not None and self.adds_two(add):
                ends[add].append(chain)
            else:
                units.append(self.chain(chain))
        for add, chains in ends.items():
            units += self.block(add, chains)
        for i, m in enumerate(self.modules):
            if type(m) is Eltwise and i not in ends and self.steps[i].call is None:
                units.append(self.unit([i], self.follower(i, nn.ReLU)))
        units = [unit for unit in units if not self.is_disturbed(unit)]
        done = {step.output for unit in units for step in unit.steps}
        units += [Unit((s,), s.inputs, s.output) for s in self.steps if s.output not in done]
        return sorted(units, key=lambda unit: self.steps.index(unit.steps[-1]))

    def adds_two(self, eltwise: int) -> bool:
        m, step = self.modules[eltwise], self.steps[eltwise]
        if step.call is not None and step.call.writes:
            # Only what a BatchNorm made for it is nobody else's.
            maker = self.makers.get(step.inputs[0])
            if maker is None or type(self.modules[maker]) not in BATCH_NORMS:
                return False
            if self.follower(maker, Eltwise) != eltwise:
                return False
        return m.op == "sum" and m.coeff is None and len(step.inputs) == 2

    def is_disturbed(self, unit: Unit) -> bool:
        """Whether a call between a unit's steps writes to what may be read by it."""
        return any(step.call is not None and step.call.writes for step in self.between(unit.steps))

    def between(self, steps: Sequence[Step]) -> list[Step]:
        """The other steps between the first and the last of these."""
        first, last = (self.steps.index(step) for step in (steps[0], steps[-1]))
        return [step for step in self.steps[first:last] if step not in steps]

    def block(self, add: int, chains: list[list[_Link]]) -> list[Unit]:
        """One chain or two that end in the same sum: the longer adds the other to its end."""
        *others, main = sorted(chains, key=lambda chain: (len(chain), chain[0].conv))
        if not others:
            return [self.chain(main, add)]
        (other,) = others
        x = self.steps[main[0].conv].inputs
        if len(other) == 1 and self.steps[other[0].conv].inputs == x:
            return [self.chain(main, add, other[0])]
        return [self.chain(other), self.chain(main, add)]

    def chain(
        self, links: list[_Link], add: int | None = None, shortcut: _Link | None = None
    ) -> Unit:
        """A chain, with the sum that it ends in."""
        inputs = self.steps[links[0].conv].inputs
        steps = [i for link in links for i in link[:2]]
        relus = [link.relu for link in links]
        if add is not None:
            steps.append(add)
            relus[-1] = self.follower(add, nn.ReLU)
        if shortcut is not None:
            steps += shortcut[:2]
        elif add is not None:
            own = self.steps[links[-1].bn].output
            inputs += tuple(v for v in self.steps[add].inputs if v != own)
        pairs = [self.pair(link, relu) for link, relu in zip(links, relus, strict=True)]
        pairs[-1] = pairs[-1]._replace(residual=add is not None)
        return self.unit(steps, *relus)._replace(
            inputs=inputs,
            chain=tuple(pairs),
            shortcut=None if shortcut is None else self.pair(shortcut, None),
        )

    def pair(self, link: _Link, relu: int | None) -> Pair:
        conv, bn = (self.steps[i].module for i in link[:2])
        return Pair(conv, bn, "none" if relu is None else "relu")

    def unit(self, steps: list[int], *relus: int | None) -> Unit:
        indices = sorted([*steps, *(i for i in relus if i is not None)])
        kinds = (nn.ReLU, Eltwise)
        own = [i for i in indices if self.steps[i].call is None]
        skipped = [i for i in own if type(self.modules[i]) in kinds]
        every = tuple(self.steps[i] for i in indices)
        return Unit(
            every,
            every[0].inputs,
            every[-1].output,
            skipped=tuple((self.steps[i].module, type(self.modules[i])) for i in skipped),
            beside=tuple(step.module for step in self.between(every) if step.call is None),
        )


def units(
    modules: Mapping[str, nn.Module], steps: Sequence[Step], outputs: Iterable[int]
) -> list[Unit]:
    """All steps as units, in an order in which they can run.

    Steps become one only where nothing else reads what one of them hands to the next.
    """
    return _Finder(modules, steps, outputs).units()


def spent_after(units: Sequence[Unit], outputs: Iterable[int]) -> list[list[int]]:
    """Of each unit, the values that no later one reads."""
    spent: list[list[int]] = []
    needed = set(outputs)
    for unit in reversed(units):
        values = {v for step in unit.steps for v in (*step.inputs, step.output)}
        spent.insert(0, sorted(values - needed))
        needed |= values
    return spent


class FusedGraph(Fused):
    """A module that runs its ``units``, each as one where nothing stands against it."""

    if TYPE_CHECKING:
        units: Any  #: a sequence of Unit

    def fused_groups(self) -> list[Group]:
        return [self._group(unit) for unit in self.units if unit.skipped or unit.chain]

    def _group(self, unit: Unit) -> Group:
        return Group(unit.pairs, [(self.get(name), kind) for name, kind in unit.skipped])

    def find_pairs(self) -> list[Pair]:
        return [p for unit in self.units for p in unit.pairs]

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [skipped for group in self.fused_groups() for skipped in group.skipped]

    def run_steps(self, unit: Unit, values: dict[int, Any]) -> None:
        """Add to ``values`` what the steps of a unit make of them, one after the other."""
        raise NotImplementedError

    def run_unit(self, unit: Unit, values: dict[int, Any]) -> None:
        given = [values[i] for i in unit.inputs]
        if self._unit_obstacle(unit, given) is not None:
            self.run_steps(unit, values)
        elif unit.chain:
            residual = given[1] if len(given) > 1 else None
            values[unit.output] = self.run_chain(unit.chain, given[0], residual, unit.shortcut)
        else:
            m = self.get(unit.steps[0].module)
            act = "none" if len(unit.steps) == 1 else "relu"
            values[unit.output] = functional.eltwise_act(given, m.op, m.coeff, act)

    def _unit_obstacle(self, unit: Unit, given: list[Any]) -> str | None:
        if not unit.skipped and not unit.chain:
            return "it is a single layer"
        x, *others = given
        frozen = bool(unit.chain) and isinstance(self.get(unit.chain[0].conv), FrozenConv)
        if not frozen:
            group = self._group(unit)
            pairs = [self.modules_of(p) for p in group.pairs]
            reason = obstacle(pairs, group.skipped, x, *others[:1])
            if reason is not None:
                return reason
        if unit.chain and others:
            return self._sum_obstacle(unit, x, others[0])
        return None

    def _sum_obstacle(self, unit: Unit, x: Tensor, residual: Any) -> str | None:
        """What is added decides the sum's type and shape, in torch."""
        where = x.device.type
        cast = torch.is_autocast_enabled(where)
        dtype = torch.get_autocast_dtype(where) if cast else x.dtype
        if not isinstance(residual, Tensor) or residual.dtype != dtype:
            return "what is added is of another dtype"
        shape = tuple(x.shape)
        for p in unit.chain:
            conv = self.get(p.conv)
            geometry = conv.geometry if isinstance(conv, FrozenConv) else geometry_of(conv)
            shape = conv_shape(shape, conv.weight.shape, *geometry[:3])
        return None if tuple(residual.shape) == shape else "what is added is of another shape"
