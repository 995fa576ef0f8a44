"""Fused twins of torchvision's segmentation heads, and of what takes features from a backbone."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models import _utils
from torchvision.models.segmentation import deeplabv3, fcn

from .blocks import TWINS, Chained, Pair, fused_forward


class ASPPConv(Chained, deeplabv3.ASPPConv):
    """torchvision's ASPPConv, fused."""

    forward = fused_forward(nn.Sequential.forward)


class DeepLabHead(Chained, deeplabv3.DeepLabHead):
    """torchvision's DeepLabHead, fused."""

    forward = fused_forward(nn.Sequential.forward)


class FCNHead(Chained, fcn.FCNHead):
    """torchvision's FCNHead, fused."""

    forward = fused_forward(nn.Sequential.forward)


class IntermediateLayerGetter(Chained, _utils.IntermediateLayerGetter):
    """torchvision's IntermediateLayerGetter, fused where what is inside a pair is not asked for."""

    def find_pairs(self) -> list[Pair]:
        asked = self.return_layers
        return [p for p in super().find_pairs() if p.conv not in asked and p.bn not in asked]

    def run(self, x: Tensor) -> Any:
        pairs = {p.conv: p for p in self.pairs()}
        names, found = iter(self._modules), OrderedDict()
        for name in names:
            x, last = self.step(name, names, pairs, x)
            if last in self.return_layers:
                found[self.return_layers[last]] = x
        return found

    forward = fused_forward(_utils.IntermediateLayerGetter.forward)


TWINS.update(
    {
        _utils.IntermediateLayerGetter: IntermediateLayerGetter,
        deeplabv3.ASPPConv: ASPPConv,
        deeplabv3.DeepLabHead: DeepLabHead,
        fcn.FCNHead: FCNHead,
    }
)
