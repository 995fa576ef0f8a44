"""The fused training of blocks: gradients, statistics and what is kept, beside eager torch."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import HALF, SEEDS, assert_identical
from models import images
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import ConvBNAct2d, training
from fused_resnet.modules import chain
from fused_resnet.plan import MEMORY


def _shortcut(channels: int, out: int, stride: int, kernel: int = 1) -> nn.Module:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def _bottleneck(channels: int, planes: int, stride: int = 1, **kwargs) -> nn.Module:
    same = stride == 1 and channels == 4 * planes
    shortcut = None if same else _shortcut(channels, 4 * planes, stride)
    return Bottleneck(channels, planes, stride, shortcut, **kwargs)


class _AveragedShortcut(nn.Sequential):
    """As of ResNet-D: not a pair, so that a block takes it as it comes."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.AvgPool2d(2, ceil_mode=True), *_shortcut(channels, out, 1))


#: What ends in a 1x1 convolution over few channels takes its statistics from a Gram matrix, over
#: many from its raw output.
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: _bottleneck(24, 6),
    "bottleneck-projection": lambda: _bottleneck(24, 8),
    "bottleneck-strided": lambda: _bottleneck(24, 8, 2),
    "bottleneck-grouped": lambda: _bottleneck(24, 8, 2, groups=4, base_width=32),
    "bottleneck-dilated": lambda: _bottleneck(24, 6, dilation=2),
    "bottleneck-wide": lambda: _bottleneck(24, 160, 2),
    "bottleneck-averaged": lambda: Bottleneck(24, 8, 2, _AveragedShortcut(24, 32)),
    "basic": lambda: BasicBlock(24, 24),
    "basic-projection": lambda: BasicBlock(24, 16, 2, _shortcut(24, 16, 2)),
    "basic-shortcut-3x3": lambda: BasicBlock(24, 16, 2, _shortcut(24, 16, 2, 3)),
    "chain": lambda: nn.Sequential(nn.Conv2d(24, 9, 3, bias=False), nn.BatchNorm2d(9), nn.ReLU()),
    "chain-1x1": lambda: nn.Sequential(nn.Conv2d(24, 9, 1, bias=False), nn.BatchNorm2d(9)),
    "chain-1x1-strided": lambda: nn.Sequential(
        nn.Conv2d(24, 9, 1, 2, bias=False), nn.BatchNorm2d(9)
    ),
    "chain-1x1-uneven": lambda: nn.Sequential(
        nn.Conv2d(24, 9, 1, (1, 2), bias=False), nn.BatchNorm2d(9)
    ),
    "ConvBNAct2d": lambda: ConvBNAct2d(24, 9, 3, stride=2),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A block, not fused, with BatchNorms that have seen something."""
    torch.manual_seed(seed)
    block = BLOCKS[name]()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return block.to(memory_format=torch.channels_last)


def inputs(seed: int, dtype: torch.dtype = torch.float32, batch: int = 4) -> Tensor:
    x = images(seed, batch, 19, channels=24).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


class Outcome(NamedTuple):
    out: Tensor
    grads: list[Tensor]
    buffers: list[Tensor]


def gradient(out: Tensor) -> Tensor:
    """The gradient that comes in: the same whatever the dtype."""
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return g.bfloat16().to(out.dtype)


def step(
    block: nn.Module, x: Tensor, autocast: torch.dtype | None = None, sure: Tensor | None = None
) -> Outcome:
    """One forward and backward; the gradient comes in where ``sure``, a mask, is one."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = block(x)
    block.zero_grad()
    out.backward(gradient(out) if sure is None else gradient(out) * sure)
    grads = [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
    return Outcome(out, grads, [b for b in block.buffers() if b.dtype.is_floating_point])


def eager_step(block: nn.Module, *args) -> Outcome:
    """The same of torch's own modules."""
    with fused_resnet.use_engine("reference"):
        return step(copy.deepcopy(block), *args)


def surely_on_or_off(block: nn.Module, x: Tensor) -> Tensor:
    """0 where the last ReLU's input is so near zero that rounding decides for or against it.

    One that is tipped over changes gradients by more than all other rounding together.
    """
    inputs, relu = [], F.relu

    def noting(x, inplace=False):
        inputs.append(x.clone())
        return relu(x, inplace)

    with pytest.MonkeyPatch.context() as patch, fused_resnet.use_engine("reference"):
        patch.setattr(F, "relu", noting)
        out = copy.deepcopy(block)(x)
    if not inputs or inputs[-1].shape != out.shape:
        return torch.ones(())
    return (inputs[-1].abs() > inputs[-1].std() / 64).float()


@pytest.fixture
def fused(monkeypatch):
    """Counts how often the fused node ran, so that no comparison is of torch with itself."""
    calls = []
    forward = training.Chain.forward

    def counted(ctx, plan, *args):
        calls.append(plan)
        return forward(ctx, plan, *args)

    monkeypatch.setattr(training.Chain, "forward", staticmethod(counted))
    return calls


def check(
    name: str,
    fused_calls: list,
    dtype: torch.dtype = torch.float32,
    change: Callable[[nn.Module], object] = lambda block: None,
    memory: str = "auto",
    autocast: torch.dtype | None = None,
) -> None:
    """Outputs, gradients and buffers by the rule, pooled over the seeds and the parameters."""
    ours: list[Outcome] = []
    eager: list[Outcome] = []
    truth: list[Outcome] = []
    for seed in SEEDS:
        block, x = build(name, seed).to(dtype), inputs(seed, dtype)
        change(block)
        exact = copy.deepcopy(block).double()
        sure = surely_on_or_off(exact, x.double())
        truth.append(eager_step(exact, x.double(), None, sure))
        eager.append(eager_step(block, x, autocast, sure))
        ours.append(step(fused_resnet.fuse(block, memory=memory), x, autocast, sure))
        assert ours[-1].out.stride() == eager[-1].out.stride()
        assert len(ours[-1].grads) == len(eager[-1].grads)
    assert len(fused_calls) == len(SEEDS)
    for field in Outcome._fields:
        tensors = [tree_leaves([getattr(o, field) for o in side]) for side in (ours, eager, truth)]
        for kind in {t.dtype for t in tensors[1]}:
            same = [i for i, t in enumerate(tensors[1]) if t.dtype == kind]
            judge(*([side[i] for i in same] for side in tensors))


over_blocks = pytest.mark.parametrize("name", BLOCKS)


@over_blocks
@pytest.mark.parametrize("memory", MEMORY)
def test_float32(name, memory, fused):
    check(name, fused, memory=memory)


@over_blocks
def test_float64(name, fused):
    check(name, fused, torch.float64)


@over_blocks
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(name, dtype, fused):
    check(name, fused, autocast=dtype)


@over_blocks
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half(name, dtype, fused):
    """Everything in the half type, but for BatchNorm in float32 as AMP users keep it."""

    def norms_in_float32(block):
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()

    check(name, fused, dtype, norms_in_float32)


def fixed_statistics(block: nn.Module) -> None:
    block.eval()


def frozen_norms(block: nn.Module) -> None:
    """As torchvision's detection models have them."""
    for path, m in list(block.named_modules()):
        if isinstance(m, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(m.num_features).to(m.weight.dtype)
            frozen.load_state_dict(m.state_dict(), strict=False)
            block.set_submodule(path, frozen)


def no_running_statistics(block: nn.Module) -> None:
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None


def not_affine(block: nn.Module) -> None:
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.affine, m.weight, m.bias = False, None, None


def cumulative(block: nn.Module) -> None:
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.num_batches_tracked.fill_(3)


def fixed_parameters(block: nn.Module) -> None:
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)


def only_norms(block: nn.Module) -> None:
    block.requires_grad_(False)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(True)


def nothing_but_the_input(block: nn.Module) -> None:
    block.requires_grad_(False)


def with_bias(block: nn.Module) -> None:
    """Of every convolution; its statistics fixed, as batch statistics make its gradient zero."""
    block.eval()
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn(m.out_channels, dtype=m.weight.dtype))


CHANGES = [
    fixed_statistics, frozen_norms, no_running_statistics, not_affine, cumulative,
    fixed_parameters, only_norms, nothing_but_the_input, with_bias,
]  # fmt: skip


@over_blocks
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed(name, change, fused):
    check(name, fused, change=change)


@over_blocks
@pytest.mark.parametrize("change", [None, fixed_statistics], ids=["batch", "fixed"])
def test_gradcheck(name, change, fused):
    block = build(name).double()
    if change is not None:
        change(block)
    fused_resnet.fuse(block)
    x = inputs(0, torch.float64, batch=2)[:, :, :5, :5].requires_grad_()
    names = [n for n, _ in block.named_parameters()]
    values = tuple(p.detach().requires_grad_() for p in block.parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)
    assert fused


@over_blocks
def test_gradient_penalty(name, fused):
    """A backward through the gradient: silently wrong where the first one is taken for constant."""

    def penalised(block: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        block.zero_grad()
        (g.flatten(1).norm(dim=1) - 1).square().mean().backward()
        return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]

    block, x = build(name), inputs(0)
    with fused_resnet.use_engine("reference"):
        expected = penalised(copy.deepcopy(block), x)
        truth = penalised(copy.deepcopy(block).double(), x.double())
    judge(penalised(fused_resnet.fuse(block), x), expected, truth)
    assert fused


@over_blocks
def test_two_runs_give_the_same_bits(name, fused):
    torch.use_deterministic_algorithms(True)
    block, x = fused_resnet.fuse(build(name)), inputs(0)
    first = step(copy.deepcopy(block), x)
    assert_identical(step(copy.deepcopy(block), x), first, "two runs")


@pytest.mark.parametrize("ratio", [0, 1, 6, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_far_from_zero(ratio, dtype, fused):
    """beta / gamma as given: uncentred, the Gram matrix would leave nothing of the variance.

    No ReLU at the end, and no gradient that is zero but for rounding: either would drown the rest.
    """

    def run(block, x, exact):
        x, kinds = x.clone().requires_grad_(), {"device_type": "cpu", "dtype": dtype}
        with torch.autocast(**kinds, enabled=dtype != torch.float32 and not exact):
            if block in fusable:
                y = chain([(block.conv2, block.bn2), (block.conv3, block.bn3)], x, act="none")
            else:
                y = block.bn3(block.conv3(torch.relu(block.bn2(block.conv2(x)))))
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        (y * weights).sum().backward()
        wanted = [block.conv2.weight, block.bn2.weight, block.conv3.weight, block.bn3.weight]
        grads = [x.grad.to(block.conv1.weight.dtype), *(p.grad for p in wanted)]
        return [y.to(grads[0].dtype), block.bn3.running_mean, block.bn3.running_var, *grads]

    fusable, results = set(), ([], [], [])
    for seed in SEEDS:
        block, x = build("bottleneck", seed), inputs(seed)[:, :6]
        with torch.no_grad():
            block.bn2.bias.copy_(ratio * block.bn2.weight)
        ours, eager, truth = block, copy.deepcopy(block), copy.deepcopy(block).double()
        fusable.add(ours)
        for side, m in zip(results, (ours, eager, truth), strict=True):
            side.extend(run(m, x.to(m.conv1.weight.dtype), m is truth))
    judge(*results)
    assert len(fused) == len(SEEDS)


def test_an_unknown_memory_raises():
    block = build("basic")
    with pytest.raises(ValueError, match=r"fuse: memory must be one of auto, lean, fast, got 'no'"):
        fused_resnet.fuse(block, memory="no")
    assert type(block) is BasicBlock


def test_one_value_per_channel_raises():
    block = fused_resnet.fuse(build("bottleneck"))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 24, 1, 1))


def test_overwriting_the_output_is_seen():
    block = fused_resnet.fuse(build("bottleneck"))
    out = block(inputs(0))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kernel", [1, 3])
def test_without_relu_the_output_may_be_overwritten(kernel, memory):
    """Nothing of what BatchNorm puts out is needed to go back, in torch or here."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, kernel), nn.BatchNorm2d(4)).double()
    found = []
    for m in (fused_resnet.fuse(copy.deepcopy(plain), memory=memory), plain):
        x = torch.linspace(-1, 2, 150).double().sin().view(2, 3, 5, 5).requires_grad_()
        y = m(x)
        y += x[:, :1, : y.size(2), : y.size(3)]
        y.relu_().pow(3).sum().backward()
        found.append([y, x.grad, *(p.grad for p in m.parameters() if p.dim() != 1)])
    judge(*found, found[1])
