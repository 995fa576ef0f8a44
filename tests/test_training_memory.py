"""What training keeps: for a step's backward, of a frozen part, and after the step.

Counted at full size without computing anything, under fake tensors; that this is what a real
forward keeps, and what the process grows by, is shown on images small enough to run.
"""

import copy
import functools
import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
import torchvision
from cases import ROOT
from models import images, small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet.measure import kept_bytes
from fused_resnet.plan import MEMORY

#: Of what eager torch keeps at 224 pixels, batch 8. Smaller batches leave layer4 fewer positions
#: than its 1x1 convolutions need to go by the Gram matrix, and keep a little more.
MOST = {"resnet18": 0.67, "resnet50": 0.50, "resnext50_32x4d": 0.52, "wide_resnet50_2": 0.52}
#: Half types keep the raw outputs of layer3's ends too: 6 of 196 x 1024 values, a twentieth of
#: what eager ResNet-50 keeps.
MORE_OF_HALF = 0.05
EAGER = "eager"
over_networks = pytest.mark.parametrize("name", MOST)
over_autocast = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def network(name: str, memory: str) -> nn.Module:
    """In training; ``memory`` is of a fused one, or ``EAGER``."""
    model = getattr(torchvision.models, name)()
    return model if memory == EAGER else fused_resnet.fuse(model, memory=memory)


@functools.cache
def counted(name: str, memory: str, autocast: bool = False, batch: int = 8, size: int = 224) -> int:
    """:func:`kept_bytes` of a network that is never run."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        return kept_bytes(network(name, memory), x)


@over_autocast
@over_networks
def test_share_of_what_eager_keeps(name, autocast):
    most = MOST[name] + (MORE_OF_HALF if autocast else 0)
    assert counted(name, "auto", autocast) <= most * counted(name, EAGER, autocast)


@over_autocast
@over_networks
def test_lean_keeps_less_and_fast_no_more_than_eager(name, autocast):
    kept = {memory: counted(name, memory, autocast) for memory in (*MEMORY, EAGER)}
    assert kept["lean"] < kept["auto"] <= kept["fast"] <= kept[EAGER]


@over_autocast
@pytest.mark.parametrize("memory", [*MEMORY, EAGER])
@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [
        ("resnet18", 4, 64),
        ("resnet50", 2, 64),
        pytest.param("resnet50", 8, 224, marks=pytest.mark.slow),
    ],
)
def test_a_forward_keeps_what_is_counted_without_one(name, batch, size, memory, autocast):
    x = images(0, batch, size).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_bytes(network(name, memory), x)
    expected = counted(name, memory, autocast, batch, size)
    if memory == EAGER and autocast:
        # torch's fake BatchNorm of half types forgets its statistics: two vectors of 4-byte values.
        norms = [m for m in network(name, EAGER).modules() if isinstance(m, nn.BatchNorm2d)]
        expected += sum(2 * 4 * m.num_features for m in norms)
    assert kept == expected


def test_what_is_counted():
    """Each storage once and whole; parameters and their casts not at all."""
    x = torch.randn(4, 6, requires_grad=True)
    linear = nn.Linear(6, 6, bias=False)
    assert kept_bytes(linear, x) == x.nbytes
    assert kept_bytes(linear, x[1:]) == x.nbytes
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(linear, x) == x.nbytes // 2
    assert kept_bytes(nn.Sequential(linear, nn.ReLU()), x) == 2 * x.nbytes
    assert kept_bytes(nn.Flatten(), x) == 0


# --- What the process itself says, in one of its own. ---

#: Whatever is larger than this is mapped, and is given back as soon as it is freed: without it, the
#: allocator raises the threshold as it goes, and what is resident is not what is in use.
MAPPED_FROM = 1 << 14

HEADER = """
import json
import torch
import fused_resnet
from models import images, small
from test_training_memory import network
from fused_resnet.measure import kept_bytes

torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
"""


def in_a_process(code: str) -> dict:
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(MAPPED_FROM), MALLOC_ARENA_MAX="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", HEADER + textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


@needs_proc
def test_everything_kept_is_known_to_autograd():
    """A forward makes the process grow by what is counted.

    Anything kept beside save_for_backward would come on top. What may differ: mappings are rounded
    up to pages, of which there is half a page too much in each on average, and small vectors come
    from memory that is there already. Both are a hundredth or two of what is kept here, where a
    tensor has some 300 KB. A twentieth is allowed.
    """
    found = in_a_process("""
    x = images(0, 4, 96).contiguous(memory_format=torch.channels_last)
    result = {}
    for memory in ("auto", "lean", "fast"):
        model = network("resnet50", memory)
        model(x).sum().backward()  # what torch sets up once
        model(x)
        before = resident()
        output = model(x)
        grown = resident() - before
        del output
        left = resident() - before
        result[memory] = (kept_bytes(model, x), grown, left)
    print(json.dumps(result))
    """)
    for kept, grown, left in found.values():
        assert abs(grown - kept) <= kept / 20, found
        assert abs(left) <= kept / 20, found


@needs_proc
def test_a_hundred_steps_leave_memory_as_it_is():
    """From the 20th to the 100th step: less than a hundredth of what a step keeps, each step."""
    found = in_a_process("""
    model, x = fused_resnet.fuse(small().train()), images(0, 4, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    levels = []
    for step in range(100):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step >= 20:
            levels.append(resident())
    print(json.dumps({"levels": levels, "kept": kept_bytes(model, x)}))
    """)
    levels = found["levels"]
    # The lowest of many: a step's last moment has more or less of what it has just freed.
    grown = min(levels[-20:]) - min(levels[:20])
    assert grown <= (len(levels) - 20) * found["kept"] / 100, (grown, found["kept"])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("through", [True, False], ids=["backward", "dropped"])
def test_no_tensor_outlives_its_step(memory, through):
    """Neither what was kept nor anything else, and without the help of the garbage collector."""
    model, x = fused_resnet.fuse(small().train(), memory=memory), images(0, 2, 33)
    model(x).sum().backward()  # from here on parameters have gradients
    kept: list[weakref.ref] = []

    def pack(t: Tensor) -> Tensor:
        t = t.detach()  # with its graph it would keep itself alive
        kept.append(weakref.ref(t))
        return t

    def alive() -> int:
        return sum(type(o) is Tensor for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(x).sum()
        assert any(r() is not None for r in kept)
        if through:
            loss.backward()
        del loss
        assert len(kept) > 50
        assert not [r for r in kept if r() is not None]
        assert alive() == before
    finally:
        gc.enable()


# --- Of what is frozen. ---


class Front(nn.Module):
    """A network's stem and first layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.layer1(self.net.stem(x))


#: Of ops that differentiate a convolution: which argument is the weight, which gradients are made.
GRADIENTS = {
    "convolution_backward": (2, None),  # its last argument says which
    "conv_dgrad": (1, (True, False, False)),
    "conv_dgrad_": (1, (True, False, False)),
    "conv_wgrad": (None, (False, True, False)),
}


class Convolutions(TorchDispatchMode):
    """Records convolutions, and of backward ones, which gradients were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[str] = []
        self.masks: list[tuple[bool, ...]] = []
        self.weights: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        # With one image it is a product of matrices, of a weight with itself.
        if name in GRADIENTS and args[0].size(0) > 1:
            place, mask = GRADIENTS[name]
            self.masks.append(mask or tuple(args[-1]))
            if place is not None:
                self.weights.add(args[place].data_ptr())
        elif name in ("convolution", "conv2d", "mkldnn_convolution"):
            self.forward.append(name)
            self.weights.add(args[1].data_ptr())
        return func(*args, **(kwargs or {}))


def freeze_front(model: nn.Module, evaluate: bool) -> None:
    """As detection does: the stem and layer1, their BatchNorms by running statistics."""
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
        part.train(not evaluate)


def convolutions(*parts: nn.Module) -> list[nn.Conv2d]:
    return [m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]


def backward_of(model: nn.Module, x: Tensor) -> Convolutions:
    loss = model(x).square().sum()
    with Convolutions() as seen:
        loss.backward()
    return seen


@pytest.fixture
def net():
    return small(layers=2).train()


@pytest.mark.parametrize("evaluate", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_frozen_front_costs_nothing(net, memory, evaluate):
    """It keeps nothing; backward runs none of its convolutions, nor one towards it."""
    fused_resnet.fuse(net, memory=memory)
    freeze_front(net, evaluate)
    x = images(0, 2, 65)
    assert kept_bytes(Front(net), x) == 0
    assert not Front(net)(x).requires_grad
    rest = (net.layer2, net.layer3, net.layer4)
    seen = backward_of(net, x)
    assert not seen.weights & {m.weight.data_ptr() for m in convolutions(net.conv1, net.layer1)}
    wanted = len(convolutions(*rest))
    # Two read what the front made: the first convolution behind it, and its shortcut.
    assert sum(mask[0] for mask in seen.masks) == wanted - 2
    assert sum(mask[1] for mask in seen.masks) == wanted
    assert not any(mask[2] for mask in seen.masks)
    assert len(seen.forward) == (sum(map(len, rest)) if memory == "lean" else 0)


def test_a_frozen_front_leaves_the_rest_what_it_keeps():
    """Kept are the input of the first layer that trains and what is kept behind it."""
    net = small(layers=2).train()
    x = images(0, 2, 65)
    whole = kept_bytes(fused_resnet.fuse(net), x)
    freeze_front(net, evaluate=True)
    features = Front(net)(x)
    behind = sum(
        kept_bytes(part, y)
        for part, y in ((net.layer2, features), (net.layer3, net.layer2(features)))
    )
    assert kept_bytes(net, x) < whole
    assert kept_bytes(net, x) > behind - features.nbytes


@pytest.mark.parametrize("memory", MEMORY)
def test_frozen_weights_ask_for_no_gradient(net, memory):
    """Of every 3x3 convolution: masks ask for as many fewer gradients."""
    fused_resnet.fuse(net, memory=memory)
    every = convolutions(net.layer1, net.layer2, net.layer3, net.layer4)
    frozen = [m for m in every if m.kernel_size == (3, 3)]
    before = backward_of(copy.deepcopy(net), images(0, 2, 65)).masks
    for m in frozen:
        m.weight.requires_grad_(False)
    after = backward_of(net, images(0, 2, 65)).masks
    assert sum(mask[1] for mask in before) - sum(mask[1] for mask in after) == len(frozen)
    assert sum(mask[0] for mask in before) == sum(mask[0] for mask in after) == len(every)


def test_only_a_last_layer_that_trains_needs_no_convolution(net):
    fused_resnet.fuse(net)
    net.requires_grad_(False)
    net.fc.requires_grad_(True)
    seen = backward_of(net, images(0, 2, 65))
    assert not seen.masks
    assert not seen.forward
    assert kept_bytes(net, images(0, 2, 65)) <= 2 * net.fc.in_features * 4
