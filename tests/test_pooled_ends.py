"""Where a network's first convolution, and its last, run as one op with the pooling behind them."""

import copy
import functools

import pytest
import torch
from cases import over_backends
from models import Ops, bottleneck, images, small
from tolerances import judge
from torch import nn

import fused_resnet
from fused_resnet import engines
from fused_resnet.frozen_conv import CUDNN

MAXPOOL, AVGPOOL = "conv_bn_act_maxpool", "conv_bn_act_avgpool"
STEM = ("conv1", "bn1", "relu", "maxpool")


def stem_in_eager(model, x):
    for name in STEM:
        x = getattr(model, name)(x)
    return x


def check_stem(backend, model, expected, dtype=torch.float32):
    """``model.stem`` by the rule; whether it is one op."""
    plain = fused_resnet.unfuse(small())
    xs = [images(seed, 2, 33) for seed in range(3)]
    with torch.no_grad(), fused_resnet.use_engine(backend.engine), Ops() as ops:
        ours = [model.stem(x.to(dtype)) for x in xs]
    assert (MAXPOOL in ops.names) == expected
    assert ("conv_bn_act" in ops.names) != expected or backend.engine == "reference"
    with torch.no_grad():
        theirs = [stem_in_eager(plain.to(dtype), x.to(dtype)) for x in xs]
        truth = [stem_in_eager(copy.deepcopy(plain).double(), x.to(dtype).double()) for x in xs]
    judge(ours, theirs, truth)


@over_backends(MAXPOOL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stem(dtype, backend):
    model = fused_resnet.fuse(small()).to(dtype)
    check_stem(backend, model, backend.engine != "reference", dtype)


@over_backends(MAXPOOL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_frozen_stem(dtype, backend):
    frozen = fused_resnet.freeze(small(), example=images(0, 1, 33), dtype=dtype).model
    if backend.engine != "reference":
        frozen.conv1.engine = backend.engine
    check_stem(backend, frozen, backend.engine != "reference", dtype)


@over_backends(MAXPOOL)
def test_hook_on_a_frozen_convolution_is_called(backend):
    frozen = fused_resnet.freeze(small(), example=images(0, 1, 33)).model
    seen = []
    frozen.conv1.register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad(), Ops() as ops:
        frozen.stem(images(0, 1, 33))
    assert seen
    assert MAXPOOL not in ops.names


@over_backends(MAXPOOL)
def test_autocast(backend):
    """The convolution in the lower type, as torch has it; BatchNorm's result is not."""
    model, x = fused_resnet.fuse(small()), images(0, 1, 33)
    context = torch.autocast("cpu", torch.float16)
    with torch.no_grad(), fused_resnet.use_engine(backend.engine), context, Ops() as ops:
        y = model.stem(x)
        theirs = stem_in_eager(fused_resnet.unfuse(small()), x)
    assert (MAXPOOL in ops.names) == (backend.engine != "reference")
    assert y.dtype == torch.float16
    exact = stem_in_eager(fused_resnet.unfuse(small()).double(), x.double())
    judge([y], [theirs.half()], [exact])


@pytest.mark.parametrize("engine", ["auto", "native", "vendor", "reference"])
def test_not_where_nobody_asks_for_it(engine):
    """On a CPU, storing the image in between is right."""
    model = fused_resnet.fuse(small())
    with torch.no_grad(), fused_resnet.use_engine(engine), Ops() as ops:
        model.stem(images(0, 1, 33))
    assert MAXPOOL not in ops.names


@over_backends(MAXPOOL)
def test_not_in_training(backend):
    with fused_resnet.use_engine(backend.engine), Ops() as ops:
        fused_resnet.fuse(small()).stem(images(0, 1, 33))
    assert MAXPOOL not in ops.names


@pytest.mark.parametrize("engine", ["auto", "reference", "vendor", CUDNN])
def test_only_engines_of_our_own_pool_at_once(engine):
    for op in engines.POOL_OPS:
        assert not engines.pools(op, engine, "cuda", torch.float16)
        assert not engines.pools(op, engine, "cpu", torch.float16)


# --- The end. ---


def features(seed):
    return images(seed, 2, 5, 4, channels=24)


def run_end(backend, model, x):
    with torch.no_grad(), fused_resnet.use_engine(backend.engine), Ops() as ops:
        return model.end(x), AVGPOOL in ops.names


@functools.cache
def _narrow():
    model = small()
    model.layer1 = nn.Conv2d(64, 24, 1)
    model.layer2 = model.layer3 = nn.Identity()
    model.layer4 = nn.Sequential(bottleneck(0, planes=6), bottleneck(1, planes=6))
    model.fc = nn.Linear(24, 10)
    return model


def narrow():
    """A ResNet whose end is of few channels: they are emulated."""
    return copy.deepcopy(_narrow())


@over_backends(AVGPOOL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_end(frozen, dtype, backend):
    own, plain = backend.engine != "reference", narrow().to(dtype)
    model = fused_resnet.fuse(narrow()).to(dtype)
    if frozen:
        model = fused_resnet.freeze(narrow(), example=images(0, 1, 33), dtype=dtype).model
        model.layer4[-1].conv3.engine = backend.engine
    exact = copy.deepcopy(plain).double()
    sides = [[], [], []]
    for seed in range(3):
        x = features(seed).to(dtype)
        y, at_once = run_end(backend, model, x)
        assert at_once == own
        sides[0].append(y)
        with torch.no_grad():
            sides[1].append(plain.avgpool(plain.layer4(x)))
            sides[2].append(exact.avgpool(exact.layer4(x.double())))
    judge(*sides)


@pytest.mark.parametrize("path", ["layer4", "layer4.1", "layer4.1.relu", "avgpool"])
@over_backends(AVGPOOL)
def test_what_is_watched_is_called(path, backend):
    model, seen = fused_resnet.fuse(narrow()), []
    model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call))
    assert not run_end(backend, model, features(0))[1]
    assert seen


@over_backends(AVGPOOL)
def test_end_as_torchs_where_it_is_another(backend):
    """Another pooling, a block that projects or is of another class, and training."""

    def other_pooling(model):
        model.avgpool = nn.AdaptiveAvgPool2d(2)

    def projecting_block(model):
        model.layer4[1] = fused_resnet.fuse(bottleneck(2))

    def own_class(model):
        model.layer4[1].__class__ = type("Own", (type(model.layer4[1]),), {})

    for change in (other_pooling, projecting_block, own_class, nn.Module.train):
        model = fused_resnet.fuse(narrow())
        change(model)
        assert not run_end(backend, model, features(0))[1]


@pytest.mark.parametrize("engine", ["auto", "native", "vendor", "reference"])
def test_end_not_where_nobody_asks_for_it(engine):
    with fused_resnet.use_engine(engine), torch.no_grad(), Ops() as ops:
        fused_resnet.fuse(narrow()).end(features(0))
    assert AVGPOOL not in ops.names
