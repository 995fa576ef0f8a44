"""The network that :func:`fused_resnet.caffe.load` returns, and its fused twin."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import functional
from .blocks import TWINS, Fused, Group, Pair
from .caffe_units import Step, Unit, units
from .conditions import obstacle
from .frozen_conv import FrozenConv
from .reference import suggests_channels_last


class CaffeNet(nn.Module):
    """A network of Caffe layers: modules of their names, in which ``.`` is written ``_``.

    A BatchNorm layer and the Scale behind it are one :class:`torch.nn.BatchNorm2d`, named after the
    first. It returns what no layer reads: a tensor, or where there are several, a dictionary.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], steps: Sequence[Step], outputs: Mapping[str, int]
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.outputs = dict(outputs)
        self.units = units(modules, steps, outputs.values())
        #: Of each unit, the values that no later one reads.
        self.spent: list[list[int]] = []
        needed = set(outputs.values())
        for unit in reversed(self.units):
            values = {v for step in unit.steps for v in (*step.inputs, step.output)}
            self.spent.insert(0, sorted(values - needed))
            needed |= values

    def forward(self, x: Tensor) -> Any:
        values = {0: x}
        for unit, spent in zip(self.units, self.spent, strict=True):
            self.run_unit(unit, values)
            for value in spent:
                values.pop(value, None)
        found = {name: values[value] for name, value in self.outputs.items()}
        return found if len(found) > 1 else found.popitem()[1]

    def run_unit(self, unit: Unit, values: dict[int, Tensor]) -> None:
        """Add to ``values`` what a unit makes of them."""
        for step in unit.steps:
            module: Any = self._modules[step.module]
            values[step.output] = module(*(values[i] for i in step.inputs))


class FusedCaffeNet(Fused, CaffeNet):
    """:class:`CaffeNet` in which every unit runs as one that nothing stands against."""

    def fused_groups(self) -> list[Group]:
        return [self._group(unit) for unit in self.units if unit.skipped or unit.chain]

    def _group(self, unit: Unit) -> Group:
        return Group(unit.pairs, [(self.get(name), kind) for name, kind in unit.skipped])

    def find_pairs(self) -> list[Pair]:
        return [p for unit in self.units for p in unit.pairs]

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [skipped for group in self.fused_groups() for skipped in group.skipped]

    def forward(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return super().forward(x)
        last = suggests_channels_last(x)
        layout = torch.channels_last if last else torch.contiguous_format
        y = super().forward(x.contiguous(memory_format=torch.channels_last))
        return tree_map(lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t, y)

    def run_unit(self, unit: Unit, values: dict[int, Tensor]) -> None:
        given = [values[i] for i in unit.inputs]
        frozen = bool(unit.chain) and type(self.get(unit.chain[0].conv)) is FrozenConv
        if not frozen and self._unit_obstacle(unit, given) is not None:
            super().run_unit(unit, values)
        elif unit.chain:
            residual = given[1] if len(given) > 1 else None
            values[unit.output] = self.run_chain(unit.chain, given[0], residual, unit.shortcut)
        else:
            m = self.get(unit.steps[0].module)
            act = "none" if len(unit.steps) == 1 else "relu"
            values[unit.output] = functional.eltwise_act(given, m.op, m.coeff, act)

    def _unit_obstacle(self, unit: Unit, given: list[Tensor]) -> str | None:
        if not unit.skipped and not unit.chain:
            return "it is a single layer"
        x, *others = given
        group = self._group(unit)
        reason = obstacle([self.modules_of(p) for p in group.pairs], group.skipped, x, *others[:1])
        if reason is None and unit.chain and others:
            where = x.device.type
            cast = torch.is_autocast_enabled(where)
            dtype = torch.get_autocast_dtype(where) if cast else x.dtype
            if others[0].dtype != dtype:  # what is added decides the sum's type, in torch
                return "what is added is of another dtype"
        return reason


TWINS[CaffeNet] = FusedCaffeNet
