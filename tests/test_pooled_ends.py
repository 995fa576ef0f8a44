"""Where a network's first convolution and the pooling behind it run as one op."""

import copy

import pytest
import torch
from cases import backends, over_backends
from models import Ops, images, small
from tolerances import judge

import fused_resnet
from fused_resnet import engines
from fused_resnet.frozen_conv import CUDNN

MAXPOOL = "conv_bn_act_maxpool"
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


def test_not_in_training():
    for param in backends(MAXPOOL):
        with fused_resnet.use_engine(param.values[0].engine), Ops() as ops:
            fused_resnet.fuse(small()).stem(images(0, 1, 33))
        assert MAXPOOL not in ops.names


@pytest.mark.parametrize("engine", ["auto", "reference", "vendor", CUDNN])
def test_only_engines_of_our_own_pool_at_once(engine):
    for op in engines.POOL_OPS:
        assert not engines.pools(op, engine, "cuda", torch.float16)
        assert not engines.pools(op, engine, "cpu", torch.float16)
