"""The fused blocks: constructors, and what they do at every call, obstacles and all."""

import copy
import io

import pytest
import torch
from models import LAYOUTS, basic, bottleneck, double, images, runs_fused, small
from tolerances import judge
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import fused_resnet

BLOCKS = {
    "basic": basic,
    "basic-identity": lambda seed=0: basic(seed, planes=24),
    "bottleneck-identity": lambda seed=0: bottleneck(seed, planes=6),
    "basic-stride2": lambda seed=0: basic(seed, stride=2),
    "bottleneck": bottleneck,
    "bottleneck-stride2": lambda seed=0: bottleneck(seed, stride=2),
    "bottleneck-grouped": lambda seed=0: bottleneck(seed, groups=4, base_width=64),
    "bottleneck-dilated": lambda seed=0: bottleneck(seed, dilation=2),
}


def inputs(seed=0, batch=2, size=9):
    return images(seed, batch, size, channels=24)


def eager(model, *args):
    """What torch makes of ``model``'s tensors as they are now."""
    return fused_resnet.unfuse(copy.deepcopy(model))(*args)


def check_follows(model):
    """``model`` runs fused, on the tensors it has now."""
    xs = [inputs(seed).to(next(model.parameters()).dtype) for seed in range(3)]
    with torch.no_grad():
        assert runs_fused(model, xs[0])
        judge(*zip(*((model(x), eager(model, x), double(model, x)) for x in xs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_block(build, dtype):
    check_follows(fused_resnet.fuse(build().to(dtype)))


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_as_torchvisions_block(kind):
    ours, theirs = getattr(fused_resnet, kind), getattr(torchvision_resnet, kind)
    wide = {"groups": 32, "width_per_group": 4} if kind == "Bottleneck" else {}
    layers = [2, 1, 1, 1]
    torch.manual_seed(0)
    model = torchvision_resnet.ResNet(ours, layers, num_classes=5, **wide)
    torch.manual_seed(0)
    plain = torchvision_resnet.ResNet(theirs, layers, num_classes=5, **wide)
    state = plain.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert isinstance(model.layer1[0], theirs)
    x = images(0, 2, 33)
    exact = copy.deepcopy(plain).double()
    judge([model(x)], [plain(x)], [exact(x.double())])
    plain.load_state_dict(model.eval().state_dict())
    plain.eval()
    with torch.no_grad():
        assert runs_fused(model, x)
        judge([model(x)], [plain(x)], [double(plain, x)])


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize(
    "wrong", [{"groups": 2}, {"base_width": 32}, {"dilation": 2}, {"groups": 3}, {"strides": 2}, {}]
)
def test_wrong_constructor_arguments(kind, wrong):
    """Whatever torchvision raises, and nothing where it does not."""

    def attempt(block):
        try:
            block(8, 8, **wrong) if wrong else block(8)
        except Exception as error:
            return type(error), str(error)

    theirs = attempt(getattr(torchvision_resnet, kind))
    assert attempt(getattr(fused_resnet, kind)) == theirs
    assert theirs is not None or kind == "Bottleneck"


def step(build_optimizer):
    def change(model):
        optimizer = build_optimizer(model.parameters())
        model.train()
        model(inputs(7)).square().mean().backward()
        optimizer.step()
        model.eval()

    return change


def load(model, **kwargs):
    model.load_state_dict(bottleneck(5).state_dict(), **kwargs)


def edit_data(model):
    model.conv2.weight.data.mul_(1.5)
    model.bn3.bias.data = model.bn3.bias.data + 1


def swap_in_average(model):
    """What exponential moving averages do for evaluation."""
    average = torch.optim.swa_utils.AveragedModel(model)
    step(lambda p: torch.optim.SGD(p, lr=1.0))(model)
    average.update_parameters(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
            p.copy_(q)


def train_forward(model):
    with torch.no_grad():
        model.train()(3 * inputs(8) + 1)
    model.eval()


def zero_last(model):
    with torch.no_grad():
        model.bn3.weight.zero_()


CHANGES = {
    "sgd": step(lambda p: torch.optim.SGD(p, lr=1.0, foreach=False)),
    "foreach": step(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, foreach=True)),
    "fused-adam": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "load": load,
    "load-assign": lambda model: load(model, assign=True),
    "data": edit_data,
    "ema": swap_in_average,
    "running-stats": train_forward,
    "zero-gamma": zero_last,
    "half-way": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "eps": lambda model: setattr(model.bn1, "eps", 0.5),
    "affine": lambda model: setattr(model, "bn2", nn.BatchNorm2d(8, affine=False).eval()),
    "stride": lambda model: (
        setattr(model.conv2, "padding", (2, 2)) or setattr(model.conv2, "dilation", (2, 2))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_follows_its_tensors(change):
    model = fused_resnet.fuse(bottleneck())
    x = inputs()
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        after = model(x.to(next(model.parameters()).dtype))
    assert (after - before).abs().max() > 0
    check_follows(model)


@pytest.mark.parametrize("weights", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "x",
    [
        inputs(),
        inputs().contiguous(memory_format=torch.channels_last),
        inputs(size=18)[..., ::2, :9],
        inputs()[:, :, :1, :1],
        inputs(batch=1),
        inputs().transpose(2, 3),
        inputs(batch=1).expand(2, -1, -1, -1),
    ],
    ids=["contiguous", "channels_last", "strided", "1x1", "one", "transposed", "expanded"],
)
@pytest.mark.parametrize("build", [basic, bottleneck])
def test_layouts(build, x, weights):
    """Strides that mean something come out as torch's; what goes in is left as it is."""
    model = fused_resnet.fuse(build()).to(memory_format=weights)
    kept = x.clone()
    with torch.no_grad():
        assert runs_fused(model, x)
        ours, theirs = model(x), eager(model, x)
    for layout in LAYOUTS:
        assert ours.is_contiguous(memory_format=layout) == theirs.is_contiguous(
            memory_format=layout
        )
    judge([ours], [theirs], [double(model, x)])
    assert torch.equal(x, kept)


def test_channels_last_weights():
    model = fused_resnet.fuse(bottleneck()).to(memory_format=torch.channels_last)
    check_follows(model)
    with torch.no_grad():
        assert model(inputs()).is_contiguous(memory_format=torch.channels_last)


def test_biased_convolutions():
    """torchvision's have none, but a user's may."""
    model = bottleneck()
    for conv in (model.conv1, model.conv3, model.downsample[0]):
        conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    check_follows(fused_resnet.fuse(model))


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("frozen_weights", [False, True])
def test_gradients_in_eval(frozen_weights):
    """Each gradient within the rule of torch's, pooled over the seeds."""
    found = []
    for seed in range(3):
        model = fused_resnet.fuse(bottleneck(seed)).requires_grad_(not frozen_weights)
        plain = bottleneck(seed).requires_grad_(not frozen_weights)
        x = inputs(seed)
        truth = gradients(copy.deepcopy(plain).double(), x.double())
        found.append((gradients(model, x), gradients(plain, x), truth))
    for of_one_tensor in zip(*(zip(*f, strict=True) for f in found), strict=True):
        judge(*zip(*of_one_tensor, strict=True))


def test_some_weights_frozen():
    """A gradient that is needed changes how a block runs fused, not whether."""
    model = fused_resnet.fuse(bottleneck()).requires_grad_(False)
    assert runs_fused(model, inputs())
    assert not model.trains(inputs())
    assert model.trains(inputs().requires_grad_())
    model.bn2.bias.requires_grad_(True)
    assert model.trains(inputs())
    assert model.obstacle(inputs()) is None


def test_functional_call():
    model, plain, other = fused_resnet.fuse(bottleneck()), bottleneck(), bottleneck(4)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    x = inputs()
    with torch.no_grad():
        ours = torch.func.functional_call(model, state, x)
        theirs = torch.func.functional_call(plain, state, x)
    judge([ours], [theirs], [double(other, x)])


def test_functorch_transforms():
    model, plain = fused_resnet.fuse(bottleneck()), bottleneck()
    x = inputs(batch=3)

    def grad(m):
        return torch.func.grad(lambda t: m(t).sum())(x)

    def jacobian(m):
        return torch.func.jacrev(lambda t: m(t).mean((0, 2, 3)))(inputs(size=3))

    def forward_mode(m):
        return torch.func.jvp(m, (x,), (torch.ones_like(x),))[1]

    def batched(m):
        with torch.no_grad():
            return torch.func.vmap(lambda t: m(t[None])[0])(x)

    for transform in (grad, jacobian, forward_mode, batched):
        torch.testing.assert_close(transform(model), transform(plain), rtol=0, atol=0)


def test_inference_mode():
    model = fused_resnet.fuse(bottleneck())
    with torch.inference_mode():
        x = inputs()
        assert runs_fused(model, x)
        ours, theirs = model(x), eager(model, x)
        assert ours.is_inference()
    judge([ours], [theirs], [double(model, inputs())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    found = []
    for seed in range(3):
        model, x = fused_resnet.fuse(small(seed)), images(seed, 2, 33)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            assert runs_fused(model.layer1, model.maxpool(model.conv1(x)))
            found.append((model(x), eager(model, x), double(model, x)))
    judge(*zip(*found, strict=True))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (lambda: inputs().bfloat16(), RuntimeError),
        (lambda: inputs().double(), RuntimeError),
        (lambda: inputs()[:, :23], RuntimeError),
        (lambda: inputs()[0, 0], RuntimeError),
        (lambda: inputs().int(), RuntimeError),
        (lambda: inputs()[0], ValueError),
        (lambda: inputs().to("meta"), RuntimeError),
        (lambda: [1.0], TypeError),
    ],
)
def test_bad_input(x, error):
    """torch's exception, as without us; nothing changed."""
    model, plain = fused_resnet.fuse(bottleneck()), bottleneck()
    with torch.no_grad():
        with pytest.raises(error):
            plain(x())
        with pytest.raises(error):
            model(x())
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_empty_batch():
    model, plain = fused_resnet.fuse(bottleneck()), bottleneck()
    x = inputs()[:0]
    with torch.no_grad():
        assert model(x).shape == plain(x).shape


def test_nan_stays_where_it_is():
    x = inputs()
    x[0, 3, 4, 4] = torch.nan
    x[1, 5, 0, 0] = torch.inf
    model = fused_resnet.fuse(basic())
    with torch.no_grad():
        ours, theirs = model(x), eager(model, x)
    assert ours.isnan().any()
    assert not ours.isnan().all()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_saved_and_loaded_whole():
    model = fused_resnet.fuse(bottleneck())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is fused_resnet.Bottleneck
    with torch.no_grad():
        assert torch.equal(again(inputs()), model(inputs()))
