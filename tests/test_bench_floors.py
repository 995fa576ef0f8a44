"""The least times of networks, beside what was counted another way, and by hand."""

import pytest

from bench import floors, report
from bench.floors import KNOWN, Machine, Pass
from bench.layers import table

H200 = KNOWN["NVIDIA H200"]
#: Of 256 images in bf16 on an H200, counted from a table of layers that was written by hand:
#: GFLOP and MB an image, images a second, and passes.
COUNTED = {
    "resnet18": (3.63, 8.45, 217726, 18),
    "resnet50": (8.18, 45.27, 67553, 50),
    "resnet101": (15.60, 72.71, 39110, 101),
    "resnext50_32x4d": (8.46, 58.41, 60543, 50),
    "wide_resnet50_2": (22.80, 58.75, 31067, 50),
    "train/resnet18": (10.65, 39.91, 59527, 55),
    "train/resnet50": (24.30, 178.15, 18930, 129),
    "train/resnet101": (46.57, 267.45, 11503, 248),
    "train/resnext50_32x4d": (25.15, 217.57, 17292, 129),
    "train/wide_resnet50_2": (68.15, 218.94, 9538, 129),
}


def row(what, batch=1, dtype="fp32", **known):
    return {"what": what, "batch": batch, "dtype": dtype, "bytes": None, **known}


@pytest.mark.parametrize("what", COUNTED)
def test_networks(what):
    found = floors.floor(row(what, 256, "bf16"), 224, H200)
    flops, moved, rate, passes = COUNTED[what]
    assert found["flops"] / 256e9 == pytest.approx(flops, abs=0.006)
    assert found["bytes"] / 256e6 == pytest.approx(moved, abs=0.006)
    assert 256 / found["seconds"] == pytest.approx(rate, abs=1)
    assert found["passes"] == passes


def test_a_pass_takes_the_longer_of_two():
    on = Machine(copy=10.0, peak={"fp32": 100.0})
    assert floors.seconds([Pass(200, 10), Pass(50, 40)], "fp32", on) == 2 + 4
    assert floors.seconds([Pass(200, 10)], "bf16", on) is None


def test_a_block_with_a_projection():
    """ResNet-18's first of layer2: two 3x3 convolutions, and one that projects."""
    found = floors.floor(
        row("block", 2, case="block/resnet18.layer2.0/b2/fp32", bytes=1), 224, None
    )
    x, z = 64 * 56 * 56, 128 * 28 * 28
    first = 2 * (x + z) + 9 * 64 * 128
    second = 2 * (z + x // 4 + z) + 9 * 128 * 128 + 64 * 128
    assert found["passes"] == 2
    assert found["bytes"] == 4 * (first + second)
    assert found["flops"] == 2 * 2 * z * (9 * 64 + 9 * 128 + 64)
    assert found["seconds"] is None


def test_a_step_of_a_block():
    """ResNet-18's second of layer1, by its terms."""
    name = "train/block/resnet18.layer1.1/b3/bf16"
    found = floors.floor(row("train/block", 3, "bf16", case=name, bytes=1), 224, None)
    x, w = 64 * 56 * 56, 9 * 64 * 64
    forward = 3 * (2 * x + 2 * x + 3 * x) + 2 * w
    backward = 3 * (6 * x + 4 * x) + 2 * w
    assert found["passes"] == 5
    assert found["bytes"] == 2 * (forward + backward) + 4 * 2 * w
    assert found["flops"] == 3 * 6 * 2 * x * 9 * 64


def test_an_op_is_one_pass():
    known = {"flops": 100, "bytes": 80}
    found = floors.floor({**row("bn_act"), **known}, 224, Machine(40.0, {"fp32": 1000.0}))
    assert found == {"passes": 1, **known, "seconds": 2.0}
    timed = {"floor": found, "seconds": {"median": 8.0}}
    assert report.share_of_floor(timed) == "25%"
    assert report.share_of_floor({**timed, "seconds": None}) == ""
    assert report.share_of_floor({**timed, "floor": {"seconds": None}}) == ""


def test_machine():
    """What was measured beside results comes first; what is known is of a GPU, by its name."""
    measured = {"copy_bytes_per_second": 1.0, "peak_flops": {"fp32": 2.0}}
    cpu = {"gpus": [], "device": "cpu"}
    gpu = {"gpus": ["NVIDIA H200"], "device": "cuda"}
    assert floors.machine(cpu) is None
    assert floors.machine({**cpu, **measured}) == Machine(1.0, {"fp32": 2.0})
    assert floors.machine(gpu) == H200
    assert floors.machine({**gpu, "copy_bytes_per_second": 4e12}) == H200._replace(copy=4e12)
    assert floors.machine({**gpu, **measured}) == Machine(1.0, {"fp32": 2.0})
    assert floors.machine({**gpu, "device": "cpu"}) is None


def test_the_table_of_layers():
    stem, first, *_ = table("resnext50_32x4d", 224)
    assert (stem.name, first.name) == ("", "layer1.0")
    assert [str(layer) for layer in first.layers] == [
        "64x56x56-1x1-128-relu",
        "128x56x56-3x3g32-128-relu",
        "128x56x56-1x1-256-add-relu",
        "64x56x56-1x1-256",
    ]
    grouped = first.convs[1]
    assert grouped.weights == 128 * 4 * 9
    assert grouped.flops == 2 * 128 * 56 * 56 * 4 * 9
    assert stem.convs[0].made == (64, 112, 112)
