"""The count of launches and bytes, beside counts made by hand."""

import json
import subprocess
import sys

import pytest
import torch
from cases import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fused_resnet
from bench import launches, report
from bench.launches import EAGER, Count, Launch, tally
from fused_resnet import engines

N, C, K, HW = 4, 8, 16, 5 * 6


def counted(f, *shapes, grad=False):
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        tensors = [torch.empty(shape, requires_grad=grad) for shape in shapes]
        with Count() as count:
            f(*tensors)
    return count.launches


def names(found):
    return [launch.name for launch in found]


def moved(found):
    """Elements."""
    return [launch.bytes // 4 for launch in found]


IMAGE = (N, C, 5, 6)


@pytest.mark.parametrize(
    ("f", "shapes", "expected"),
    [
        (lambda x: x.view(-1).unsqueeze(0).detach(), [IMAGE], []),
        (lambda x: x.squeeze_(), [(1, 3)], []),
        (lambda x: x.to(x.dtype).contiguous(), [IMAGE], []),
        (lambda x: torch.empty_like(x), [IMAGE], []),
        (lambda x: x.relu_(), [(7,)], [2 * 7]),
        (lambda x, y: x + y, [(7,), (7,)], [3 * 7]),
        (lambda x: x.zero_(), [(7,)], [7]),
        (lambda x: x.new_zeros(9), [(7,)], [9]),
        (lambda x, y: x.copy_(y), [(7,), (7,)], [2 * 7]),
        (lambda x: x.expand(5, 7) / 2, [(1, 7)], [7 + 5 * 7]),
        (lambda x: x.contiguous(memory_format=torch.channels_last), [IMAGE], [2 * N * C * HW]),
    ],
)
def test_what_an_op_moves(f, shapes, expected):
    assert moved(counted(f, *shapes)) == expected


def test_convolution_batch_norm_and_relu_in_training():
    """Its gradients too: x is read twice for the statistics and the normalisation, and so on."""

    def step(x, w, gamma, beta):
        y = F.batch_norm(F.conv2d(x, w), torch.empty(K), torch.empty(K), gamma, beta, True)
        torch.autograd.grad(y.relu_(), (x, w, gamma, beta), torch.empty_like(y))

    found = counted(step, IMAGE, (K, C, 1, 1), (K,), (K,), grad=True)
    x, y, weight = N * C * HW, N * K * HW, C * K
    assert dict(zip(names(found), moved(found), strict=True)) == {
        "convolution": x + weight + y,
        "native_batch_norm": 3 * y + 8 * K,  # four vectors in; two moved, mean and deviation out
        "relu_": 2 * y,
        "threshold_backward": 3 * y,
        "native_batch_norm_backward": 5 * y + 7 * K,
        "convolution_backward dgrad": y + weight + x,
        "convolution_backward wgrad": y + x + weight,
    }


def test_an_op_of_ours_is_one_launch():
    ops = torch.ops.fused_resnet

    def ours(x, r, v):
        y = ops.bn_act(x, v, v, r, "relu")
        ops.bn_act_(y, v, v, None, "relu")
        ops.bn_stats(y)

    found = counted(ours, IMAGE, IMAGE, (C,))
    assert names(found) == ["bn_act", "bn_act_", "bn_stats"]
    whole = N * C * HW
    assert moved(found) == [3 * whole + 2 * C, 2 * whole + 2 * C, whole + 2 * C]


def test_triton_says_what_it_launches():
    ops = torch.ops.fused_resnet_triton

    def ours(x, v):
        ops.bn_act(x, v, v, None, "relu")
        ops.bn_scale_shift(v, v, v, v, 1e-5)

    found = counted(ours, IMAGE, (C,))
    assert names(found) == ["bn_act", "bn_scale_shift"]
    assert moved(found) == [2 * N * C * HW + 2 * C, 6 * C]
    assert [launch.finalizes for launch in found] == [False, True]


def test_what_touches_an_activation():
    image, weight, vector = (torch.empty(s, device="meta") for s in ((4, 8, 5, 5), (4, 8, 3, 3), 8))
    several = [
        Launch("a", [image], [vector]),
        Launch("a", [vector], [image]),
        Launch("cast", [weight], [weight]),
        Launch("vectors", [vector], [vector]),
        Launch("end", [image], [vector], finalizes=True),
    ]
    found = tally(several, 4, {weight.shape})
    assert (found.large, found.small, found.kernels) == (2, 3, {"a": 2})
    assert found.bytes == sum(launch.bytes for launch in several)


class Block(nn.Module):
    """As much of a network as launches.count needs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.BatchNorm2d(1000), nn.ReLU())

    def forward(self, x):
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize(("engine", "large"), [(EAGER, 4), ("vendor", 3), ("native", 2)])
def test_engines(engine, large, monkeypatch):
    monkeypatch.setattr("fused_resnet.checkpoints.build", lambda name: Block().eval())
    monkeypatch.setattr(launches, "fuse", lambda model: fused_resnet.fuse(model.eval()))
    assert launches.count("", engine, False, torch.bfloat16, 2, 16).large == large


def test_eager_resnet50():
    """53 convolutions with their BatchNorms, 49 ReLUs, 16 sums, two poolings; and the way back."""
    forward = 53 + 53 + 49 + 16 + 2
    backward = 52 + 53 + 53 + 49 + 2  # the first convolution needs no gradient of its input
    sums = 16  # of the gradients that come to a block's input on both ways
    found = launches.count("resnet50", EAGER, False, torch.float32, 3, 64)
    assert found.large == forward
    found = launches.count("resnet50", EAGER, True, torch.float32, 3, 64)
    assert found.large == forward + backward + sums


def test_triton_stores_neither_the_first_image_nor_the_last():
    if (why_not := engines.unavailable("triton")) is not None:
        pytest.skip(f"no triton engine: {why_not}")
    given = ("resnet18", False, torch.bfloat16, 2, 64)
    ours, in_steps = (launches.count(given[0], e, *given[1:]) for e in ("triton", "native"))
    assert ours.kernels["conv_bn_act_maxpool"] == 1
    assert "bn_act_maxpool" not in ours.kernels
    assert ours.kernels["conv_bn_act_avgpool"] == 1
    assert "mean" not in ours.kernels
    assert ours.large <= in_steps.large - 2
    images = 2 * 64 * 32 * 32 + 2 * 512 * 2 * 2
    assert in_steps.bytes - ours.bytes >= 2 * 2 * images * 9 / 10  # written and read; sums are


def test_fused_moves_less():
    rows = launches.run(["resnet50"], ["bf16"], 32, 224)
    table = report.launches(rows)
    for row in rows:
        if row["variant"] == "native":
            assert row["of_eager"]["bytes"] < (0.66 if row["task"] == "training step" else 0.4)
            assert f"| native | {row['large']} (" in table
        if row["why_not"] is not None:
            assert row["why_not"] in table


def test_command(tmp_path):
    output = tmp_path / "l.json"
    options = ["--select", "resnet18", "--dtype", "fp32", "--size", "64", "--output", str(output)]
    command = [sys.executable, "-m", "bench", "--launches", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["results"]
    assert [row["variant"] for row in rows] == [EAGER, *launches.ENGINES] * 2
    assert "| resnet18, inference, fp32 |" in done.stdout
    assert all(row["why_not"] is None for row in rows if row["variant"] != "triton")
