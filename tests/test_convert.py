"""fuse, unfuse and report: what they change, what they leave alone, what still works after them."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from models import SEEDS, Ops, bottleneck, double, images, network, runs_fused, settle, small
from tolerances import judge
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet as torchvision_resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fused_resnet


def same_state(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key
    return True


def types(model):
    return [type(m) for m in model.modules()]


def check_outputs(model, plain, x):
    """``model`` runs fused, and as ``plain`` does."""
    with torch.no_grad():
        assert runs_fused(model, x)
        judge([model(x)], [plain(x)], [double(plain, x)])


def test_fuse_keeps_everything():
    model, plain = small(), small()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert fused_resnet.fuse(model) is model
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), types(plain), strict=True))
    assert type(model) is fused_resnet.blocks.ResNet
    assert type(model.layer1[0]) is fused_resnet.Bottleneck
    assert type(model.layer1[0].downsample) is nn.Sequential
    assert same_state(model.state_dict(), plain.state_dict())
    assert model.state_dict()._metadata == plain.state_dict()._metadata
    check_outputs(model, plain, images(0, 2, 33))


def test_fuse_twice_and_unfuse():
    model = small()
    before = types(model)
    once = types(fused_resnet.fuse(model))
    assert once != before
    assert types(fused_resnet.fuse(model)) == once
    assert fused_resnet.unfuse(model) is model
    assert types(model) == before
    assert types(fused_resnet.unfuse(model)) == before
    with torch.no_grad():
        assert not runs_fused(model, images(0, 1, 33))
    assert vars(model).keys() == vars(small()).keys()


def test_state_goes_both_ways():
    fused, plain = fused_resnet.fuse(small(0)), small(1)
    theirs = copy.deepcopy(plain.state_dict())
    ours = copy.deepcopy(fused.state_dict())
    assert str(fused.load_state_dict(theirs)) == str(plain.load_state_dict(ours))
    assert same_state(fused.state_dict(), theirs)
    assert same_state(plain.state_dict(), ours)
    check_outputs(fused, small(1), images(0, 1, 33))


def test_checkpoint_file():
    file = io.BytesIO()
    torch.save(fused_resnet.fuse(small(0)).state_dict(), file)
    file.seek(0)
    plain = small(1)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(plain.state_dict(), small(0).state_dict())


def test_checkpoint_without_num_batches_tracked():
    """From before torch 0.4.1: a plain dict loads strictly, one that claims a version does not."""
    full = small().state_dict()
    old = {key: value for key, value in full.items() if not key.endswith("num_batches_tracked")}
    fused_resnet.fuse(small(1)).load_state_dict(old)
    versioned = full.copy()
    versioned._metadata = full._metadata
    for key in full.keys() - old.keys():
        del versioned[key]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fused_resnet.fuse(small(1)).load_state_dict(versioned)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    model = fused_resnet.fuse(small())
    again = duplicate(model)
    assert types(again) == types(model)
    with torch.no_grad():
        again.conv1.weight.zero_()
        assert model.conv1.weight.abs().max() > 0
    again.load_state_dict(model.state_dict())
    x = images(0, 1, 33)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


class OwnBottleneck(torchvision_resnet.Bottleneck):
    def forward(self, x):
        return super().forward(x) * 0.5


class OwnResNet(torchvision_resnet.ResNet):
    def forward(self, x):
        return self.features(x).mean((2, 3))

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def test_own_block_is_left_alone():
    plain = small(block=OwnBottleneck)
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert type(model) is fused_resnet.blocks.ResNet
    assert type(model.layer2[0]) is OwnBottleneck
    check_outputs(model, plain, images(0, 1, 33))
    reasons = {e.conv: e.reason for e in fused_resnet.report(model)}
    assert reasons["conv1"] is None
    assert "OwnBottleneck" in reasons["layer2.0.conv1"]


def test_own_network():
    """What its forward does is proved, methods of its own included."""
    plain = settle(OwnResNet(torchvision_resnet.BasicBlock, [1] * 4), 0, images(1, 4, 64))
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert isinstance(model, OwnResNet)
    assert type(model.layer1[0]) is fused_resnet.BasicBlock
    check_outputs(model, plain, images(0, 1, 33))
    assert not fused_resnet.report(model).unfused
    assert type(fused_resnet.unfuse(model)) is OwnResNet


def test_forward_on_an_instance_is_left_alone():
    model = small()
    own = model.layer1[0]
    own.forward = lambda x: x.repeat(1, 4, 1, 1)
    fused_resnet.fuse(model)
    assert type(own) is torchvision_resnet.Bottleneck
    with torch.no_grad():
        assert torch.equal(own(torch.ones(1, 2, 3, 3)), torch.ones(1, 8, 3, 3))
    reasons = {e.conv: e.reason for e in fused_resnet.report(model)}
    assert "overridden on the instance" in reasons["layer1.0.conv2"]
    assert reasons["layer2.0.conv2"] is None


def test_forward_put_on_an_instance_after_fusing():
    model = fused_resnet.fuse(bottleneck())
    model.forward = lambda x: x + 1
    x = torch.zeros(1, 24, 3, 3)
    assert torch.equal(model(x), x + 1)
    assert all(not e.fused for e in fused_resnet.report(model))


def test_report():
    model = small()
    assert {e.reason for e in fused_resnet.report(model)} == {"fuse was not called"}
    fused_resnet.fuse(model)
    entries = fused_resnet.report(model)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(e.conv for e in entries) == sorted(convs)
    assert all(e.fused and type(model.get_submodule(e.bn)) is nn.BatchNorm2d for e in entries)
    assert not entries.unfused
    assert str(entries).endswith(f"{len(convs)} of {len(convs)} conv/BatchNorm pairs fused")
    prune.random_unstructured(model.layer3[0].conv2, "weight", 0.1)
    text = str(fused_resnet.report(model))
    assert "layer3.0.conv2" in text
    assert "hooks" in text
    assert not fused_resnet.report(nn.Linear(2, 2))


def test_strict():
    model = small()
    model.layer2[0].conv2.padding_mode = "reflect"
    before, state = types(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"layer2\.0\.conv2: conv: padding_mode is 'reflect'"):
        fused_resnet.fuse(model, strict=True)
    assert types(model) == before
    assert same_state(model.state_dict(), state)
    assert fused_resnet.fuse(small(), strict=True)
    assert fused_resnet.fuse(fused_resnet.fuse(small()), strict=True)


def test_sequential_chains():
    """conv, BatchNorm and maybe ReLU in a row, wherever they stand in an nn.Sequential."""
    plain = nn.Sequential(
        nn.MaxPool2d(2),
        nn.Conv2d(3, 8, 3, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
        nn.ReLU(),
        torchvision.ops.Conv2dNormActivation(4, 4, stride=2),
        nn.BatchNorm2d(4),
    )
    settle(plain, 0, images(1, 4, 40))
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert [e.conv for e in fused_resnet.report(model) if e.fused] == ["1", "4", "7.0", "9.0"]
    x = images(0, 2, 40)
    kept = x.clone()
    check_outputs(model, plain, x)
    assert torch.equal(x, kept)
    with torch.no_grad(), Ops() as ops:
        model(x)
    assert ops.names.count("conv_bn_act") + ops.names.count("batch_norm_act_") == 4
    assert len(model[:4]) == 4


def test_shared_block():
    """One block at two places runs fused at both."""
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    plain = settle(nn.Sequential(block, block), 0, images(1, 4, 16))
    check_outputs(fused_resnet.fuse(copy.deepcopy(plain)), plain, images(0, 2, 9))


@pytest.mark.parametrize("verb", ["fuse", "unfuse"])
def test_not_a_module(verb):
    for wrong in (None, torch.zeros(1), nn.Conv2d, "resnet50"):
        with pytest.raises(TypeError, match=f"{verb}: model must be a torch.nn.Module, got"):
            getattr(fused_resnet, verb)(wrong)


def refused(wrapped, what):
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(RuntimeError, match=rf"fuse before {what}, not after"):
            fused_resnet.fuse(model)
    return True


def test_compiled_is_refused():
    model = small()
    before = types(model)
    assert refused(torch.compile(model), "torch.compile")
    assert types(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_is_refused():
    assert refused(torch.jit.script(bottleneck()), "torch.jit.script")
    assert refused(torch.jit.trace(bottleneck(), torch.zeros(1, 24, 5, 5)), "torch.jit.script")


WRAPPED = """
import copy, sys, torch, torch.distributed as dist, torchvision, fused_resnet
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from models import bottleneck, double, images
from tolerances import judge

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)

def refused(model, what):
    try:
        fused_resnet.fuse(model)
    except RuntimeError as error:
        return f"fuse before {what}, not after" in str(error)

assert refused(DistributedDataParallel(bottleneck()), "DistributedDataParallel")
sharded = bottleneck()
fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
assert refused(sharded, "fully_shard")

# The other way round works: gradients are those of the plain block.
plain, x = bottleneck().train(), images(0, 2, 9, channels=24)
wrapped = DistributedDataParallel(fused_resnet.fuse(copy.deepcopy(plain)))
exact = copy.deepcopy(plain).double()
for model in (plain, wrapped, exact):
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()
judge(*([p.grad for p in model.parameters()] for model in (wrapped, plain, exact)))
plain.load_state_dict(wrapped.module.state_dict())
with torch.no_grad():
    judge([wrapped.eval()(x)], [plain.eval()(x)], [double(plain, x)])

inner = fused_resnet.fuse(bottleneck())
for m in (inner.conv2, inner.bn2):
    fully_shard(m, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
with torch.no_grad():
    assert inner.obstacle(x) is not None
    assert torch.equal(inner(x), bottleneck()(x))
dist.destroy_process_group()
print("fine")
"""


def test_wrapped_for_distribution(tmp_path, request):
    """In a process of its own: a process group lasts as long as the process."""
    command = [sys.executable, "-c", WRAPPED, str(tmp_path / "store")]
    root = request.config.rootpath
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": f"{root}:{root / 'tests'}", "GLOO_SOCKET_IFNAME": "lo", "PATH": ""},
    )
    assert done.stdout == "fine\n", done.stderr


# What reads a model from the outside must see torchvision's.


@pytest.fixture(scope="module")
def pair():
    plain = small(layers=2)
    return fused_resnet.fuse(copy.deepcopy(plain)), plain


def test_feature_extractor(pair):
    model, plain = pair
    nodes = get_graph_node_names(plain)
    assert get_graph_node_names(model) == nodes
    wanted = ["relu", "layer1.1.relu_2", "layer2.0.downsample.1", "layer3", "avgpool"]
    x = images(0, 2, 33)
    with torch.no_grad():
        ours = create_feature_extractor(model, wanted)(x)
        theirs = create_feature_extractor(plain, wanted)(x)
    assert list(ours) == wanted
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_symbolic_trace(pair):
    model, plain = pair
    ours, theirs = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(plain)
    assert ours.code == theirs.code
    x = images(0, 2, 33)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("convert", [torch.jit.script, "trace"])
def test_jit(pair, convert, tmp_path):
    model, plain = pair
    x = images(0, 2, 33)
    with torch.no_grad():
        if convert == "trace":
            scripted = torch.jit.trace(model, images(1, 1, 33))
        else:
            scripted = convert(model)
        torch.jit.save(scripted, tmp_path / "model.pt")
        again = torch.jit.load(tmp_path / "model.pt")
        for m in (scripted, again):
            assert "fused_resnet::" not in str(m.inlined_graph)
            judge([m(x)], [plain(x)], [double(plain, x)])
    assert type(model) is fused_resnet.blocks.ResNet


def test_intermediate_layers(pair):
    _, plain = pair
    layers = {"layer1": "a", "layer4": "b"}
    x = images(0, 1, 33)
    ours, theirs = (IntermediateLayerGetter(m, layers) for m in pair)
    with torch.no_grad():
        assert runs_fused(ours, x)
        found, expected = ours(x), theirs(x)
        exact = IntermediateLayerGetter(copy.deepcopy(plain).double(), layers)(x.double())
    for name in ("a", "b"):
        judge([found[name]], [expected[name]], [exact[name]])


def test_detection_backbone():
    """Its BatchNorms are FrozenBatchNorm2d."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        plain = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
        settle(plain, seed)
        model = fused_resnet.fuse(copy.deepcopy(plain))
        x = images(seed, 1, 64)
        with torch.no_grad():
            assert runs_fused(model, x)
            outputs = model(x), plain(x), copy.deepcopy(plain).double()(x.double())
        found += list(zip(*(o.values() for o in outputs), strict=True))
    judge(*zip(*found, strict=True))
    fused = [e for e in fused_resnet.report(model) if e.fused]
    assert len(fused) == 20
    assert not fused_resnet.report(model).unfused


def test_segmentation():
    torch.manual_seed(0)
    plain = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    settle(plain, 0, images(1, 4, 48))
    model = fused_resnet.fuse(copy.deepcopy(plain))
    assert not fused_resnet.report(model).unfused
    found = []
    for seed in SEEDS:
        x = images(seed, 1, 65, 48)
        with torch.no_grad():
            outputs = model(x), plain(x), copy.deepcopy(plain).double()(x.double())
        found.append([o["out"] for o in outputs])
    judge(*zip(*found, strict=True))


def test_network_matches_itself_unfused():
    """Unfusing gives the very outputs back."""
    model, x = network("resnet18"), images(0, 1, 49)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(fused_resnet.unfuse(fused_resnet.fuse(model))(x), before)
