"""Networks, blocks and images the model tests share, and what float64 makes of them.

Freshly initialised networks hide mistakes: their BatchNorms do next to nothing. These have
statistics as training leaves them, and scales and shifts away from one and zero.
"""

import copy
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet.frozen_conv import FrozenConv

NAMES = fused_resnet.models.__all__
SEEDS = (0, 1, 2)
ENGINES = ("native", "vendor")  # those a frozen layer can be on
LAST = {BasicBlock: "bn2", Bottleneck: "bn3"}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(
    seed: int, batch: int, height: int, width: int | None = None, channels: int = 3
) -> Tensor:
    """Smooth random fields with a little noise: normalised photographs, as far as statistics go."""
    g = torch.Generator().manual_seed(seed)
    size = (height, width or height)
    x = 0.1 * torch.randn(batch, channels, *size, generator=g)
    for coarse in (3, 7, 17):
        field = torch.randn(batch, channels, coarse, coarse, generator=g)
        x += F.interpolate(field, size, mode="bicubic", align_corners=False) / 2
    return x


def settle(model: nn.Module, seed: int, *batches: Tensor) -> nn.Module:
    """Randomise BatchNorms' scales and shifts, set their statistics from ``batches``; to eval."""
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    # A trained network's branches add little to their shortcut; without that, errors explode.
    last = [getattr(m, LAST[type(m)]) for m in model.modules() if type(m) in LAST]
    with torch.no_grad():
        for m in norms:
            m.weight.uniform_(0.5, 1.5, generator=g).mul_(0.3 if m in last else 1)
            m.bias.normal_(0, 0.3, generator=g)
            if isinstance(m, FrozenBatchNorm2d):
                m.running_mean.normal_(0, 0.3, generator=g)
                m.running_var.uniform_(0.5, 2, generator=g)
            else:
                m.reset_running_stats()
                m.momentum = None  # the mean over the batches
        model.train()
        for x in batches:
            model(x)
    for m in norms:
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.eval()


@functools.lru_cache(maxsize=len(SEEDS))
def _network(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(torchvision.models, name)()
    return settle(model, seed, images(seed + 100, 8, 64), images(seed + 200, 8, 64))


def network(name: str, seed: int = 0) -> nn.Module:
    """A settled torchvision network in eval, the caller's own."""
    return copy.deepcopy(_network(name, seed))


def small(seed: int = 0, block: type[nn.Module] = Bottleneck, layers: int = 1) -> ResNet:
    """A settled ResNet of ``layers`` blocks a stage, fit for inputs from 33 pixels up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = {"width_per_group": 16} if issubclass(block, Bottleneck) else {}
        model = ResNet(block, [layers] * 4, num_classes=10, **wide)
    return settle(model, seed, images(seed + 100, 8, 64))


def away_from_zero(model: nn.Module) -> nn.Module:
    """Shift what BatchNorms put out, every other channel up and down, by two deviations.

    A ReLU's input that is zero but for rounding is tipped over by chance, and a single one in a
    deep layer changes gradients by more than all other rounding together. Here seven times fewer
    are near zero. Farther away there would be nothing a ReLU cuts, and without that, the next
    BatchNorm leaves a shift no gradient but rounding.
    """
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.bias.copy_(2 * m.weight)
                m.bias[1::2].neg_()
    return model


def bottleneck(seed: int = 0, planes: int = 8, **kwargs: int) -> Bottleneck:
    """A settled block for inputs of 24 channels; it projects its shortcut unless 6 planes wide."""
    return _block(Bottleneck, 24, planes, seed, kwargs)


def basic(seed: int = 0, planes: int = 32, **kwargs: int) -> BasicBlock:
    """A settled block for inputs of 24 channels; it projects its shortcut unless 24 planes wide."""
    return _block(BasicBlock, 24, planes, seed, kwargs)


def _block(kind: type, channels: int, planes: int, seed: int, kwargs: dict[str, int]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out, shortcut = planes * kind.expansion, None
        if out != channels or "stride" in kwargs:
            conv = conv1x1(channels, out, kwargs.get("stride", 1))
            shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))
        block = kind(channels, planes, downsample=shortcut, **kwargs)
    return settle(block, seed, images(seed + 100, 4, 16, channels=channels))


def double(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of ``model`` unfused, in float64, from the very values its tensors have."""
    model = fused_resnet.unfuse(copy.deepcopy(model)).double()
    with torch.no_grad():
        return model(*(x.double() for x in inputs))


def truth(
    folder: Path, name: str, seed: int, x: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`double` of a network rounded to ``dtype``, kept in ``folder``."""
    return stored(
        folder,
        (images, settle, _network, double),
        (name, seed, tuple(x.shape), str(dtype), x.numpy().tobytes()),
        lambda: double(network(name, seed).to(dtype), x.to(dtype)),
    )


def stored(folder: Path, makers: Iterable[Callable], facts: tuple, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, kept in ``folder`` until ``facts`` or makers' sources change."""
    sources = map(inspect.getsource, makers)
    key = repr((*sources, torch.__version__, torchvision.__version__, *facts))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"
    if not path.exists():
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), own)
        own.replace(path)
    return torch.load(path, weights_only=True)


class Ops(TorchDispatchMode):
    """Records the names of our ops that are called inside the ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fused_resnet"):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def runs_fused(model: nn.Module, *inputs: Tensor) -> bool:
    """Whether a call of ``model`` reaches any op of ours; gradients as the caller has them."""
    with Ops() as ops:
        model(*inputs)
    return bool(ops.names)


def same(plain: nn.Module, *inputs: Tensor) -> nn.Module:
    """Two steps of training and an evaluation, of a model and its fused copy; the latter.

    In float64, where no rounding decides on which side of a ReLU a value falls: what differs is a
    mistake.
    """
    model = fused_resnet.fuse(copy.deepcopy(plain))
    found = []
    for m in (model, plain):
        own, results = [x.clone().requires_grad_() for x in inputs], []
        for _ in range(2):
            outputs = tree_leaves(m.train()(*(x * 1 for x in own)))
            sum(y.pow(3).sum() for y in outputs).backward()
            results += outputs
        with torch.no_grad():
            results += tree_leaves(m.eval()(*(x.clone() for x in inputs)))
        # As one: a bias before a BatchNorm has no gradient but rounding.
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        statistics = [b for b in m.buffers() if b.is_floating_point()]
        nothing = inputs[0].new_zeros(1)  # where there is none of them
        joined = (torch.cat([nothing, *(t.flatten() for t in ts)]) for ts in (grads, statistics))
        found.append([*results, *(x.grad for x in own), *joined])
    judge(*found, found[1])
    return model


def frozen_layers(model: nn.Module) -> list[FrozenConv]:
    return [m for m in model.modules() if isinstance(m, FrozenConv)]


def on(frozen: nn.Module, engine: str) -> nn.Module:
    """``frozen`` with every layer on one engine: the tuner's choice varies from run to run."""
    for m in frozen_layers(frozen):
        m.engine = engine
    return frozen
