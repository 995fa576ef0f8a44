"""The layer that :func:`fused_resnet.freeze` makes of a convolution and its BatchNorm in 8 bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference_int8
from .frozen_conv import FrozenConv, _unrecorded
from .modules import geometry_of

_CONV_INT8 = torch.ops.fused_resnet.conv_int8.default
_QUANTIZE = torch.ops.fused_resnet.quantize.default


@dataclass(frozen=True)
class Grid:
    """What bytes stand for: byte b for ``scale * (b - zero)``."""

    scale: float
    zero: int

    @classmethod
    def of(cls, least: float, most: float) -> "Grid":
        """The finest with a byte for zero that reaches from end to end, up to half a step."""
        least, most = min(least, 0.0), max(most, 0.0)
        if least == most:
            return cls(1.0, 0)
        scale = (most - least) / 255
        return cls(scale, round(-least / scale))

    def quantize(self, x: Tensor) -> Tensor:
        """The bytes nearest to x, on a CPU; what is not a number becomes the least."""
        return _unrecorded(_QUANTIZE, x, self.scale, self.zero)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in int8, and the step of each output channel: its largest value over 127."""
    step = weight.abs().amax((1, 2, 3)) / 127
    step = step.where(step > 0, torch.ones_like(step))
    steps = (weight / step.view(-1, 1, 1, 1)).round()
    return steps.to(torch.int8).contiguous(memory_format=torch.channels_last), step


class Int8Conv(FrozenConv):
    """A convolution and its BatchNorm in 8 bits: ``act(conv(x) * scale + shift + r * factor)``.

    The weight is int8, with BatchNorm's scale in it, of a step for each output channel; x is uint8.
    Sums are exact, the rest is float32. ``scale`` and ``shift`` give the result in steps of its
    grid, so that its bytes are got by rounding; shift also takes off what the zeros of x and of
    what is added stand for. What is packed is derived, as a :class:`FrozenConv`'s.

    Attributes:
        x: the grid of what is convolved; float32 is put on it first.
        residual: that of what is added. None: nothing is, or float32.
        out: that of the result. None: it is float32.
    """

    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        geometry: tuple[list[int], list[int], list[int], int],
        x: Grid,
        residual: Grid | None,
        out: Grid | None,
    ) -> None:
        super().__init__(weight, scale, shift, geometry)
        self.x, self.residual, self.out = x, residual, out

    @classmethod
    def rounded(
        cls, layer: FrozenConv, x: Grid, residual: Grid | None, out: Grid | None
    ) -> "Int8Conv":
        """A layer of float32 in 8 bits."""
        folded = layer.weight.double()
        if layer.scale is not None:
            folded = folded * layer.scale.double().view(-1, 1, 1, 1)
        weight, step = rounded(folded)
        scale, shift = step * x.scale, layer.shift.double()
        shift = shift - scale * weight.double().sum((1, 2, 3)) * x.zero
        if residual is not None:
            shift = shift - residual.scale * residual.zero
        unit = 1.0 if out is None else out.scale
        vectors = (scale / unit).float(), (shift / unit).float()
        return cls(weight, *vectors, layer.geometry, x, residual, out)

    @classmethod
    def blank(
        cls, conv: nn.Conv2d, x: Grid, residual: Grid | None = None, out: Grid | None = None
    ) -> "Int8Conv":
        """One whose tensors are yet to be loaded: on the meta device."""
        weight = torch.empty(
            conv.weight.shape, dtype=torch.int8, device="meta", memory_format=torch.channels_last
        )
        scale, shift = (torch.empty(conv.out_channels, device="meta") for _ in range(2))
        return cls(weight, scale, shift, geometry_of(conv), x, residual, out)

    @property
    def folded(self) -> bool:
        """Whether BatchNorm's scale is inside the weight."""
        return True

    @property
    def grids(self) -> dict[str, Grid | None]:
        """By the names of the attributes."""
        return {"x": self.x, "residual": self.residual, "out": self.out}

    def forward(self, x: Tensor, act: str = "none", residual: Tensor | None = None) -> Tensor:
        own = self._buffers  # past nn.Module.__getattr__, which is slow
        if x.dtype != torch.uint8:
            x = self.x.quantize(x)
        factor = 1.0 if self.out is None else 1 / self.out.scale
        if self.residual is not None and residual is not None:
            factor *= self.residual.scale
            if residual.dtype != torch.uint8:
                residual = self.residual.quantize(residual)
        vectors = (own["scale"], own["shift"], residual, factor)
        zero = None if self.out is None else self.out.zero
        args: Any = (x, self.x.zero, own["weight"], *vectors, *self.geometry, act, zero)
        if self.engine == "reference":
            return reference_int8.conv_int8(*args)
        # Compiled and exported programs carry plain weights only.
        if torch.compiler.is_compiling():
            return torch.ops.fused_resnet.conv_int8(*args)
        if self._packed is None:
            self._packed = torch.ops.fused_resnet.conv_int8_pack(self.weight, self.geometry[3])
        return _unrecorded(_CONV_INT8, *args, self._packed)

    def extra_repr(self) -> str:
        grids = (f"{name}={grid}" for name, grid in self.grids.items() if grid is not None)
        return ", ".join([super().extra_repr(), *grids])
