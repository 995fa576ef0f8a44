"""freeze: the serving copy, what it accepts and refuses, how it is copied, saved and loaded."""

import copy
import warnings

import pytest
import torch
from models import (
    ENGINES,
    SEEDS,
    basic,
    bottleneck,
    double,
    frozen_layers,
    images,
    on,
    settle,
    small,
)
from tolerances import judge
from torch import nn
from torch.nn.utils import prune
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fused_resnet
from fused_resnet import measure, vendor
from fused_resnet.frozen_conv import FOLD_BOUND, FrozenConv


@pytest.fixture(scope="module")
def source():
    return small()


@pytest.fixture(scope="module")
def frozen(source):
    return fused_resnet.freeze(source, example=images(0, 1, 33))


def check(frozen, source, size=33):
    """``frozen`` gives what ``source`` does, by the rule."""
    found = []
    for seed in SEEDS:
        x = images(seed, 2, size)
        with torch.no_grad():
            found.append((frozen(x), source(x), double(source, x)))
    judge(*zip(*found, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1, 33), (5, 33), (2, 64), (1, 47, 90)])
def test_any_batch_and_size(frozen, source, shape, engine):
    x = images(1, *shape)
    with torch.no_grad():
        judge([on(frozen, engine)(x)], [source(x)], [double(source, x)])


@pytest.mark.parametrize("engine", ENGINES)
def test_large_batch(frozen, source, engine):
    """However a batch is cut inside, the images do not notice, nor does who looks in."""
    x, seen = images(3, 150, 33), []
    handle = frozen.model.layer4.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    with torch.no_grad():
        judge([on(frozen, engine)(x)], [source(x)], [double(source, x)])
        handle.remove()
        judge([frozen(x)], [source(x)], [double(source, x)])
    assert seen == [150]


class Head(nn.Module):
    def forward(self, x):
        return {"features": x, "center": x - x.mean(0)}


def test_a_head_of_ones_own():
    """It is given the whole batch, and may return what it likes."""
    source = small()
    source.fc = Head().eval()
    frozen = fused_resnet.freeze(source, example=images(0, 1, 33))
    x = images(3, 150, 33)
    with torch.no_grad():
        ours, theirs, exact = frozen(x), source(x), copy.deepcopy(source).double()(x.double())
    for key in ("features", "center"):
        judge([ours[key]], [theirs[key]], [exact[key]])


def test_empty_batch(frozen, source):
    with torch.no_grad():
        assert frozen(images(0, 2, 33)[:0]).shape == source(images(0, 2, 33)[:0]).shape


@pytest.mark.parametrize("engine", ENGINES)
def test_layouts(frozen, engine):
    """The output does not depend on how the input is laid out, nor is the input changed."""
    x = images(0, 2, 33)
    expected = on(frozen, engine)(x)
    views = (
        x.contiguous(memory_format=torch.channels_last),
        images(0, 2, 33).repeat(1, 1, 1, 2)[..., :33],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x),
        torch._neg_view(-x),
    )
    for view in views:
        assert torch.equal(frozen(view), expected)
    assert torch.equal(x, images(0, 2, 33))


def test_no_parameter_left_behind(frozen, source):
    """Every pair has become one layer; nothing wants a gradient."""
    convs = [m for m in source.modules() if isinstance(m, nn.Conv2d)]
    assert len(frozen_layers(frozen)) == len(convs)
    assert not any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in frozen.modules())
    assert not any(t.requires_grad for t in (*frozen.parameters(), *frozen.buffers()))
    assert not frozen(images(0, 1, 33)).requires_grad


def test_of_a_fused_model(frozen, source):
    model = fused_resnet.fuse(copy.deepcopy(source))
    again = fused_resnet.freeze(model, example=images(0, 1, 33))
    x = images(0, 2, 33)
    assert torch.equal(on(again, "native")(x), on(frozen, "native")(x))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 4, 33, 33), torch.zeros(33), torch.zeros(1, 3, 33, 33, dtype=torch.int)]
)
def test_bad_input(frozen, source, x):
    with pytest.raises((RuntimeError, ValueError)):
        source(x)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        frozen(x)


def test_bad_arguments(source):
    x = images(0, 1, 33)
    for dtype in (torch.int32, torch.bool, "float32", 16):
        with pytest.raises(TypeError, match=r"dtype must be a floating point torch.dtype, got"):
            fused_resnet.freeze(source, example=x, dtype=dtype)
    for wrong in (None, nn.Conv2d, torch.zeros(1)):
        with pytest.raises(TypeError, match=r"must be a torch\.nn.Module, got"):
            fused_resnet.freeze(wrong, example=x)
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        fused_resnet.freeze(small().train(), example=x)
    with pytest.raises(RuntimeError, match=r"before torch\.compile, not after"):
        fused_resnet.freeze(torch.compile(source), example=x)
    with pytest.raises(TypeError, match="example"):
        fused_resnet.freeze(source)
    mixed = small()
    mixed.layer1.double()
    with pytest.raises(RuntimeError, match=r"one dtype, got .*float32.*float64"):
        fused_resnet.freeze(mixed, example=x)


def test_partly_in_training_mode():
    """A BatchNorm that takes its statistics from the batch has none to fold."""
    source = small()
    source.layer2[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"layer2\.0\.bn1"):
        fused_resnet.freeze(source, example=images(0, 2, 33))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [basic, bottleneck], ids=["basic", "bottleneck"])
def test_nan_and_inf(build, dtype, engine):
    """Not a number stays so, through every ReLU, and where eager has it only."""
    source = build().to(dtype)
    x = images(0, 2, 9, channels=24).to(dtype)
    frozen = on(fused_resnet.freeze(source, example=x), engine)
    x[0, 3, 4, 4] = torch.nan
    x[1, 5, 0, 0] = torch.inf
    x[1, 7, 8, 8] = -torch.inf
    with torch.no_grad():
        ours, theirs = frozen(x), source(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert ours.isnan().any()
    assert not ours.isnan().all()


def extreme(weight, gamma):
    """A pair whose product no float32 weight can hold, though its output can be."""
    conv, bn = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    with torch.no_grad():
        conv.weight[3] *= weight
        bn.weight[3] *= gamma
    return nn.Sequential(conv, bn, nn.ReLU()).eval()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("weight", "gamma", "folded"),
    [(1, 1, True), (1e20, 1e20, False), (1e-12, 1e-30, False), (1e20, 1e-20, True)],
)
def test_fold_bound(weight, gamma, folded, engine):
    source = extreme(weight, gamma)
    x = torch.rand(2, 4, 6, 6) * (1e-10 if weight > 1 and not folded else 1)
    frozen = on(fused_resnet.freeze(source, example=x), engine)
    (layer,) = frozen_layers(frozen)
    assert layer.folded == folded
    assert f"folded={folded}" in repr(frozen)
    assert bool(frozen.unfolded) != folded
    with torch.no_grad():
        ours, theirs, exact = frozen(x), source(x), double(source, x)
    for channel in (slice(3), slice(3, 4), slice(4, 8)):
        judge([ours[:, channel]], [theirs[:, channel]], [exact[:, channel]])
    assert 0 < FOLD_BOUND < 1e-6


def hurt_by_folding():
    """The channel's other weight is so large that what folding does to this one is in the bound."""
    source = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()).eval()
    with torch.no_grad():
        source[0].weight.copy_(torch.tensor([1, 1.7e-30]).view(1, 2, 1, 1))
        source[1].weight.fill_(1.3e-12)
    return source, torch.rand(2, 2, 6, 6) * torch.tensor([0, 1e30]).view(2, 1, 1)


def test_a_layer_that_folding_hurts(tmp_path):
    """It keeps its scale apart, is as near to float64 as eager torch then, and is named."""
    source, x = hurt_by_folding()
    source = source.extend([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2).eval()])
    frozen = fused_resnet.freeze(source, example=x)
    assert [m.folded for m in frozen_layers(frozen)] == [False, True]
    assert frozen.layer_errors.keys() == {"0", "3"}
    assert frozen.unfolded.keys() == {"0"}
    assert "error is" in frozen.unfolded["0"]
    assert "folded=False" in repr(frozen)
    judge([frozen(x)], [source(x)], [double(source, x)])
    fused_resnet.save_frozen(frozen, tmp_path / "file")
    again = fused_resnet.load_frozen(tmp_path / "file", source)
    assert (again.unfolded, again.layer_errors) == (frozen.unfolded, frozen.layer_errors)
    assert torch.equal(again(x), frozen(x))
    with torch.no_grad():
        forced = FrozenConv.of(source[0], source[1], torch.float32)
    assert forced.folded
    with torch.no_grad(), pytest.raises(AssertionError, match="error"):
        judge([forced(x, "relu")], [source[:3](x)], [double(source[:3], x)])


def test_no_layer_is_further_from_float64_than_the_rule_allows(frozen):
    assert len(frozen.layer_errors) == len(frozen_layers(frozen))
    for found in frozen.layer_errors.values():
        own, eager = (measure.Error(**found[way]) for way in ("frozen", "eager"))
        assert 0 < own.mean <= own.max
        assert measure.within(own, eager)
    assert not frozen.unfolded


def test_half_is_not_folded():
    for dtype in (torch.bfloat16, torch.float16):
        frozen = fused_resnet.freeze(basic(), example=torch.rand(1, 24, 5, 5), dtype=dtype)
        assert {m.weight.dtype for m in frozen_layers(frozen)} == {dtype}
        assert {m.scale.dtype for m in frozen_layers(frozen)} == {torch.float32}


def test_errors(frozen, source):
    assert frozen.errors.keys() == {"eager", "frozen"}
    for found in frozen.errors.values():
        assert 0 < found["mean"] < found["max"] < 1e-4
    x = images(0, 1, 33)
    with torch.no_grad():
        exact = double(source, x)
        error = (source(x) - exact).abs() / exact.abs().max()
    assert frozen.errors["eager"]["max"] == pytest.approx(float(error.max()), rel=1e-3)


def test_errors_of_a_fused_source(source):
    """Eager is torch, also where the source is fused."""
    x = images(0, 1, 33)
    plain = fused_resnet.freeze(source, example=x).errors["eager"]
    fused = fused_resnet.fuse(copy.deepcopy(source))
    assert fused_resnet.freeze(fused, example=x).errors["eager"] == plain


@pytest.mark.parametrize("engine", ENGINES)
def test_sequential(engine):
    source = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 1),
        nn.Hardswish(),
    )
    settle(source, 0, images(1, 4, 33))
    frozen = on(fused_resnet.freeze(source, example=images(0, 1, 33)), engine)
    assert len(frozen_layers(frozen)) == 2
    check(frozen, source)


def test_only_a_cpu_takes_a_batch_in_slices(frozen):
    """A GPU is filled by the whole of it."""
    assert frozen.model.slices(torch.empty(0))
    assert not frozen.model.slices(torch.empty(0, device="meta"))


def test_what_cannot_be_frozen_is_copied():
    source = small()
    prune.l1_unstructured(source.layer2[0].conv1, "weight", 0.5)
    source.layer3[0].register_forward_hook(lambda m, args, y: y * 2)
    with torch.no_grad():
        source(
            images(0, 1, 33)
        )  # torch copies a pruned module only with a weight free of gradients
    frozen = fused_resnet.freeze(source, example=images(0, 1, 33))
    kinds = {type(m) for m in frozen.model.layer2.modules()}
    assert nn.Conv2d in kinds
    assert FrozenConv not in kinds
    check(frozen, source)


def test_detection_backbone():
    torch.manual_seed(0)
    source = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    settle(source, 0)
    frozen = fused_resnet.freeze(source, example=images(0, 1, 64))
    assert len(frozen_layers(frozen)) == 20  # the stem, too
    for size in (64, 97):
        x = images(1, 1, size)
        with torch.no_grad():
            ours, theirs = frozen(x), source(x)
            exact = copy.deepcopy(source).double()(x.double())
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            judge([value], [theirs[name]], [exact[name]])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, a, b, *, scale=1.0):
        return {"sum": self.body(a) + self.body(b) * scale, "count": 2}


def test_several_inputs():
    source = TwoInputs().eval()
    a, b = images(0, 1, 33), images(1, 2, 40)
    frozen = fused_resnet.freeze(source, example=(a, b))
    with torch.no_grad():
        ours, theirs = frozen(a, b, scale=0.5), source(a, b, scale=0.5)
        exact = copy.deepcopy(source).double()(a.double(), b.double(), scale=0.5)
    assert ours["count"] == 2
    judge([ours["sum"]], [theirs["sum"]], [exact["sum"]])


@pytest.mark.parametrize("engines", [("native",), ("vendor",), ENGINES, ENGINES[::-1]], ids=str)
def test_autocast(frozen, engines):
    """The dtype was chosen when freezing: autocast changes nothing, however the tuner chose."""
    for i, m in enumerate(frozen_layers(frozen)):
        m.engine = engines[i % len(engines)]
    x = images(0, 2, 33)
    expected = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_are_bit_equal(source, dtype, engine):
    x = images(0, 3, 33).to(dtype)
    model = on(fused_resnet.freeze(source, example=x, dtype=dtype), engine)
    first = model(x)
    assert all(torch.equal(model(x), first) for _ in range(5))


@pytest.mark.parametrize("order", [("native", "vendor"), ("vendor", "native")], ids=str)
def test_an_engine_that_fails_is_not_taken(source, monkeypatch, order):
    def planted(*args):
        raise OSError("planted")

    x = images(0, 1, 33)
    monkeypatch.setattr(FrozenConv, "candidates", lambda *args: order)
    monkeypatch.setattr(vendor, "conv_bn_act", planted)
    frozen = fused_resnet.freeze(source, example=x)
    layers = {path for path, m in frozen.model.named_modules() if isinstance(m, FrozenConv)}
    assert frozen.failed == {path: {"vendor": "OSError: planted"} for path in layers}
    assert {m.engine for m in frozen_layers(frozen)} == {"native"}
    judge([frozen(x)], [source(x)], [double(source, x)])
    monkeypatch.setattr(FrozenConv, "candidates", lambda *args: ["vendor"])
    with pytest.raises(OSError, match="planted"):
        fused_resnet.freeze(source, example=x)


def test_quiet():
    """Freezing and calling warn about nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.use_deterministic_algorithms(False)
        fused_resnet.freeze(small(), example=images(0, 1, 33))(images(0, 1, 33))
