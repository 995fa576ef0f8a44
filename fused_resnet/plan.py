"""What a chain of convolutions and BatchNorms is to :mod:`fused_resnet.training`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: What a fused module may trade memory for, see :func:`fused_resnet.fuse`.
MEMORY = ("auto", "lean", "fast")

#: Positions per input channel from which a 1x1 convolution's statistics are taken from its input's
#: Gram matrix: below, the products of C x C matrices cost more than the passes over y they save.
GRAM_ROWS = 24
#: The same at a chain's end in float32, where it saves most memory: lower, as y need not be kept.
#: Half types, whose passes over y cost half as much, would pay too dearly for it.
GRAM_ROWS_FOR_MEMORY = 3


class Pool(NamedTuple):
    """A max pooling that follows the activation."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool


class Step(NamedTuple):
    """A convolution and its BatchNorm: what is not a tensor."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    eps: float
    batch: bool  #: statistics of the batch; else the running ones
    momentum: float  #: the batch's share in the new running statistics

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as convolutions take them."""
        return self.stride, self.padding, self.dilation, self.groups


class Params(NamedTuple):
    """A convolution and its BatchNorm: its tensors. Running ones are None where none are kept."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Plan(NamedTuple):
    """What a chain computes: ``act(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + residual)``."""

    steps: tuple[Step, ...]
    shortcut: Step | None  #: of x, in place of the residual
    identity: bool  #: x itself in place of the residual
    act: str
    pool: Pool | None
    engine: str  #: the wish at the time of forward; backward runs elsewhere
    group: Any  #: processes whose batches count as one, or None
    memory: str  #: one of MEMORY
    fused: bool = False  #: run by engines.CHAIN_OPS


class Source(NamedTuple):
    """What the input of a step is made of: ``act(x * scale + shift)``."""

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"


class Kept(NamedTuple):
    """What backward needs of a step."""

    y: Tensor | None  #: raw output; None where it was never made, or is made again
    scale: Tensor
    shift: Tensor
    mean: Tensor  #: of y; where y was never made, about the product of weight and center
    invstd: Tensor
    weight: Tensor | None = None  #: cast to the activations' type, where it is of another
    center: Tensor | None = None
    moments: Tensor | None = None  #: see moments.Gram


#: Of a step: of its weight, bias, gamma and beta.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def is_pointwise(step: Step, weight: Tensor) -> bool:
    """Whether a step's convolution is a matrix product over channels, of a grid of positions."""
    down, across = step.stride
    product = weight.shape[2:] == (1, 1) and step.groups == 1 and not any(step.padding)
    return product and down == across


def positions(shape: Sequence[int], step: Step) -> int:
    """How many positions of its input, of that shape, a 1x1 convolution reads."""
    return shape[0] * -(-shape[2] // step.stride[0]) * -(-shape[3] // step.stride[1])


def cast_weight(p: Params, z: Tensor) -> Tensor | None:
    """A step's weight in z's type, where it is of another."""
    return None if p.weight.dtype == z.dtype else p.weight.to(z.dtype)


def keeps_output(
    plan: Plan, step: Step, p: Params, shape: Sequence[int], dtype: torch.dtype
) -> bool:
    """Whether a step that ends a chain makes and keeps its raw output; of its input's shape."""
    if p.bias is not None:
        return True
    if not step.batch:
        return False
    for_memory = plan.memory != "fast" and step is not plan.shortcut
    least = GRAM_ROWS_FOR_MEMORY if for_memory and dtype.itemsize >= 4 else GRAM_ROWS
    # Positions that a product does not read have no part in its backward: a shortcut's sees to it.
    skips = step.stride != [1, 1] and step is not plan.shortcut
    few = positions(shape, step) < least * shape[1]
    return not is_pointwise(step, p.weight) or skips or few


def convolve(z: Tensor, p: Params, step: Step, weight: Tensor) -> Tensor:
    """A step's convolution, with its weight in z's type."""
    bias = None if p.bias is None else p.bias.to(z.dtype)
    return F.conv2d(z, weight, bias, *step.geometry)
