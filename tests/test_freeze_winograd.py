"""freeze(winograd=True): which layers, how far from float64, and all that a frozen model can do."""

import copy
import functools
import io
import json
import pickle

import given_times
import pytest
import torch
from models import SEEDS, Ops, basic, double, frozen_layers, images, small
from tolerances import judge
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import frozen_conv, measure, winograd
from fused_resnet.freeze import tune_layers
from fused_resnet.frozen_conv import FrozenConv

X = images(0, 2, 33)
over_ways = pytest.mark.parametrize("way", winograd.TILES)


@pytest.fixture(autouse=True)
def prefer(monkeypatch):
    """No clock decides."""
    given_times.prefer(monkeypatch)
    return functools.partial(given_times.prefer, monkeypatch)


@pytest.fixture(scope="module")
def source():
    return small(block=BasicBlock)


def frozen_by(prefer, way, source, x=X):
    prefer(way)
    return fused_resnet.freeze(source, example=x, winograd=True)


def suited(m):
    return m.weight.shape[2:] == (3, 3) and m.geometry[0] == [1, 1]


def engines_of(frozen):
    return [m.engine for m in frozen_layers(frozen)]


def by_shape(m, way="winograd4"):
    return way if suited(m) else "native"


@over_ways
def test_layers(prefer, source, way):
    """Those of 3x3 kernels with stride 1 are taken, and tell their errors beside eager's."""
    frozen = frozen_by(prefer, way, source)
    engines = {way if suited(m) else "native" for m in frozen_layers(frozen)}
    assert [m.engine for m in frozen_layers(frozen)] == [
        way if suited(m) else "native" for m in frozen_layers(frozen)
    ]
    assert engines == {way, "native"}
    assert not frozen.failed
    assert not frozen.unfolded
    assert way in repr(frozen)
    assert len(frozen.layer_errors) == len(frozen_layers(frozen))
    layers = {path: m for path, m in frozen.model.named_modules() if isinstance(m, FrozenConv)}
    for path, found in frozen.layer_errors.items():
        own, eager = (measure.Error(**found[which]) for which in ("frozen", "eager"))
        times = winograd.amplification(winograd.TILES[way]) if layers[path].engine == way else 1
        assert 0 < own.mean <= own.max
        assert measure.within(own, eager, times)


@over_ways
@pytest.mark.parametrize("shape", [(1, 33), (5, 33), (2, 64), (1, 47, 90)])
def test_any_batch_and_size(prefer, source, shape, way):
    frozen, found = frozen_by(prefer, way, source), []
    for seed in SEEDS:
        x = images(seed, *shape)
        with torch.no_grad(), Ops() as ops:
            found.append((frozen(x), source(x), double(source, x)))
        assert "conv_bn_act_winograd" in ops.names
    judge(*zip(*found, strict=True), times=winograd.amplification(winograd.TILES[way]))


def test_not_unless_asked(prefer, source):
    timed = prefer("winograd4")
    frozen = fused_resnet.freeze(source, example=X)
    assert not {way for _, way in timed} & {*winograd.TILES}
    assert {m.engine for m in frozen_layers(frozen)} == {"native"}


def test_where_it_is_not_faster(prefer, source):
    frozen = frozen_by(prefer, "vendor", source)
    assert {m.engine for m in frozen_layers(frozen)} == {"vendor"}


def test_layers_that_have_no_such_form(prefer):
    prefer("winograd2")
    source = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=(1, 2)), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, dilation=2, padding=2), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, (3, 1)), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    frozen = fused_resnet.freeze(source, example=X, winograd=True)
    engines = [m.engine for m in frozen_layers(frozen)]
    assert engines == ["winograd2", *["native"] * 4, "winograd2"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_are_refused(source, dtype):
    words = f"winograd=True is for torch.float32 on cpu, got {dtype}"
    with pytest.raises(RuntimeError, match=words):
        fused_resnet.freeze(source, example=X, dtype=dtype, winograd=True)


def test_bytes_are_refused(source):
    given = {"example": X, "dtype": torch.int8, "calibration": [X]}
    with pytest.raises(RuntimeError, match=r"float32 on cpu, got torch\.int8 on cpu"):
        fused_resnet.freeze(source, **given, winograd=True)


@over_ways
def test_nan(prefer, way):
    """Is kept, through every ReLU; what is infinite stays so, or becomes one."""
    source = basic()
    x = images(0, 2, 9, channels=24)
    frozen = frozen_by(prefer, way, source, x)
    x[0, 3, 4, 4] = torch.nan
    x[1, 5, 0, 0] = torch.inf
    with torch.no_grad():
        ours, theirs = frozen(x), source(x)
    assert not (theirs.isnan() & ~ours.isnan()).any()
    assert not (~theirs.isfinite() & ours.isfinite()).any()
    assert not ours.isnan().all()


def saved(frozen):
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@over_ways
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=range(3)
)
def test_copies(prefer, source, way, duplicate):
    frozen = frozen_by(prefer, way, source)
    expected, plain = frozen(X), sum(t.nbytes for t in frozen.state_dict().values())
    assert len(pickle.dumps(frozen)) < 1.2 * plain
    again = duplicate(frozen)
    assert torch.equal(again(X), expected)
    assert [m.engine for m in frozen_layers(again)] == [m.engine for m in frozen_layers(frozen)]


@over_ways
def test_follows_a_loaded_state(prefer, source, way):
    frozen = frozen_by(prefer, way, source)
    other = frozen_by(prefer, way, small(1, BasicBlock))
    other(X)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(X), frozen(X))


@over_ways
def test_files(prefer, source, way, tmp_path):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    frozen = frozen_by(prefer, way, source)
    fused_resnet.save_frozen(frozen, tmp_path / "file")
    again = fused_resnet.load_frozen(tmp_path / "file", small(1, BasicBlock))
    assert repr(again) == repr(frozen)
    assert torch.equal(again(X), frozen(X))
    assert (again.errors, again.layer_errors) == (frozen.errors, frozen.layer_errors)
    prefer("winograd4" if way == "winograd2" else "winograd2")
    tune_layers(again, (X,))  # as allowed as before
    assert {m.engine for m in frozen_layers(again)} == {*winograd.TILES, "native"} - {way}


def test_a_file_that_asks_for_what_a_layer_cannot_be(prefer, source, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "file"
    fused_resnet.save_frozen(frozen_by(prefer, "winograd4", source), path)
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["fused_resnet"])
    for layer in description["layers"].values():
        layer["engine"] = "winograd4"
    content = {"fused_resnet": json.dumps(description)}
    safetensors.save_file(safetensors.load_file(path), path, content)
    again = fused_resnet.load_frozen(path, source)
    assert [m.engine for m in frozen_layers(again)] == [
        "winograd4" if suited(m) else "native" for m in frozen_layers(again)
    ]


@over_ways
def test_compiled_and_exported(prefer, source, way):
    """Such programs carry plain weights, and so the convolution as it is."""
    frozen = frozen_by(prefer, way, source)
    program = torch.export.export(frozen, (X,))
    assert not [n for n in program.graph.nodes if "winograd" in str(n.target)]
    counter = CompileCounter()
    compiled = torch.compile(frozen, fullgraph=True, backend=counter)
    with torch.no_grad():
        exact = double(source, X)
        for each in (program.module(), compiled):
            judge([each(X)], [source(X)], [exact])
    assert counter.frame_count == 1


def test_tuned_again(prefer, source):
    """It may still be what it was allowed to be."""
    frozen = frozen_by(prefer, "vendor", source)
    prefer("winograd4")
    tune_layers(frozen, (X,))
    assert "winograd4" in {m.engine for m in frozen_layers(frozen)}


def test_an_error_outside_the_rule(prefer, source, monkeypatch):
    """Such a layer is on another engine, and named: as it is tuned, or as the whole is judged."""
    right = frozen_conv._WINOGRAD

    def planted(*args):
        return right(*args) * (1 + 1e-3)

    monkeypatch.setattr(frozen_conv, "_WINOGRAD", planted)
    frozen = frozen_by(prefer, "winograd4", source)
    assert {m.engine for m in frozen_layers(frozen)} == {"native"}
    assert sum(suited(m) for m in frozen_layers(frozen)) == len(frozen.failed)
    assert all({*winograd.TILES} == {*found} for found in frozen.failed.values())
    monkeypatch.setattr(FrozenConv, "tune", lambda m, *args: setattr(m, "engine", by_shape(m)))
    frozen = frozen_by(prefer, "winograd4", source)
    assert {m.engine for m in frozen_layers(frozen)} == {"native"}
    assert all("its error is" in found["winograd4"] for found in frozen.failed.values())
    judge([frozen(X)], [source(X)], [double(source, X)])
