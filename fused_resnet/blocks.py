"""Fused twins of torchvision's blocks: the same class name, constructor, submodules and state_dict.

A twin's forward runs fused wherever :mod:`fused_resnet.conditions` finds no obstacle, and as the
class's own otherwise. ``functools.wraps`` makes torch.fx and torch.jit.script read that own one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops.misc import Conv2dNormActivation as TorchvisionConv2dNormActivation

from . import engines, functional, sites
from .conditions import BATCH_NORMS, hooked, obstacle, plain, trains
from .frozen_conv import FrozenConv
from .modules import (
    as_autocast,
    chain,
    conv_bn,
    conv_bn_chain,
    conv_bn_joined,
    convolve,
    convolve_averaged,
    convolve_pooled,
    geometry_of,
    joins,
    pair_scale_shift,
)
from .plan import Pool
from .reference import accumulation_dtype
from .tuning import asked

if TYPE_CHECKING:  # every fused class is a module too; its bases bring nn.Module in
    _Base = Any
else:
    _Base = object


class Pair(NamedTuple):
    """A convolution and its BatchNorm, as paths inside a block, with what follows them."""

    conv: str
    bn: str
    act: str = "none"
    residual: bool = False
    relu: str | None = None  #: the path of the activation, where that is a step of its own


class Group(NamedTuple):
    """What runs fused together, or not: pairs, and modules whose call is skipped."""

    pairs: list[Pair]
    skipped: list[tuple[nn.Module, type]]


class Fused(_Base):
    """What the fused classes share. A subclass lists its pairs and runs itself from them."""

    #: Set by freeze: the pairs, each of which has become one FrozenConv where its conv was. Set by
    #: fuse: what training may trade memory for. By tune: the way each pair goes, see sites.
    if TYPE_CHECKING:  # torch.jit.script takes a class's annotations for its own
        frozen_pairs: list[Pair] | None
        memory: str
        tuned: dict[str, str]
    else:
        frozen_pairs = None
        memory = "auto"
        tuned = None

    #: The types a BatchNorm may be of.
    norms: tuple[type, ...] = BATCH_NORMS

    def pairs(self) -> list[Pair]:
        """The pairs this module runs fused."""
        return self.find_pairs() if self.frozen_pairs is None else self.frozen_pairs

    def find_pairs(self) -> list[Pair]:
        raise NotImplementedError

    def skipped(self) -> list[tuple[nn.Module, type]]:
        """Modules besides the pairs whose call is skipped, each with the type it must be of."""
        return []

    def fused_groups(self) -> list[Group]:
        """The pairs by what an obstacle to one of them stops."""
        return [Group(self.pairs(), self.skipped())]

    def static_obstacle(self) -> str | None:
        """Why this module cannot run fused whatever its input is, but for what is of a pair."""
        if "forward" in self.__dict__:
            return "the block's forward is overridden on the instance"
        return None

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pair(self, p: Pair, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``."""
        conv = self.get(p.conv)
        if isinstance(conv, FrozenConv):
            return conv(x, p.act, residual)
        if asked(self.tuned):
            return sites.pair(conv, self.get(p.bn), x, p.act, residual)
        return conv_bn(conv, self.get(p.bn), x, p.act, residual)

    def link(self, p: Pair, x: Tensor) -> Tensor:
        """A pair that may train or not, whatever others do: ``act(bn(conv(x)))``."""
        if isinstance(self.get(p.conv), FrozenConv) or not trains([self.modules_of(p)], x):
            return self.pair(p, x)
        return conv_bn_chain(*self.modules_of(p), x, p.act)

    def engine_of(self, p: Pair) -> str:
        """The one that is asked for."""
        return engines.wish() if self.frozen_pairs is None else self.get(p.conv).engine

    def tensors_of(self, p: Pair) -> tuple[Any, Any, Any, Any]:
        """Weight, scale, shift and geometry of a pair."""
        conv, bn = self.modules_of(p)
        if self.frozen_pairs is not None:
            return conv.weight, conv.scale, conv.shift, conv.geometry
        return conv.weight, *pair_scale_shift(conv, bn), geometry_of(conv)

    def run_chain(
        self,
        pairs: Sequence[Pair],
        x: Tensor,
        residual: Tensor | None = None,
        shortcut: Pair | None = None,
        act: str | None = None,
    ) -> Tensor:
        """Pairs one after the other; to the last is added the residual, or what shortcut makes.

        ``act``: behind the last, in place of its own.
        """
        if act is not None:
            pairs = [*pairs[:-1], pairs[-1]._replace(act=act)]
        every = [*pairs] if shortcut is None else [*pairs, shortcut]
        modules = [self.modules_of(p) for p in every]
        own = None if shortcut is None else modules[-1]
        frozen = isinstance(modules[0][0], FrozenConv)
        if not frozen and trains(modules, x, residual):
            same = residual is x
            return chain(
                modules[: len(pairs)],
                x,
                None if same else residual,
                shortcut=own,
                identity=same,
                act=pairs[-1].act,
                memory=self.memory,
            )
        joined = own is not None and not frozen and joins(own[0], x)
        if shortcut is not None and not joined:
            residual = self.pair(shortcut, x)
        y = x
        for p in pairs:
            if p.residual and own is not None and joined:
                y = conv_bn_joined(self.modules_of(p), own, y, x, p.act)
            else:
                y = self.pair(p, y, residual if p.residual else None)
        return y

    def get(self, path: str) -> Any:
        m: Any = self
        for name in path.split("."):
            m = m._modules[name]
        return m

    def modules_of(self, p: Pair) -> tuple[Any, Any]:
        return self.get(p.conv), self.get(p.bn)

    def obstacle(self, x: Tensor) -> str | None:
        """Why this module does not run fused for ``x`` right now, or None."""
        if self.frozen_pairs is not None:
            return None
        pairs = [self.modules_of(p) for p in self.pairs()]
        return obstacle(pairs, self.skipped(), x, norms=self.norms)

    def trains(self, x: Tensor) -> bool:
        """Whether this call needs batch statistics or a backward."""
        return self.frozen_pairs is None and trains(map(self.modules_of, self.pairs()), x)


def fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """A twin's method that runs fused where nothing stands against it, else as ``original``."""

    @functools.wraps(original)
    def forward(self: Any, x: Any) -> Any:
        if self.obstacle(x) is not None:
            return original(self, x)
        if self.frozen_pairs is None and asked(self.tuned):
            return sites.forward(self, x, original)
        return self.run(x)

    return forward


def _is_conv_bn(m: nn.Module | None) -> bool:
    """Whether a shortcut is a convolution and its BatchNorm, and nothing else."""
    return (
        isinstance(m, nn.Sequential)
        and len(m) == 2
        and isinstance(m[0], nn.Conv2d)
        and isinstance(m[1], BATCH_NORMS)
        and not m._forward_hooks
        and not m._forward_pre_hooks
    )


_SHORTCUT = Pair("downsample.0", "downsample.1")


class Residual(Fused):
    """A residual block: its convolutions one after the other, the last with the shortcut added."""

    if TYPE_CHECKING:
        chain: tuple[Pair, ...]
        downsample: nn.Module | None
        relu: nn.Module

    def find_pairs(self) -> list[Pair]:
        return [*self.chain, _SHORTCUT] if _is_conv_bn(self.downsample) else list(self.chain)

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [(self.relu, nn.ReLU)]

    def run(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return self.run_chain(self.chain, x, x)
        if _SHORTCUT in self.pairs():
            return self.run_chain(self.chain, x, shortcut=_SHORTCUT)
        return self.run_chain(self.chain, x, self.downsample(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        return self.link(_SHORTCUT, x) if _SHORTCUT in self.pairs() else self.downsample(x)

    def run_pooled(self, x: Tensor) -> Tensor | None:
        """The means of :meth:`run`'s images, which are not stored; None where that cannot be."""
        last = self.chain[-1]
        engine = self.engine_of(last)
        if (
            self.downsample is not None
            or not engines.pools("conv_bn_act_avgpool", engine, x.device.type, x.dtype)
            or hooked(self.get(last.conv))
            or as_autocast(x) is not x
            or self.obstacle(x) is not None
            or self.trains(x)
        ):
            return None
        y = x
        for p in self.chain[:-1]:
            y = self.pair(p, y)
        return convolve_averaged(engine, y, *self.tensors_of(last), x, last.act)


class BasicBlock(Residual, torchvision_resnet.BasicBlock):
    """:class:`torchvision.models.resnet.BasicBlock`, fused."""

    chain = (Pair("conv1", "bn1", "relu"), Pair("conv2", "bn2", "relu", residual=True))
    forward = fused_forward(torchvision_resnet.BasicBlock.forward)


class Bottleneck(Residual, torchvision_resnet.Bottleneck):
    """:class:`torchvision.models.resnet.Bottleneck`, fused."""

    chain = (
        Pair("conv1", "bn1", "relu"),
        Pair("conv2", "bn2", "relu"),
        Pair("conv3", "bn3", "relu", residual=True),
    )
    forward = fused_forward(torchvision_resnet.Bottleneck.forward)


class Stem(Fused):
    """A network that begins with convolutions, each with BatchNorm and ReLU, and max pooling."""

    relu_name = "relu"
    grid: Any = None  #: set by freeze: an :class:`fused_resnet.int8.Grid` if it passes on bytes

    def find_pairs(self) -> list[Pair]:
        return [Pair("conv1", "bn1", "relu")]

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [(self.get(self.relu_name), nn.ReLU), (self.maxpool, nn.MaxPool2d)]

    def obstacle(self, x: Tensor) -> str | None:
        if getattr(self.maxpool, "return_indices", False):
            return "maxpool returns indices"
        if (
            isinstance(self.maxpool, nn.MaxPool2d)
            and math.prod(_pair(self.maxpool.kernel_size)) > 255
        ):
            return "maxpool has a window of more than 255 positions"
        return super().obstacle(x)

    def stem(self, x: Tensor) -> Tensor:
        """``maxpool(relu(bn1(conv1(x))))``: the last convolution's output is read once, as it is;
        where the engine that is asked for has an op for all of it, not at all."""
        *first, last = self.pairs()
        x = self.run_chain(first, x) if first else x
        maxpool = self.maxpool
        sizes = (maxpool.kernel_size, maxpool.stride, maxpool.padding, maxpool.dilation)
        kernel, stride, padding, dilation = (list(_pair(size)) for size in sizes)
        pool = Pool(kernel, stride, padding, dilation, maxpool.ceil_mode)
        frozen, conv = self.frozen_pairs is not None, self.get(last.conv)
        if self.trains(x):
            return chain([self.modules_of(last)], x, pool=pool, memory=self.memory)
        own = self.tensors_of(last)
        if not (frozen and hooked(conv)):
            given = x if frozen else as_autocast(x)
            if (y := convolve_pooled(self.engine_of(last), given, *own, pool)) is not None:
                return y
        if frozen:
            y, act = self.pair(last, x), "none"
            # Nothing is left to do but to pool, in which ours is twice as fast as torch.
            scale = y.new_ones(y.size(1), dtype=accumulation_dtype(y.dtype))
            shift = torch.zeros_like(scale)
        else:
            y, act = convolve(conv, x), "relu"
            _, scale, shift, _ = own
        y = functional.bn_act_maxpool(y, scale, shift, *pool, act)
        return y if self.grid is None else self.grid.quantize(y)


#: On a CPU a frozen ResNet takes a batch through its large images in slices of about this many
#: pixels (four images of 224x224), whose activations are smaller than today's caches, and so many
#: slices at once through the rest, whose weights are the larger part; the result is the same image
#: by image.
_SLICE_PIXELS = 4 * 224 * 224
_SLICES = 4


class ResNet(Stem, torchvision_resnet.ResNet):
    """:class:`torchvision.models.ResNet` with a fused stem."""

    def run(self, x: Tensor) -> Tensor:
        # The layout inside is ours to choose: what comes out has been flattened.
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.compiler.is_compiling():  # a program asked about its batch is for no other
            return self.fc(self.back(self.front(x)))
        images = max(1, _SLICE_PIXELS // max(1, x.size(2) * x.size(3)))
        if x.size(0) <= images or not self.slices(x):
            return self.fc(self.back(self.front(x)))
        groups = [group.split(images) for group in x.split(_SLICES * images)]
        fronts = (torch.cat([self.front(part) for part in group]) for group in groups)
        return self.fc(torch.cat([self.back(y) for y in fronts]))

    def front(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))

    def back(self, x: Tensor) -> Tensor:
        return torch.flatten(self.end(self.layer3(x)), 1)

    def end(self, x: Tensor) -> Tensor:
        """``avgpool(layer4(x))``, without the image in between where nobody would see it."""
        if self.end_is_watched():
            return self.avgpool(self.layer4(x))
        *blocks, last = self.layer4
        for block in blocks:
            x = block(x)
        y = last.run_pooled(x)
        return self.avgpool(last(x)) if y is None else y

    def end_is_watched(self) -> bool:
        """Whether anybody would notice if layer4, its last block and avgpool were not called."""
        if nn_module._has_any_global_hook() or plain(self.layer4, (nn.Sequential,)) is not None:
            return True
        pooled = plain(self.avgpool, (nn.AdaptiveAvgPool2d,)) is None
        if not pooled or _pair(self.avgpool.output_size) != (1, 1) or not len(self.layer4):
            return True
        return plain(self.layer4[-1], (BasicBlock, Bottleneck)) is not None

    def slices(self, x: Tensor) -> bool:
        """Whether a batch may be cut: all that runs is ours or torch's, and nobody is watching."""
        if self.frozen_pairs is None or x.device.type != "cpu":
            return False
        own = (self.layer1, self.layer2, self.layer3, self.layer4, self.avgpool)
        kinds = (Fused, FrozenConv, nn.Sequential, nn.ReLU, nn.Identity, nn.AdaptiveAvgPool2d)
        within = [m for layer in own for m in layer.modules()]
        return all(isinstance(m, kinds) and not hooked(m) for m in within)

    forward = fused_forward(torchvision_resnet.ResNet.forward)


class Chained(Fused):
    """A sequence in which a convolution, its BatchNorm and maybe a ReLU are one step."""

    def find_pairs(self) -> list[Pair]:
        names = list(self._modules)
        found = []
        for i, (name, following) in enumerate(itertools.pairwise(names)):
            conv, bn = self._modules[name], self._modules[following]
            if isinstance(conv, nn.Conv2d) and isinstance(bn, BATCH_NORMS):
                after = names[i + 2] if i + 2 < len(names) else None
                relu = after if after and type(self._modules[after]) is nn.ReLU else None
                found.append(Pair(name, following, "relu" if relu else "none", relu=relu))
        return found

    def skipped(self) -> list[tuple[nn.Module, type]]:
        return [(self.get(p.relu), nn.ReLU) for p in self.pairs() if p.relu]

    def run(self, x: Tensor) -> Any:
        pairs = {p.conv: p for p in self.pairs()}
        names = iter(self._modules)
        for name in names:
            x, _ = self.step(name, names, pairs, x)
        return x

    def step(
        self, name: str, rest: Iterator[str], pairs: dict[str, Pair], x: Tensor
    ) -> tuple[Tensor, str]:
        """What the module ``name`` begins, and the last module of that; ``rest`` moves up to it."""
        if name not in pairs:
            return self._modules[name](x), name
        last = pairs[name].relu or pairs[name].bn
        while next(rest) != last:
            pass
        return self.link(pairs[name], x), last


class Sequential(Chained, nn.Sequential):
    """:class:`torch.nn.Sequential` holding conv, BatchNorm and ReLU in a row, fused."""

    forward = fused_forward(nn.Sequential.forward)


class Conv2dNormActivation(Chained, TorchvisionConv2dNormActivation):
    """:class:`torchvision.ops.Conv2dNormActivation`, fused."""

    forward = fused_forward(TorchvisionConv2dNormActivation.forward)


#: What fuse swaps: the class a module must be of, exactly, and its fused twin.
TWINS: dict[type, type] = {
    torchvision_resnet.BasicBlock: BasicBlock,
    torchvision_resnet.Bottleneck: Bottleneck,
    torchvision_resnet.ResNet: ResNet,
    nn.Sequential: Sequential,
    TorchvisionConv2dNormActivation: Conv2dNormActivation,
}
