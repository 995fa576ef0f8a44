"""Where and how ops run: streams, CUDA graphs, devices, tensors of more than 2**31 elements.

On the CPU the same tests run without what only a GPU has, so that they do not first run on one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import SEEDS, Backend, assert_identical, backends, copied, of_tensors
from models import away_from_zero, images, small
from samples import arguments
from tolerances import judge
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import fused_resnet
from fused_resnet import engines

REPLAYS = 100
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
over_devices = pytest.mark.parametrize("device", DEVICES)
# Emulated engines have neither streams nor time for this.
KERNELS = {
    op: [p for p in backends(op) if p.values[0].engine != "reference" and not p.values[0].emulated]
    for op in engines.OPS
}
over_kernels = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, *p.values, id=f"{op}-{p.id}", marks=p.marks)
        for op, params in KERNELS.items()
        for p in params
    ],
)
over_backends = pytest.mark.parametrize(
    "backend", {p.id: p for params in KERNELS.values() for p in params}.values()
)
over_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def given(op: str, backend: Backend, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    return backend.move(arguments(op, seed, dtype))


def call(op: str, backend: Backend, args: Any) -> list[Tensor]:
    """What an op returns and what it changes."""
    args = copied(args)
    made = engines.implementation(op, backend.engine)(*args)
    changed = [args[5], args[6]] if op == "bn_finalize" else []
    return [t for t in tree_leaves((made, changed)) if isinstance(t, Tensor)]


@over_kernels
def test_values(op, backend):
    """Beside the specification in float32, whose error the rule multiplies."""
    specification = backend._replace(engine="reference")
    sides: list[list[list[Tensor]]] = []
    for seed in SEEDS:
        args = given(op, backend, seed)
        exact = of_tensors(Tensor.double, args)
        found = [call(op, b, a) for b, a in ((backend, args), (specification, args))]
        sides.append([*found, call(op, specification, exact)])
    for i, first in enumerate(sides[0][1]):
        ours, theirs, truth = ([side[k][i] for side in sides] for k in range(3))
        if not first.is_floating_point():
            assert all(map(torch.equal, ours, theirs))
        else:  # of sums in float64, which float32 tensors are given, no more is asked
            judge([t.float() for t in ours], [t.float() for t in theirs], truth)


# --- Streams. ---


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Another stream than the default one, with work in front of what is put on it inside."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # clock cycles: the default stream would be far ahead
        yield
    torch.cuda.current_stream().wait_stream(stream)


@over_types
@over_kernels
def test_side_stream(op, dtype, backend):
    """An op waits for what its stream writes, which here comes late."""
    args = given(op, backend, 0, dtype)
    expected = call(op, backend, args)
    late = of_tensors(lambda t: torch.full_like(t, 1), args)
    with side_stream(backend.device):
        tree_map(lambda a, b: a.copy_(b) if isinstance(a, Tensor) else a, late, args)
        assert_identical(call(op, backend, late), expected)


def step(model: torch.nn.Module, x: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 10)
    loss.backward()
    return loss


def network(device: str) -> torch.nn.Module:
    return fused_resnet.fuse(away_from_zero(small())).to(device).train()


def image(device: str, seed: int = 0) -> Tensor:
    return images(seed, 4, 33).to(device).contiguous(memory_format=torch.channels_last)


def state(model: torch.nn.Module) -> list[Tensor]:
    return [*model.state_dict().values(), *(p.grad for p in model.parameters())]


@pytest.fixture
def deterministic():
    """torch's own convolutions, too."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@over_devices
def test_training_on_a_side_stream(device, deterministic):
    """Autograd runs backward on forward's stream, in a thread of its own on CUDA."""
    model, x = network(device), image(device)
    twin = copy.deepcopy(model)
    loss = step(model, x)
    with side_stream(device):
        assert_identical(step(twin, x.clone()), loss)
    assert_identical(state(twin), state(model))


# --- CUDA graphs. ---


class Captured:
    """``f`` of fixed tensors, captured as a CUDA graph; on the CPU called again each time."""

    def __init__(self, device: str, f: Callable[..., Any], tensors: Any) -> None:
        self.f, self.tensors, self.graph = f, copied(tensors), None
        if device == "cpu":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            f(self.tensors)  # compiled and loaded before
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.made = f(self.tensors)

    def __call__(self, tensors: Any) -> Any:
        tree_map(lambda a, b: a.copy_(b) if isinstance(a, Tensor) else a, self.tensors, tensors)
        if self.graph is None:
            return self.f(self.tensors)
        self.graph.replay()
        return self.made


@over_types
@over_kernels
def test_graph(op, dtype, backend):
    """A hundred replays over other values are a hundred calls."""
    first, second = (given(op, backend, seed, dtype) for seed in (0, 1))
    expected = [call(op, backend, args) for args in (first, second)]
    captured = Captured(backend.device, lambda args: call(op, backend, args), first)
    for i in range(REPLAYS if backend.device == "cuda" else 2):
        assert_identical(captured((first, second)[i % 2]), expected[i % 2], f"replay {i}")


@over_devices
@pytest.mark.parametrize("frozen", [False, True])
def test_graph_of_inference(frozen, device, deterministic):
    model = small().to(device)
    first, second = image(device), image(device, 1)
    model = fused_resnet.freeze(model, example=first) if frozen else fused_resnet.fuse(model)
    with torch.no_grad():
        expected = model(first), model(second)
        captured = Captured(device, model, first)
        for i in range(REPLAYS if device == "cuda" else 2):
            assert_identical(captured((first, second)[i % 2]), expected[i % 2], f"replay {i}")


@over_devices
def test_graph_of_training(device, deterministic):
    """Gradients as without a graph, and running statistics move at every replay."""
    model, x = network(device), image(device)
    plain = copy.deepcopy(model)

    def whole(x: Tensor) -> Tensor:
        for p in model.parameters():
            p.grad.zero_()
        return step(model, x)

    for m in (model, plain):
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model.state_dict())
    captured = Captured(device, whole, x)
    model.load_state_dict(before)
    for seed in (0, 1, 0):
        x = image(device, seed)
        plain.zero_grad(set_to_none=False)
        assert_identical(captured(x).detach(), step(plain, x).detach())
        assert_identical(state(model), state(plain))


# --- Devices. ---


@pytest.mark.gpu
def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    for op in engines.OPS:
        for backend in (p.values[0] for p in KERNELS[op]):
            if backend.device == "cuda":
                expected = call(op, backend, given(op, backend, 0))
                there = call(op, backend, given(op, backend._replace(device="cuda:1"), 0))
                assert {t.device.index for t in there} == {1}
                assert torch.cuda.current_device() == 0
                assert_identical([t.to("cuda:0") for t in there], expected, f"{op}'s results")


# --- More elements than 32 bits can count. ---

CHANNELS, SIDE = 64, 64


@over_backends
def test_more_than_2_to_the_31(backend):
    """The last image of a batch that large comes out as it does alone."""
    device, engine = backend
    one = CHANNELS * SIDE * SIDE
    batch = 2**31 // one + 3 if device == "cuda" else 3
    shape = (batch, CHANNELS, SIDE, SIDE)
    layout = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x = torch.empty(shape, device=device, **layout).zero_()
    x[-2:] = torch.randn(2, *shape[1:])
    scale, shift = (torch.randn(CHANNELS, device=device) for _ in range(2))
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1).to(x)

    def able(op: str) -> bool:
        return any(p.values == (backend,) for p in KERNELS[op])

    def run(op: str, *args: Any) -> Any:
        return engines.implementation(op, engine)(*args)

    def alike(made: Tensor, alone: Tensor) -> None:
        assert_identical(made[-2:].contiguous(), alone.contiguous())

    part = x[-2:].clone(memory_format=torch.channels_last)
    if able("bn_act"):
        rest = (scale, shift, None, "relu")
        alike(run("bn_act", x, *rest), run("bn_act", part, *rest))
    if able("eltwise_act"):
        rest = ("sum", None, "relu")
        alike(run("eltwise_act", [x, x], *rest), run("eltwise_act", [part, part], *rest))
    if able("relu_backward_reduce"):
        masked, total = run("relu_backward_reduce", x, x)
        alone, expected = run("relu_backward_reduce", part, part)
        alike(masked, alone)
        judge([total], [expected], [part.double().clamp_min(0).sum((0, 2, 3))])
    if able("bn_stats"):
        mean, _ = run("bn_stats", x)
        truth = part.double().sum((0, 2, 3)) / (batch * SIDE * SIDE)
        judge([mean], [truth.float()], [truth])
    if able("conv_bn_act"):
        rest = (weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "relu")
        made, alone = run("conv_bn_act", x, *rest), run("conv_bn_act", part, *rest)
        truth = torch.relu(F.conv2d(part.double(), weight.double()))
        judge([made[-2:]], [alone], [truth])
