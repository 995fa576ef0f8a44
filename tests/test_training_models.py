"""Whole networks in training, fused and torchvision's, from one seed, judged against float64.

At a freshly initialised network a difference grows from block to block until depth decides what
comes out. As in a trained one, every branch adds little to its shortcut here: the last BatchNorm's
scale is 0.2 (not zero, which would leave the branches without a gradient).
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from models import LAST, Ops, away_from_zero, images, stored
from tolerances import judge, judge_curve
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resnet
from fused_resnet.plan import MEMORY

STEPS, BATCH, CLASSES = 10, 4, 10

#: A small image's ReLUs have no input this close to zero, in deviations of it, and its max pooling
#: no two candidates so close to each other: rounding would tip them over by chance, see
#: :func:`models.away_from_zero`. Of a large image, many are.
TIPPING = 2.0**-22
SMALL = 64

#: (network, pixels, seeds that keep to TIPPING). By default resnet50's images are just large enough
#: for layer4 to see more than a pixel: its float64 run takes most of the time.
CASES = [("resnet18", 64, (0, 1)), ("resnet50", 40, (0,))]
LARGE = [
    ("resnet18", 64, (0, 1, 3)),
    ("resnet50", 64, (0, 5, 6)),
    ("resnext50_32x4d", 64, (0, 6, 8)),
    ("wide_resnet50_2", 64, (1, 5, 8)),
    *(
        (name, 224, (0, 1, 2))
        for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
    ),
]
over_cases = pytest.mark.parametrize(
    ("name", "pixels", "seeds"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES]
    + [
        pytest.param(*case, id=f"{case[0]}-{case[1]}-large", marks=pytest.mark.slow)
        for case in LARGE
    ],
)
over_autocast = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def network(name: str, seed: int) -> nn.Module:
    """torchvision's, in training, with tame branches."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, name)(num_classes=CLASSES)
    for m in model.modules():
        if type(m) in LAST:
            nn.init.constant_(getattr(m, LAST[type(m)]).weight, 0.2)
    return model.to(memory_format=torch.channels_last)


def batches(seed: int, pixels: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(count):
        x = images(100 * seed + i, BATCH, pixels)
        yield x, torch.arange(i, i + BATCH) % CLASSES


def loss_of(model: nn.Module, x: Tensor, target: Tensor, autocast: bool) -> Tensor:
    weight = next(model.parameters())
    x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(x), target)


def curve(model: nn.Module, seed: int, pixels: int, autocast: bool = False) -> list[float]:
    """The losses of the first steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x, target in batches(seed, pixels, STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x, target, autocast)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def true_curve(request: pytest.FixtureRequest, name: str, seed: int, pixels: int) -> list[float]:
    """In float64; kept from run to run."""
    return stored(
        request.config.cache.mkdir("truth"),
        (images, network, batches, loss_of, curve),
        (name, seed, pixels, STEPS, BATCH, CLASSES),
        lambda: curve(network(name, seed).double(), seed, pixels),
    )


@over_cases
def test_loss_curve(request, name, pixels, seeds):
    truth = [true_curve(request, name, seed, pixels) for seed in seeds]
    for autocast in (False, True):
        ours, eager = [], []
        for seed in seeds:
            model = network(name, seed)
            fused = fused_resnet.fuse(copy.deepcopy(model))
            ours.append(curve(fused, seed, pixels, autocast))
            eager.append(curve(model, seed, pixels, autocast))
        judge_curve(ours, eager, truth)


def first_step(model: nn.Module, seed: int, pixels: int, autocast: bool) -> dict[str, list[Tensor]]:
    """Gradients and running statistics, by kind."""
    ((x, target),) = batches(seed, pixels, 1)
    loss_of(model, x, target, autocast).backward()
    found: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        kind = f"{name.rpartition('.')[2]} of {p.dim()} dimensions"
        found.setdefault(kind, []).append(p.grad)
    for name, b in model.named_buffers():
        if b.is_floating_point():
            found.setdefault(name.rpartition(".")[2], []).append(b)
    return found


@contextlib.contextmanager
def close_calls(model: nn.Module) -> Iterator[list[float]]:
    """How close to being tipped over each call's closest value is, in deviations."""
    distances: list[float] = []

    def look(m: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach()
        if isinstance(m, nn.MaxPool2d):  # of what ReLU left: padding with zeros changes no maximum
            windows = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
            first, second = windows.unflatten(1, (x.size(1), -1)).topk(2, dim=2).values.unbind(2)
            closest = (first - second)[first > 0] / 2  # either may be rounded
        else:
            closest = x.abs()
        distances.append(float(closest.min() / x.std()))

    kinds = (nn.ReLU, nn.MaxPool2d)
    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, kinds)]
    yield distances
    for hook in hooks:
        hook.remove()


def check_first_step(name: str, pixels: int, seeds: Any, autocast: bool, memory: str) -> None:
    """By the rule, pooled over the seeds and the layers, each kind of tensor for itself."""
    sides: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for seed in seeds:
        model = away_from_zero(network(name, seed))
        exact, fused = copy.deepcopy(model).double(), copy.deepcopy(model)
        fused_resnet.fuse(fused, memory=memory)
        with Ops() as ops:
            results = [first_step(fused, seed, pixels, autocast)]
        blocks = sum(type(m) in LAST for m in model.modules())
        # Each block's own end, and the stem's.
        assert ops.names.count("relu_backward_reduce") >= blocks, "it did not train fused"
        assert ops.names.count("bn_act_maxpool_train") == 1, "the stem did not train fused"
        results += [first_step(model, seed, pixels, autocast)]
        with close_calls(exact) as distances:
            results += [first_step(exact, seed, pixels, False)]
        assert pixels > SMALL or min(distances) > TIPPING, f"seed {seed} leaves it to chance"
        for side, result in zip(sides, results, strict=True):
            for kind, tensors in result.items():
                side.setdefault(kind, []).extend(tensors)
    for kind in sides[0]:
        try:
            judge(*(side[kind] for side in sides))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None


@over_autocast
@over_cases
def test_gradients_and_statistics(name, pixels, seeds, autocast):
    """Of every parameter and of every BatchNorm, after one step."""
    check_first_step(name, pixels, seeds, autocast, "auto")


@pytest.mark.parametrize("memory", [m for m in MEMORY if m != "auto"])
def test_gradients_and_statistics_of_other_memory(memory):
    check_first_step("resnet50", 40, (0,), False, memory)


@pytest.mark.parametrize("wrong", [2.5, float("nan")])
def test_the_rule_for_curves_can_be_broken(wrong):
    """Eager is off by 0.01 at each step: twice that passes, wherever it is; more does not."""
    truth = [[2.0, 3.0], [4.0, 5.0]]
    eager = [[t + 0.01 for t in losses] for losses in truth]
    judge_curve([[2.0, 3.08], [4.0, 5.0]], eager, truth)
    with pytest.raises(AssertionError, match="losses deviate by"):
        judge_curve([[t + 0.01 * wrong for t in losses] for losses in truth], eager, truth)
