"""The table of layers: every convolution of a network, by block, from running it on no data."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fused_resnet import checkpoints, fuse
from fused_resnet.blocks import Fused

#: Whose layers the ops are measured at; the first comes first wherever there is not time for all.
NETWORKS = ("resnet50", "resnet18", "resnet101", "resnext50_32x4d", "wide_resnet50_2")


class Layer(NamedTuple):
    """A convolution with its BatchNorm and what follows; what is counted is for one image."""

    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    act: str
    residual: bool

    def __str__(self) -> str:
        text = f"{self.in_channels}x{self.height}x{self.width}-"
        text += "x".join(map(str, self.kernel))
        text += f"s{self.stride[0]}" if max(self.stride) > 1 else ""
        text += f"g{self.groups}" if self.groups > 1 else ""
        text += f"-{self.out_channels}" + ("-add" if self.residual else "")
        return text + ("-relu" if self.act == "relu" else "")

    @property
    def made(self) -> tuple[int, int, int]:
        """The shape of its output."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, strict=True)
        height, width = ((size + 2 * pad - k) // step + 1 for size, k, step, pad in sizes)
        return self.out_channels, height, width

    @property
    def x(self) -> int:
        """Elements of its input."""
        return self.in_channels * self.height * self.width

    @property
    def read(self) -> int:
        """Of them those it reads: a kernel smaller than its stride leaves some out."""
        read = self.x
        for kernel, stride in zip(self.kernel, self.stride, strict=True):
            read = read * min(kernel, stride) // stride
        return read

    @property
    def y(self) -> int:
        """Elements of its output."""
        channels, height, width = self.made
        return channels * height * width

    @property
    def weights(self) -> int:
        height, width = self.kernel
        return self.out_channels * (self.in_channels // self.groups) * height * width

    @property
    def flops(self) -> int:
        """Two for each product."""
        return 2 * self.y * self.weights // self.out_channels


class Block(NamedTuple):
    """Convolutions one after the other, and beside them, maybe, one that projects."""

    name: str  #: in the network; empty for its first convolution
    convs: list[Layer]
    projection: Layer | None

    @property
    def layers(self) -> list[Layer]:
        return [*self.convs, *([self.projection] if self.projection else [])]


@functools.lru_cache(maxsize=16)
def table(network: str, size: int) -> list[Block]:
    """The blocks of a ResNet for images of ``size`` pixels, in the order it runs them."""
    found: dict[str, dict[str, Layer]] = {}
    with torch.device("meta"):
        model = fuse(checkpoints.build(network).eval())
    for name, block in model.named_modules():
        if isinstance(block, Fused):
            found[name] = {}
            for p in block.pairs():
                conv = block.get(p.conv)

                def note(m, args, conv=conv, p=p, there=found[name]) -> None:
                    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
                    shape = (*args[0].shape[1:], conv.out_channels)
                    there[p.conv] = Layer(*shape, *geometry, p.act, p.residual)

                conv.register_forward_pre_hook(note)  # and so the block runs unfused
    model(torch.empty(1, 3, size, size, device="meta"))
    blocks = []
    for name, convs in found.items():
        projection = next((conv for conv in convs if conv.startswith("downsample")), None)
        chain = [layer for conv, layer in convs.items() if conv != projection]
        blocks.append(Block(name, chain, convs[projection] if projection else None))
    return blocks


def layers(networks: Iterable[str], size: int) -> list[Layer]:
    """The distinct convolutions of networks, in the order they run them."""
    several = (block for name in networks for block in table(name, size))
    return list(dict.fromkeys(layer for block in several for layer in block.layers))


#: Where an op is called: at a layer, or at the output of one.
Place = Layer | tuple[int, int, int]


@functools.lru_cache(maxsize=4)
def places(networks: tuple[str, ...], size: int) -> dict[str, list[Place]]:
    """The distinct ones, by what is there."""
    several = [table(name, size) for name in networks]
    blocks = [block for of in several for block in of if block.name]
    found: dict[str, list[Place]] = {
        "layers": [*layers(networks, size)],
        "layers but the first": [layer for block in blocks for layer in block.layers],
        "outputs": [layer.made for layer in layers(networks, size)],
        "the stem's": [of[0].convs[0].made for of in several],
        "blocks' outputs": [block.convs[-1].made for block in blocks],
        "the last output": [of[-1].convs[-1].made for of in several],
    }
    return {where: list(dict.fromkeys(these)) for where, these in found.items()}
