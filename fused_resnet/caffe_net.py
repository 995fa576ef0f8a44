"""The network that :func:`fused_resnet.caffe.load` returns, and its fused twin."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import sites
from .blocks import TWINS
from .graph_units import FusedGraph, Step, Unit, spent_after, units
from .reference import suggests_channels_last
from .tuning import asked


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
        self.spent = spent_after(self.units, outputs.values())

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


class FusedCaffeNet(FusedGraph, CaffeNet):
    """:class:`CaffeNet` in which every unit runs as one that nothing stands against."""

    def forward(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return super().forward(x)
        if asked(self.tuned) and self.obstacle(x) is None:
            return sites.forward(self, x, CaffeNet.forward)
        return self.run(x)

    def run(self, x: Tensor) -> Any:
        last = suggests_channels_last(x)
        layout = torch.channels_last if last else torch.contiguous_format
        y = super().forward(x.contiguous(memory_format=torch.channels_last))
        return tree_map(lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t, y)

    def run_steps(self, unit: Unit, values: dict[int, Any]) -> None:
        CaffeNet.run_unit(self, unit, values)


TWINS[CaffeNet] = FusedCaffeNet
