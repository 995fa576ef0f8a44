"""What of a Caffe network may run as one."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .blocks import Pair
from .caffe_layers import Eltwise


class Step(NamedTuple):
    """A module, by name, and what it reads and makes: values by number, 0 is the input."""

    module: str
    inputs: tuple[int, ...]
    output: int


class Unit(NamedTuple):
    """Steps that may run as one: a chain of convolutions, or an Eltwise; else a single step.

    Attributes:
        steps: in order; the last one makes ``output``.
        inputs: of a chain its input and, unless its shortcut makes it, what is added to its end.
        chain: its convolutions and BatchNorms.
        shortcut: one more pair, of the same input, whose result is added to the chain's end.
        skipped: modules whose call is part of the chain or the Eltwise, with their types.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    output: int
    chain: tuple[Pair, ...] = ()
    shortcut: Pair | None = None
    skipped: tuple[tuple[str, type], ...] = ()

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
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, step in enumerate(steps):
            for value in step.inputs:
                self.readers[value].append(i)

    def follower(self, i: int, kind: type) -> int | None:
        """The step that alone reads what step ``i`` makes, if it is of this kind."""
        value = self.steps[i].output
        readers = self.readers[value]
        alone = len(readers) == 1 and value not in self.kept
        return readers[0] if alone and type(self.modules[readers[0]]) is kind else None

    def chains(self) -> list[list[_Link]]:
        """Convolutions in a row, each with its BatchNorm, and all but the last with a ReLU."""
        links: dict[int | None, _Link] = {}
        for i, m in enumerate(self.modules):
            if type(m) is nn.Conv2d and (bn := self.follower(i, nn.BatchNorm2d)) is not None:
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
            if type(m) is Eltwise and i not in ends:
                units.append(self.unit([i], self.follower(i, nn.ReLU)))
        done = {step for unit in units for step in unit.steps}
        units += [Unit((s,), s.inputs, s.output) for s in self.steps if s not in done]
        return sorted(units, key=lambda unit: self.steps.index(unit.steps[-1]))

    def adds_two(self, eltwise: int) -> bool:
        m = self.modules[eltwise]
        return m.op == "sum" and m.coeff is None and len(self.steps[eltwise].inputs) == 2

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
        skipped = [i for i in indices if type(self.modules[i]) in (nn.ReLU, Eltwise)]
        return Unit(
            tuple(self.steps[i] for i in indices),
            self.steps[indices[0]].inputs,
            self.steps[indices[-1]].output,
            skipped=tuple((self.steps[i].module, type(self.modules[i])) for i in skipped),
        )


def units(
    modules: Mapping[str, nn.Module], steps: Sequence[Step], outputs: Iterable[int]
) -> list[Unit]:
    """All steps as units, in an order in which they can run.

    Steps become one only where nothing else reads what one of them hands to the next.
    """
    return _Finder(modules, steps, outputs).units()
