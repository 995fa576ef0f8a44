"""freeze in 8 bits: what becomes bytes, how far off it is, what it is calibrated on."""

import copy
import dataclasses
import pickle

import pytest
import torch
from models import basic, double, frozen_layers, images, network, on, settle, small
from test_frozen_file import refused, rewrite
from tolerances import UNIT, judge
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock

import fused_resnet
from bench import run
from fused_resnet import save_frozen, variants
from fused_resnet.frozen_conv import FrozenConv
from fused_resnet.int8 import Grid, Int8Conv
from fused_resnet.measure import measure
from fused_resnet.serving import NO_TIME

CALIBRATION = [images(seed, 4, 64) for seed in (10, 11)]
X = images(12, 2, 64)
BUILDS = {"basic": lambda: small(block=BasicBlock, layers=2), "bottleneck": lambda: small(layers=2)}


def quantize(source, calibration=CALIBRATION, example=X, **kwargs):
    return fused_resnet.freeze(
        source, example=example, dtype=torch.int8, calibration=calibration, **kwargs
    )


@pytest.fixture(scope="module", params=BUILDS)
def source(request):
    return BUILDS[request.param]()


@pytest.fixture(scope="module")
def frozen(source):
    return quantize(source)


def layers(frozen):
    return {path: m for path, m in frozen.model.named_modules() if isinstance(m, Int8Conv)}


def scaled(layer):
    """The weight of a layer of float32, in float64."""
    weight = layer.weight.double()
    return weight if layer.scale is None else weight * layer.scale.double().view(-1, 1, 1, 1)


def test_all_but_the_first_are_in_bytes(frozen):
    """And what they pass on to each other is: float32 are the stem, and the last image."""
    found = layers(frozen)
    assert len(found) == len(frozen_layers(frozen)) - 1
    assert type(frozen.model.conv1) is FrozenConv
    assert frozen.model.grid is not None
    last = [path for path, m in found.items() if m.out is None]
    assert last == ["layer4.1.conv3" if "layer4.1.conv3" in found else "layer4.1.conv2"]
    added = [path for path, m in found.items() if m.residual is not None]
    assert len(added) == 8
    assert all(m.x.zero == 0 for m in found.values())  # behind ReLUs
    for path, m in found.items():
        if path.endswith("downsample.0"):
            assert 0 < m.out.zero < 255
    assert {m.weight.dtype for m in found.values()} == {torch.int8}


def test_layers_keep_to_the_bound(frozen, source):
    """Each result is off by what its weights' roundings, and its own, can make of its input."""
    exact = {
        path: m
        for path, m in fused_resnet.freeze(source, example=X).model.named_modules()
        if isinstance(m, FrozenConv)
    }
    seen = []

    def check(layer, args, y, path):
        x, act, residual = (*args, None)[:3]
        if x.dtype != torch.uint8:
            x = layer.x.quantize(x)
        x = layer.x.scale * (x.double() - layer.x.zero)
        added = 0.0
        if residual is not None:
            added = residual.double()
            if layer.residual is not None:
                added = layer.residual.scale * (added - layer.residual.zero)
        weight, geometry = scaled(exact[path]), layer.geometry
        shift = exact[path].shift.double().view(1, -1, 1, 1)
        truth = F.conv2d(x, weight, None, *geometry) + shift + added
        magnitude = F.conv2d(x.abs(), weight.abs(), None, *geometry) + shift.abs()
        truth = truth.relu() if act == "relu" else truth
        step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
        bound = F.conv2d(x.abs(), (step / 2).expand_as(weight), None, *geometry)
        bound += 32 * UNIT[torch.float32] * (magnitude + abs(added))
        if layer.out is not None:
            grid = layer.out
            y = grid.scale * (y.double() - grid.zero)
            truth = truth.clamp(-grid.zero * grid.scale, (255 - grid.zero) * grid.scale)
            bound += grid.scale / 2
        assert ((y - truth).abs() <= bound).all(), path
        seen.append(path)

    again = copy.deepcopy(frozen)
    for path, m in layers(again).items():
        m.register_forward_hook(lambda m, args, y, path=path: check(m, args, y, path))
    again(CALIBRATION[0])
    assert sorted(seen) == sorted(layers(again))


def noisy(source, frozen, seed):
    """The source in float64, each weight and each activation that ``frozen`` rounds off by chance.

    As much as rounding is: evenly spread over a step. Zeros behind a ReLU are numbers that bytes
    have.
    """
    g = torch.Generator().manual_seed(seed)
    model = fused_resnet.freeze(copy.deepcopy(source).double(), example=X.double()).model

    def noise(t):
        return torch.rand(t.shape, generator=g, dtype=torch.float64) - 0.5

    def perturb(t, grid):
        return t + noise(t) * grid.scale * (t != 0)

    for path, int8 in layers(frozen).items():
        m = model.get_submodule(path)
        m.weight = scaled(m)
        m.scale = None
        m.weight += noise(m.weight) * m.weight.abs().amax((1, 2, 3), keepdim=True) / 127
        m.engine = "native"
        m.forget()
        if int8.out is not None:
            m.register_forward_hook(lambda m, args, y, grid=int8.out: perturb(y, grid))
    grid, quantize = frozen.model.grid, perturb

    class Noisy:
        def quantize(self, y):
            return quantize(y, grid)

    model.grid = Noisy()
    return model


def test_error_is_that_of_rounding(source, frozen):
    """By the rule, beside a network whose numbers are off by chance by as much as rounding is."""
    x = [*CALIBRATION, X]
    with torch.no_grad():
        truth = [double(source, t) for t in x]
        ours = [frozen(t).double() for t in x]
        chance = [noisy(source, frozen, seed)(t.double()) for seed, t in enumerate(x)]
    judge(ours, chance, truth)


def test_the_engine_gives_the_bits_of_the_specification(frozen):
    own = on(copy.deepcopy(frozen), "native")
    expected = own(X)
    reference = copy.deepcopy(own)
    for m in layers(reference).values():
        m.engine = "reference"
    assert torch.equal(reference(X), expected)


@pytest.mark.parametrize("shape", [(1, 33), (7, 64), (2, 47, 90), (0, 64)])
def test_any_batch_and_size(frozen, source, shape):
    x = images(1, max(1, shape[0]), *shape[1:])[: shape[0]]
    y = frozen(x)
    assert y.dtype == torch.float32
    assert y.shape == source(x).shape
    single = [frozen(t) for t in x.split(1)] if len(x) else [y]
    judge([torch.cat(single)], [y], [y.double()])  # an image does not depend on the others


def test_large_batch(frozen):
    """However a batch is cut inside, the images do not notice."""
    x = images(3, 60, 64)
    layer = on(copy.deepcopy(frozen), "native")
    assert torch.equal(layer(x)[50:], layer(x[50:]))


def test_errors(frozen):
    assert frozen.errors.keys() == {"eager", "frozen", "calibration"}
    found = frozen.errors["calibration"]
    assert 0 < found["mean"] < found["max"]
    assert frozen.errors["eager"]["mean"] < frozen.errors["frozen"]["mean"]
    assert 0 <= found["top5"] <= 1
    assert frozen.layer_errors.keys() == {"conv1"}


def test_agreement_is_counted(source):
    """Against frozen float32, over all batches."""
    frozen = quantize(source)
    exact = fused_resnet.freeze(source, example=X)
    with torch.no_grad():
        pairs = [(exact(x), frozen(x)) for x in CALIBRATION]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    errors = torch.cat([(a.double() - b).abs().flatten() for a, b in pairs]) / largest
    shared = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
        for pair in pairs
        for a, b in zip(*pair, strict=True)
    ]
    found = frozen.errors["calibration"]
    assert found["top5"] == pytest.approx(sum(shared) / len(shared))
    assert found["mean"] == pytest.approx(float(errors.mean()), rel=1e-2)


def test_outputs_that_are_no_classes_have_no_agreement():
    found = quantize(basic(), [images(0, 2, 9, channels=24)], images(0, 1, 9, channels=24)).errors
    assert found["calibration"].keys() == {"mean", "max"}


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies(frozen, duplicate):
    frozen(X)
    again = duplicate(frozen)
    assert all(m._packed is None for m in layers(again).values()) or duplicate is copy.deepcopy
    assert torch.equal(again(X), frozen(X))
    with pytest.raises(RuntimeError, match=r"input must be torch\.float32"):
        again(X.bfloat16())
    with pytest.raises(RuntimeError, match="stays"):
        again.half()


def test_files(frozen, source, tmp_path):
    save_frozen(frozen, tmp_path / "model")
    with torch.device("meta"):
        empty = copy.deepcopy(source).to("meta")
    again = fused_resnet.load_frozen(tmp_path / "model", empty)
    assert torch.equal(again(X), frozen(X))
    assert again.errors == frozen.errors
    assert again.model.grid == frozen.model.grid
    assert {k: m.grids for k, m in layers(again).items()} == {
        k: m.grids for k, m in layers(frozen).items()
    }
    plain = fused_resnet.freeze(source, example=X)
    save_frozen(plain, tmp_path / "plain")
    size = [(tmp_path / name).stat().st_size for name in ("model", "plain")]
    assert size[0] < 0.4 * size[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d["layers"]["layer2.0.conv1"].update(grids=3), "its description is damaged"),
        (
            lambda d: d["layers"]["layer2.0.conv1"]["grids"]["x"].pop("zero"),
            "its description is damaged",
        ),
        (lambda d: d["layers"]["layer2.0.conv1"].pop("grids"), "layer2.0.conv1.weight is"),
        (lambda d: d.update(stems={"layer1": d["stems"][""]}), "the model has no stem 'layer1'"),
    ],
)
def test_files_that_are_damaged(frozen, source, tmp_path, damage, words):
    save_frozen(frozen, tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors, description: damage(description))
    refused(tmp_path / "model", source, words)


def test_compiles(frozen):
    torch.compiler.reset()
    program = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    expected = frozen(X)
    judge([program(X)], [expected], [expected.double()])


def test_exports(frozen):
    expected = frozen(X)
    program = torch.export.export(frozen, (X,))
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    called = [str(node.target) for graph in graphs for node in graph.nodes]
    assert called.count("fused_resnet.conv_int8.default") == len(layers(frozen))
    judge([program.module()(X)], [expected], [expected.double()])


def test_benchmark(source):
    """Its gate lets a network in 8 bits pass, and not one that was calibrated on other images."""
    x = [images(seed, 2, 64) for seed in (30, 31)]
    with torch.no_grad():
        truth = torch.cat([double(source, t) for t in x])
    ways = [variants.eager(source, torch.float32, "NHWC")]
    for name, scale in (("right", 1), ("wrong", 1e-3)):
        int8 = variants.int8(source, X, CALIBRATION[0] * scale)
        assert not run.wanted(int8, ["*"])
        assert run.wanted(int8, ["frozen int8"])
        ways.append(dataclasses.replace(int8, name=name))
    results = {r.variant: r for r in measure(ways, x, truth, NO_TIME)}
    assert results["right"].within
    assert not results["wrong"].within


class Watched(nn.Module):
    """What comes between the layers is read by something else as well."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.third = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        y = self.first(x)
        z = self.second(y)
        return z if x.size(0) > 2 else self.third(z) + y.mean()


def test_what_others_read_stays_float():
    source = Watched().eval()
    x = images(0, 2, 9, channels=8)
    frozen = quantize(source, [x], x)
    found = layers(frozen)
    assert len(found) == 3
    assert all(m.out is None for m in found.values())  # a forward of one's own may do otherwise
    assert 0 < found["third.0"].x.zero < 255
    with torch.no_grad():
        exact = source(x)
        error = (frozen(x) - exact).abs().max() / exact.abs().max()
        assert frozen(images(0, 3, 9, channels=8)).shape == (3, 8, 5, 5)
    assert float(error) == pytest.approx(frozen.errors["calibration"]["max"], rel=1e-3)


def test_a_sequence():
    """Bytes between its layers, with a zero of their own where no ReLU is."""
    source = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2), nn.BatchNorm2d(8), nn.ReLU()),
    ).eval()
    x = images(0, 4, 17, channels=8)
    frozen = quantize(source, [x], x)
    found = layers(frozen)
    assert found.keys() == {"0", "2", "5", "7.0"}
    for maker, reader in (("0", "2"), ("2", "5"), ("5", "7.0")):
        assert found[maker].out == found[reader].x
        assert (0 < found[reader].x.zero < 255) == (maker != "2")
    assert found["7.0"].out is None
    with torch.no_grad():
        error = (frozen(x) - source(x)).abs().max() / source(x).abs().max()
    assert float(error) == pytest.approx(frozen.errors["calibration"]["max"], rel=1e-3)


def test_detection_backbone():
    """What a pyramid takes of the stages is float32, and stages read it as they did."""
    torch.manual_seed(0)
    source = settle(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 0, X)
    frozen = quantize(source, [X])
    floats = {path.rpartition(".layer")[2] for path, m in layers(frozen).items() if not m.out}
    assert floats == {f"{stage}.1.conv2" for stage in (1, 2, 3, 4)}
    with torch.no_grad():
        exact, found = source(X), frozen(X)
    largest = max(float(t.abs().max()) for t in exact.values())
    error = max(float((found[name] - t).abs().max()) for name, t in exact.items()) / largest
    assert error == pytest.approx(frozen.errors["calibration"]["max"], rel=1e-2)


def test_narrow_groups_stay_float():
    source = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)).eval()
    x = images(0, 2, 9, channels=8)
    assert not layers(quantize(source, [x], x))


def test_a_layer_at_two_places():
    """What it is given at one is on another grid than at the other: it goes on as float32."""
    twice = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    source = nn.Sequential(twice, twice).eval()
    x = images(0, 2, 5, channels=8)
    frozen = quantize(source, [x], x)
    assert {m.out for m in layers(frozen).values()} == {None}
    with torch.no_grad():
        error = (frozen(x) - source(x)).abs().max() / source(x).abs().max()
    assert float(error) == pytest.approx(frozen.errors["calibration"]["max"], rel=1e-3)


def test_vanishing_and_constant_channels():
    """A channel without weights, an input of zeros: no step is zero."""
    source = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        source[0].weight[3] = 0
    x = torch.zeros(1, 8, 4, 4)
    frozen = quantize(source, [x], x)
    with torch.no_grad():
        judge([frozen(x)], [source(x)], [double(source, x)])


@pytest.mark.parametrize("least", [0.0, -0.2, -1.0, -3.0])
@pytest.mark.parametrize("most", [0.0, 0.3, 1.0, 1e-3])
def test_grids_reach_from_end_to_end(least, most):
    grid = Grid.of(least, most)
    half = grid.scale / 2 * (1 + 1e-12)
    assert -grid.zero * grid.scale <= least + half
    assert (255 - grid.zero) * grid.scale >= most - half
    assert grid.scale == (1.0 if least == most else pytest.approx((most - least) / 255))
    assert grid.zero == 0 or least < 0


def test_labels_of_a_loader_are_left_out(source):
    data = torch.utils.data.TensorDataset(torch.cat(CALIBRATION), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    ours, plain = quantize(source, loader), quantize(source, iter(CALIBRATION))
    assert torch.equal(on(ours, "native")(X), on(plain, "native")(X))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, TypeError, "calibration must be given for dtype torch.int8.*got None"),
        (7, TypeError, "calibration must be an iterable of inputs, got int"),
        ([], ValueError, "calibration must hold at least one batch of images, got none"),
        ([X[:0]], ValueError, "calibration must hold at least one batch of images, got none"),
        ([X, "images"], TypeError, "must yield tensors.*1 inputs.*got str as number 1"),
        ([()], ValueError, "at least one batch"),
        ([X, X * torch.nan], ValueError, "must be finite, batch number 1 has NaN"),
        ([X, X / 0], ValueError, "must be finite, batch number 1"),
    ],
)
def test_bad_calibration(given, error, words):
    with pytest.raises(error, match=f"freeze: .*{words}"):
        quantize(small(), given)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"calibration is for dtype torch\.int8, got dtype None"):
        fused_resnet.freeze(small(), example=X, calibration=CALIBRATION)
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        fused_resnet.freeze(small(), example=X, dtype=torch.uint8, calibration=CALIBRATION)
    with pytest.raises(RuntimeError, match=r"torch\.int8 is for CPUs, got a model on meta"):
        quantize(small().to("meta"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_networks(name):
    source = network(name)
    x = [images(seed, 4, 64) for seed in (20, 21)]
    frozen = quantize(source, x, x[0])
    with torch.no_grad():
        truth = [double(source, t) for t in x]
        chance = [noisy(source, frozen, seed)(t.double()) for seed, t in enumerate(x)]
        judge([frozen(t).double() for t in x], chance, truth)
