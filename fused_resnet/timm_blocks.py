"""Fused twins of timm's ResNet blocks and stems; :mod:`.convert` imports them when timm is there.

What timm puts between convolutions (attention, anti-aliasing, drop path, drop block) is called
where timm calls it, and the chains on either side of it are fused.
"""

from typing import Any

import torch
from timm.layers import conv_bn_act
from timm.layers import norm_act as timm_norm_act
from timm.models import resnet as timm_resnet
from torch import Tensor, nn

from . import functional
from .blocks import TWINS, Fused, Pair, Residual, Sequential, Stem, fused_forward


class _Residual(Residual):
    acts: tuple[str, ...] = ()

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [(self.get(name), nn.ReLU) for name in self.acts]

    def extras(self) -> list[nn.Module]:
        """What is more than a residual block: called as it is, at its place."""
        own = (self.drop_block, self.aa, self.se, self.drop_path)
        return [m for m in own if m is not None and type(m) is not nn.Identity]

    def run(self, x: Tensor) -> Tensor:
        if not self.extras():
            return super().run(x)
        y, rest = x, self.pairs()[: len(self.chain)]
        drops = type(self.drop_block) is not nn.Identity
        if drops or type(self.aa) is not nn.Identity:
            # They stand on either side of the last ReLU but one.
            y = self.run_chain(rest[:-1], y, act="none" if drops else "relu")
            rest = rest[-1:]
            if drops:
                y = self.get(self.acts[-2])(self.drop_block(y))
            y = self.aa(y)
        y = self.run_chain(rest, y, act="none")
        for extra in (self.se, self.drop_path):
            y = y if extra is None else extra(y)
        shortcut = self.shortcut(x)
        if y.dtype != shortcut.dtype or y.shape != shortcut.shape:  # as timm adds: in place
            y += shortcut
            return self.get(self.acts[-1])(y)
        return functional.add_act(y, shortcut)


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


def _is_deep(stem: Any) -> bool:
    """Whether a stem is a sequence that ends in a convolution, with conv, norm, act before it."""
    kinds = (nn.Sequential, Sequential)
    return type(stem) in kinds and len(stem) % 3 == 1 and isinstance(stem[-1], nn.Conv2d)


class ResNet(Stem, timm_resnet.ResNet):
    """timm's ResNet with a fused stem, of one convolution or of three."""

    def find_pairs(self) -> list[Pair]:
        if not _is_deep(self.conv1):
            return (
                [Pair("conv1", "bn1", "relu", relu="act1")]
                if isinstance(self.conv1, nn.Conv2d)
                else []
            )
        *before, last = (f"conv1.{name}" for name in self.conv1._modules)
        threes = zip(before[::3], before[1::3], before[2::3], strict=True)
        inner = [Pair(conv, bn, "relu", relu=relu) for conv, bn, relu in threes]
        return [*inner, Pair(last, "bn1", "relu", relu="act1")]

    def pools(self) -> bool:
        """Whether the stem ends in max pooling and nothing else."""
        return type(self.maxpool) is nn.MaxPool2d

    def skipped(self) -> list[tuple[nn.Module, type]]:
        acts = [(self.get(p.relu), nn.ReLU) for p in self.pairs() if p.relu]
        stem = [(self.conv1, type(self.conv1))] if _is_deep(self.conv1) else []
        return [*acts, *stem, *([(self.maxpool, nn.MaxPool2d)] if self.pools() else [])]

    def obstacle(self, x: Tensor) -> str | None:
        if self.grad_checkpointing:
            return "gradient checkpointing is on"
        return super().obstacle(x)

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x) if self.pools() else self.maxpool(self.run_chain(self.pairs(), x))

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


class ConvNormAct(Fused, conv_bn_act.ConvNormAct):
    """timm's ConvNormAct, fused, where its activation is ReLU or nothing."""

    norms = (timm_norm_act.BatchNormAct2d,)

    def find_pairs(self) -> list[Pair]:
        if not isinstance(self.conv, nn.Conv2d) or type(self.bn) not in self.norms:
            return []
        return [Pair("conv", "bn", "none" if type(self.bn.act) is nn.Identity else "relu")]

    def skipped(self) -> list[tuple[nn.Module, type]]:
        if type(self.bn) not in self.norms:
            return []
        acts = [(self.bn.act, nn.ReLU)] if self.pairs()[0].act == "relu" else []
        return [(self.bn.drop, nn.Identity), *acts]

    def run(self, x: Tensor) -> Tensor:
        y = self.link(self.pairs()[0], x)
        aa = getattr(self, "aa", None)
        return y if aa is None else aa(y)

    forward = fused_forward(conv_bn_act.ConvNormAct.forward)


TWINS.update(
    {
        conv_bn_act.ConvNormAct: ConvNormAct,
        timm_resnet.BasicBlock: BasicBlock,
        timm_resnet.Bottleneck: Bottleneck,
        timm_resnet.ResNet: ResNet,
    }
)
