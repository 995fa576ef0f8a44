"""Peers that are not installed here are named; those that put a BatchNorm of their own where
torch's is are tried with a stand-in for it."""

import sys
import time
import types

import pytest
import torch
import torchvision
from torch import nn

from bench import peers, report, training
from fused_resnet import measure
from fused_resnet.measure import EAGER, PEER, Pace, Runner, Variant

ONCE = Pace(seconds=0, least_rounds=1, most_rounds=1, sample_seconds=0)


def installed(monkeypatch, *names):
    """As if only these packages were."""
    monkeypatch.setattr(peers, "find_spec", lambda name: name if name in names else None)


def test_absent(monkeypatch):
    installed(monkeypatch, "attorch")
    assert peers.absent("cpu") == {
        "TensorRT": "torch_tensorrt is not installed",
        "attorch": "it is for GPUs",
        "inplace-ABN": "inplace_abn is not installed",
        "apex": "apex is not installed",
    }
    assert "attorch" not in peers.absent("cuda")
    names = training.variant_names("cuda")
    assert names["attorch"] == PEER
    assert "apex" not in names
    assert "attorch" not in training.variant_names("cpu")


class Counted(nn.BatchNorm2d):
    """A stand-in that tells how often it is called."""

    calls = 0

    def __init__(self, channels, eps=1e-5, momentum=0.1, activation="identity"):
        assert activation == "identity"
        super().__init__(channels, eps, momentum)

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


class CountedNHWC(Counted):
    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


STAND_INS = {
    "attorch": ("attorch", "BatchNorm2d", Counted),
    "inplace-ABN": ("inplace_abn", "InPlaceABN", Counted),
    "apex": ("apex.contrib.groupbn.batch_norm", "BatchNorm2d_NHWC", CountedNHWC),
}


@pytest.mark.parametrize("name", peers.NORMS)
def test_a_norm_in_the_place_of_torchs(name, monkeypatch):
    package, norm, stand_in = STAND_INS[name]
    parts = package.split(".")
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(module, norm, stand_in)
    monkeypatch.setattr(Counted, "calls", 0)
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).double()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            m.eps, m.momentum = 1e-3, 0.3
    x = torch.randn(2, 3, 32, 32).double()
    theirs, layout = training.prepared(network, name, x, x.dtype)
    eager, _ = training.prepared(network, "eager NHWC", x, x.dtype)
    x = x.contiguous(memory_format=layout)
    losses = [training.step(model, x, torch.float64) for model in (eager, theirs)]
    assert Counted.calls == 20
    torch.testing.assert_close(*losses)
    for p, q in zip(eager.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(eager.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchscript(dtype):
    network = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(1, 3, 32, 32)
    truth = network.double()(x.double()).detach()
    network.float()
    eager = Variant("eager", EAGER, lambda: Runner(network.to(dtype), lambda x: x.to(dtype)))
    several = [eager, peers.torchscript(network, dtype, x)]
    with torch.no_grad():
        _, result = measure.measure(several, [x], truth, ONCE)
    assert result.why_not is None
    assert result.within


def test_the_first_call_is_part_of_the_start():
    """What compiles in it is seen there."""

    def prepare():
        time.sleep(0.01)
        calls = []

        def run(x):
            if not calls:
                time.sleep(0.03)
            calls.append(x)
            return x

        return Runner(run)

    x = torch.ones(1)
    result, *_ = measure.measure([Variant("eager", EAGER, prepare)], [x], x.double(), ONCE)
    assert result.first_call_seconds >= 0.03
    assert result.prepare_seconds >= result.first_call_seconds + 0.01
    row = {"bytes": None, "prepare_seconds": 21.04, "first_call_seconds": 20.0}
    assert report._start(row) == "21.0 s (20.0)"
    assert report._start({**row, "first_call_seconds": None}) == "21.0 s"
    assert report._start({**row, "prepare_seconds": None}) == ""
    assert report._start({**row, "bytes": 8}) == ""
