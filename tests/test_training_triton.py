"""Training on the Triton engine, interpreted: what it computes, and what it launches."""

import copy

import pytest
import test_training
import torch
from cases import backends
from models import away_from_zero, images
from test_training import BLOCKS, build, check, fused, step  # noqa: F401  (a fixture)
from tolerances import judge
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import engines

#: One of each kind of block, and groups.
NAMES = ("bottleneck", "bottleneck-strided", "bottleneck-grouped", "basic", "basic-projection")
#: Launches that touch an activation, forward and backward. A projection adds its Gram matrix, the
#: gradient of its weight, and that of its input.
MOST_LAUNCHES = {"bottleneck": 10, "bottleneck-projection": 13, "bottleneck-strided": 13}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Everything on it, and small, as the interpreter is slow."""
    if backends(engines.CHAIN_OPS[0])[-1].values[0].engine != "triton":
        pytest.skip(f"no triton: {engines.unavailable('triton')}")

    def inputs(seed, dtype=torch.float32, batch=3):
        x = images(seed, batch, 8, 7, channels=24).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(test_training, "inputs", inputs)
    with fused_resnet.use_engine("triton"):
        yield


@pytest.fixture
def launched():
    """Names of the kernels launched in the test, but for those that finish what others reduced."""
    from fused_resnet.triton_kernels.launch import recording

    with recording() as launches:
        yield lambda: [
            this.kernel.fn.__module__.rpartition(".")[2] for this in launches if not this.finalizes
        ]


@pytest.mark.parametrize("name", NAMES)
def test_float32(name, fused, launched):  # noqa: F811
    check(name, fused)
    kernels = launched()
    assert kernels.count("conv_gemm") >= len(test_training.SEEDS) * 4
    assert "bn_act_backward" not in kernels


@pytest.mark.parametrize("name", ["bottleneck-projection", "bottleneck-strided"])
@pytest.mark.parametrize("change", [lambda block: None, test_training.only_norms])
def test_projection_by_its_gram_matrix(change, name, fused, monkeypatch):  # noqa: F811
    """As of images larger than these: its output is a second product, and is never made."""
    monkeypatch.setattr("fused_resnet.plan.GRAM_ROWS", 1)
    check(name, fused, change=change)


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_memory(memory, fused):  # noqa: F811
    check("bottleneck", fused, memory=memory)


@pytest.mark.parametrize("name", ["bottleneck", "basic-projection"])
def test_float16(name, fused):  # noqa: F811
    def norms_in_float32(block):
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()

    check(name, fused, torch.float16, norms_in_float32)


@pytest.mark.parametrize(
    "change",
    [
        test_training.fixed_statistics,
        test_training.not_affine,
        test_training.fixed_parameters,
        test_training.nothing_but_the_input,
        test_training.with_bias,
    ],
    ids=lambda c: c.__name__,
)
def test_changed(change, fused):  # noqa: F811
    check("bottleneck-strided", fused, change=change)


@pytest.mark.parametrize("ratio", [0, 1, 6, 100, 3000])
def test_means_far_from_zero(ratio, fused):  # noqa: F811
    test_training.test_means_far_from_zero(ratio, torch.float32, fused)


def passes(launches, pixels):
    """Launches that read or write a tensor of the size of an activation."""
    return [
        this
        for this in launches
        if not this.finalizes
        and any(t is not None and t.dim() == 4 and t.shape[0] > 1 and t[0, 0].numel() >= pixels
                for t in (*this.reads, *this.writes))
    ]  # fmt: skip


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_launches_of_a_bottleneck(name, monkeypatch):
    from fused_resnet.triton_kernels.launch import recording

    monkeypatch.setattr("fused_resnet.plan.GRAM_ROWS", 1)  # of a projection of so few pixels, too
    block, x = fused_resnet.fuse(build(name)), test_training.inputs(0)
    with recording() as launches:
        step(block, x)
    found = passes(launches, x[0, 0].numel() // 4)
    names = [this.kernel.fn.__module__.rpartition(".")[2] for this in found]
    assert len(found) <= MOST_LAUNCHES[name], names


def tiny(seed):
    """A ResNet with a stem and all four kinds of blocks."""
    torch.manual_seed(seed)

    def shortcut(channels, out):
        return nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1, model.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    model.layer1 = nn.Sequential(BasicBlock(16, 16))
    model.layer2 = nn.Sequential(BasicBlock(16, 24, 2, shortcut(16, 24)))
    model.layer3 = nn.Sequential(Bottleneck(24, 8, 2, shortcut(24, 32)))
    model.layer4 = nn.Sequential(Bottleneck(32, 8))
    model.fc = nn.Linear(32, 10)
    return away_from_zero(model.to(memory_format=torch.channels_last))


def test_a_tiny_resnet(launched):
    """Losses, gradients and statistics."""

    def run(model, x):
        loss = F.cross_entropy(model(x.to(model.fc.weight.dtype)), torch.arange(4))
        loss.backward()
        buffers = [b for b in model.buffers() if b.dtype.is_floating_point]
        return [loss.detach(), *(p.grad for p in model.parameters()), *buffers]

    sides = [], [], []
    for seed in (0, 1):
        model = tiny(seed)
        x = images(seed, 4, 33).contiguous(memory_format=torch.channels_last)
        with fused_resnet.use_engine("reference"):
            sides[1].extend(run(copy.deepcopy(model), x))
            sides[2].extend(run(copy.deepcopy(model).double(), x))
        sides[0].extend(run(fused_resnet.fuse(model), x))
    judge(*sides)
    assert {"conv_gemm", "conv_wgrad", "bn_act_gram", "bn_act_maxpool_backward"} <= set(launched())
