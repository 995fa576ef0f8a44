"""Fused twins of timm's ResNet blocks and stem; :mod:`fused_resnet.convert` imports them with timm.

Attention, anti-aliasing, drop path and drop block are left to timm: a block that has one runs
unfused, and the report names it.
"""

import torch
from timm.models import resnet as timm_resnet
from torch import Tensor, nn

from .blocks import TWINS, Pair, Residual, Stem, fused_forward


class _Residual(Residual):
    acts: tuple[str, ...] = ()

    def skipped(self) -> list[tuple[nn.Module, type]]:
        extras = [self.drop_block, self.aa, self.se, self.drop_path]
        return [
            *((self.get(name), nn.ReLU) for name in self.acts),
            *((m, nn.Identity) for m in extras if m is not None),
        ]


class BasicBlock(_Residual, timm_resnet.BasicBlock):
    """timm's BasicBlock, fused."""

    acts = ("act1", "act2")
    chain = (Pair("conv1", "bn1", "relu"), Pair("conv2", "bn2", "relu", residual=True))
    forward = fused_forward(timm_resnet.BasicBlock.forward)


class Bottleneck(_Residual, timm_resnet.Bottleneck):
    """timm's Bottleneck, fused."""

    acts = ("act1", "act2", "act3")
    chain = (
        Pair("conv1", "bn1", "relu"),
        Pair("conv2", "bn2", "relu"),
        Pair("conv3", "bn3", "relu", residual=True),
    )
    forward = fused_forward(timm_resnet.Bottleneck.forward)


class ResNet(Stem, timm_resnet.ResNet):
    """timm's ResNet with a fused stem, where that is a single convolution."""

    relu_name = "act1"

    def obstacle(self, x: Tensor) -> str | None:
        if self.grad_checkpointing:
            return "gradient checkpointing is on"
        return super().obstacle(x)

    def run(self, x: Tensor) -> Tensor:
        """The feature map, in the layout that the input asks for."""
        layout = torch.channels_last
        if x.is_contiguous() and not x.is_contiguous(memory_format=layout):
            layout = torch.contiguous_format
        y = self.stem(x.contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            y = self.get(name)(y)
        return y.contiguous(memory_format=layout)

    forward_features = fused_forward(timm_resnet.ResNet.forward_features)


TWINS.update(
    {
        timm_resnet.BasicBlock: BasicBlock,
        timm_resnet.Bottleneck: Bottleneck,
        timm_resnet.ResNet: ResNet,
    }
)
