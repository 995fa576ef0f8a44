"""Whole networks, fused and frozen, against torchvision's and float64 by the rule of tolerances."""

import inspect

import pytest
import torch
import torchvision
from models import ENGINES, LAYOUTS, NAMES, SEEDS, images, network, on, runs_fused, truth
from tolerances import judge

import fused_resnet

QUICK = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
QUICK_SHAPES = ((1, 97), (3, 64))
FULL_SHAPES = tuple((batch, size) for batch in (1, 3) for size in (224, 193))


#: (network, shapes): small images for the few, and with --full all of them at full size
CASES = [pytest.param(name, QUICK_SHAPES, id=f"{name}-small") for name in QUICK]
CASES += [pytest.param(n, FULL_SHAPES, id=f"{n}-full", marks=pytest.mark.slow) for n in NAMES]


@pytest.fixture
def folder(request):
    """Where float64 outputs are kept from run to run."""
    return request.config.cache.mkdir("truth")


def eager_and_fused(name, seed, x, layout):
    """The outputs of one network before and after fusing it."""
    model = network(name, seed).to(x.dtype, memory_format=layout)
    x = x.contiguous(memory_format=layout)
    with torch.no_grad():
        eager = model(x)
        return eager, fused_resnet.fuse(model)(x)


def check_fused(folder, name, shape, dtype, layout):
    ours, eager, exact = [], [], []
    for seed in SEEDS:
        x = images(seed, *shape)
        outputs = eager_and_fused(name, seed, x.to(dtype), layout)
        eager.append(outputs[0])
        ours.append(outputs[1])
        exact.append(truth(folder, name, seed, x, dtype))
    judge(ours, eager, exact)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_fused(folder, name, shapes, dtype, layout):
    for shape in shapes:
        check_fused(folder, name, shape, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_fused_other_dtypes(folder, dtype):
    check_fused(folder, "resnet18", (3, 65), dtype, torch.channels_last)


@pytest.mark.parametrize("engine", ["reference", "native", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_on_every_engine(folder, dtype, engine):
    with fused_resnet.use_engine(engine):
        for name in ("resnet18", "resnext50_32x4d"):
            check_fused(folder, name, (3, 49), dtype, torch.channels_last)


def check_frozen(folder, name, shapes, source, dtype, verdict):
    """Freeze the network in ``source`` to ``dtype`` and judge each engine against float64."""
    ours = {engine: [] for engine in ENGINES}
    eager, exact = [], []
    for seed in SEEDS:
        model = network(name, seed).to(source)
        example = images(9, 1, 33).to(source)
        frozen = fused_resnet.freeze(model, example=example, dtype=dtype)
        model.to(dtype)
        for shape in shapes:
            x = images(seed, *shape)
            exact.append(truth(folder, name, seed, x, source))
            with torch.no_grad():
                eager.append(model(x.to(dtype)))
                for engine, outputs in ours.items():
                    outputs.append(on(frozen, engine)(x.to(dtype)))
    for outputs in ours.values():
        verdict(outputs, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_frozen(folder, name, shapes, dtype):
    check_frozen(folder, name, shapes, dtype, dtype, judge)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_frozen_other_dtypes(folder, dtype):
    check_frozen(folder, "resnet18", QUICK_SHAPES, dtype, dtype, judge)


def mean_error(outputs, exact):
    errors = [
        (y.double() - t).abs().mean() / t.abs().max() for y, t in zip(outputs, exact, strict=True)
    ]
    return float(torch.stack(errors).mean())


def not_above_eager(ours, eager, exact):
    assert mean_error(ours, exact) <= mean_error(eager, exact)


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_frozen_to_bfloat16(folder, name, shapes):
    """Rounding to bfloat16 while freezing costs, on average, no more than torch's own rounding."""
    check_frozen(folder, name, shapes, torch.float32, torch.bfloat16, not_above_eager)


def test_frozen_to_float16(folder):
    check_frozen(folder, "resnet18", QUICK_SHAPES, torch.float32, torch.float16, not_above_eager)


@pytest.mark.parametrize("name", NAMES)
def test_constructors(name):
    ours = getattr(fused_resnet.models, name)
    theirs = getattr(torchvision.models, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__name__ == name
    with torch.device("meta"):
        model, plain = ours(weights=None, num_classes=7), theirs(num_classes=7)
    assert type(model) is fused_resnet.blocks.ResNet
    assert isinstance(model, torchvision.models.ResNet)
    assert all(entry.fused for entry in fused_resnet.report(model))
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_all_ten_names():
    assert len(NAMES) == 10
    assert set(NAMES) <= set(dir(torchvision.models))


def test_constructor_arguments():
    with torch.device("meta"):
        with pytest.raises(TypeError, match="no_such_argument"):
            fused_resnet.models.resnet18(no_such_argument=1)
        with pytest.raises(ValueError, match="replace_stride_with_dilation"):
            fused_resnet.models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises((KeyError, ValueError), match="NO_SUCH"):
        fused_resnet.models.resnet18(weights="NO_SUCH")


def test_dilated_constructor():
    model = fused_resnet.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    with torch.no_grad():
        assert runs_fused(model, images(0, 1, 33))
    assert model.layer4[2].conv2.dilation == (4, 4)
