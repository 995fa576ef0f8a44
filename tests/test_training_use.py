"""What people do with a network while it trains, each beside the same network unfused.

Values by the rule of tolerances.py; where the same kernels see the same numbers, bits.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SEEDS, assert_identical
from models import LAYOUTS, Ops, away_from_zero, images, runs_fused, small
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fused_resnet

Run = Callable[[nn.Module, Tensor], Any]


def network(seed: int = 0) -> nn.Module:
    return away_from_zero(small(seed)).train()


def fused(seed: int = 0) -> nn.Module:
    return fused_resnet.fuse(network(seed))


def data(seed: int = 0) -> Tensor:
    return images(seed, 4, 33)


def loss_of(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.size(1))


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def state(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def hold(run: Run, change: Callable[[nn.Module], object] = lambda model: None) -> None:
    """What ``run`` returns of a fused network, beside the plain one and float64's; seeds pooled.

    Counts must be equal, and gradients be there where the plain network has them.
    """
    sides: tuple[list[Tensor], ...] = ([], [], [])
    for seed in SEEDS:
        plain, x = network(seed), data(seed)
        change(plain)
        ours, exact = fused_resnet.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
        with Ops() as ops:
            sides[0].extend(tree_leaves(run(ours, x.clone())))
        assert "bn_finalize" in ops.names, "it did not train fused"
        sides[1].extend(tree_leaves(run(plain, x.clone())))
        sides[2].extend(tree_leaves(run(exact, x.double())))
    assert len(sides[0]) == len(sides[1]) == len(sides[2]) > 0
    floating = [i for i, t in enumerate(sides[1]) if t.is_floating_point()]
    for dtype in {sides[1][i].dtype for i in floating}:
        same = [i for i in floating if sides[1][i].dtype == dtype]
        judge(*([side[i] for i in same] for side in sides))
    for ours_, theirs in (
        (sides[0][i], sides[1][i]) for i in set(range(len(sides[1]))) - {*floating}
    ):
        assert_identical(ours_, theirs)


def one_step(model: nn.Module, x: Tensor) -> list[Any]:
    output = model(x)
    loss_of(output).backward()
    return [output, grads(model), state(model)]


def train(model: nn.Module, steps: int = 3, optimizer: Any = None) -> nn.Module:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(model(data(i))).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout):
    hold(lambda m, x: one_step(m.to(memory_format=layout), x.contiguous(memory_format=layout)))


def test_autocast():
    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            output = model(x)
        loss_of(output.float() if x.dtype != torch.float64 else output).backward()
        return [output, grads(model), state(model)]

    hold(run)


def test_gradient_accumulation():
    def run(model, x):
        for part in x.split(2):
            (loss_of(model(part)) / 2).backward()
        return [grads(model), state(model)]

    hold(run)


@pytest.mark.parametrize("whole", [True, False], ids=["network", "block"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, whole):
    """Running statistics move as often as eager torch's do: twice where forward runs twice."""

    def run(model, x):
        if whole:
            output = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
        else:
            block = model.layer2[0]
            forward = block.forward
            block.forward = lambda y: checkpoint(forward, y, use_reentrant=reentrant)
            output = model(x)
            del block.forward
        loss_of(output).backward()
        assert model.layer2[0].bn1.num_batches_tracked - before[0] == 2
        return [output, grads(model), state(model)]

    before = [network().layer2[0].bn1.num_batches_tracked.item()]
    hold(run)


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_scaling(autocast):
    """By a power of two, every gradient is scaled by exactly that: nothing else depends on it."""
    found = []
    for scale in (1.0, 1024.0):
        model = fused()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(data())
        scaler.scale(loss_of(output.float())).backward()
        found.append([g / scale for g in grads(model)])
    assert_identical(*found)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_average(use_buffers):
    def run(model, x):
        average = AveragedModel(model, use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for part in (x, x + 1):
            optimizer.zero_grad()
            loss_of(model(part)).backward()
            optimizer.step()
            average.update_parameters(model)
        with torch.no_grad():
            return [average.eval()(x), state(average)]

    hold(run)
    with torch.no_grad():
        assert runs_fused(AveragedModel(fused()).eval(), data())


@pytest.mark.parametrize("to_none", [True, False])
def test_zeroing_gradients(to_none):
    """Gradients that stay are written into, others come anew."""

    def run(model, x):
        loss_of(model(x)).backward()
        before = [g.data_ptr() for g in grads(model)]
        model.zero_grad(set_to_none=to_none)
        assert len(grads(model)) == (0 if to_none else len(before))
        loss_of(model(x)).backward()
        if not to_none:
            assert [g.data_ptr() for g in grads(model)] == before
        return grads(model)

    hold(run)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    """Steps are torch's, and what comes out after one is made of the parameters as they are."""

    def run(model, x):
        optimizer = OPTIMIZERS[name](model.parameters())
        loss_of(model(x)).backward()
        optimizer.step()
        return [model(x), state(model)]

    hold(run)
    model, x = fused(), data()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        before = model(x)
        loss_of(before).backward()
        optimizer.step()
        fresh = fused(1)
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(model(x), before)
        assert_identical(fresh(x), model(x), "live parameters and loaded ones")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_between_steps(copied):
    """Also while a graph waits for its backward."""
    model = train(fused(), 1)
    waiting = loss_of(model(data()))
    twin = copied(model)
    waiting.backward()
    model.zero_grad()
    twin.zero_grad()
    assert type(twin.layer1[0]) is type(model.layer1[0])
    assert_identical(one_step(twin, data(1)), one_step(model, data(1)), "a model and its copy")


def test_backward_twice():
    model = fused()
    loss = loss_of(model(data()))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_retained_graph():
    """A second backward finds everything as the first did."""
    model = fused()
    loss = loss_of(model(data()))
    loss.backward(retain_graph=True)
    once = [2 * g for g in grads(model)]
    loss.backward()
    assert_identical(grads(model), once, "twice one backward and two")


def test_switching_modes():
    """Evaluation goes by the running statistics as the step before has left them."""

    def run(model, x):
        found = []
        for i in range(2):
            model.train()
            loss_of(model(x + i)).backward()
            with torch.no_grad():
                found.append(model.eval()(x))
        return [found, grads(model), state(model)]

    hold(run)


def in_thread(f: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("threaded", [False, True])
def test_backward_elsewhere(threaded):
    """In another thread, where another engine is asked for: the forward's is what counts."""

    def backward():
        with fused_resnet.use_engine("reference"), Ops() as ops:
            loss.backward()
        return ops.names

    model = fused()
    expected = one_step(model, data())[1]
    expected = [g.clone() for g in expected]
    model.zero_grad()
    loss = loss_of(model(data()))
    assert "relu_backward_reduce" in (in_thread(backward) if threaded else backward())
    assert_identical(grads(model), expected)


def test_the_reference_engine_stays_with_its_backward():
    model = fused()
    with fused_resnet.use_engine("reference"):
        loss = loss_of(model(data()))
    with Ops() as ops:
        loss.backward()
    assert not ops.names


def test_two_threads_train_two_copies():
    models = [fused(), fused()]
    threads = [threading.Thread(target=train, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = state(train(fused()))
    for m in models:
        assert_identical(state(m), expected, "training alone and beside another")


@pytest.mark.parametrize("autocast", [False, True])
def test_deterministic(autocast):
    torch.use_deterministic_algorithms(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = train(fused()), train(fused())
    assert_identical([*state(first), *grads(first)], [*state(second), *grads(second)], "two runs")


def test_hooks_on_a_block():
    """They fire, and the block runs fused all the same."""
    seen = []
    model = fused()
    expected = [t.clone() for t in tree_leaves(one_step(fused(), data()))]
    block = model.layer2[0]
    block.register_forward_pre_hook(lambda m, args: seen.append("before"))
    block.register_forward_hook(lambda m, args, out: seen.append("after"))
    block.register_full_backward_hook(lambda m, into, out: seen.append("backward"))
    with Ops() as ops:
        found = tree_leaves(one_step(model, data()))
    assert seen == ["before", "after", "backward"]
    assert ops.names.count("relu_backward_reduce") == 4
    assert_identical(found, expected, "with hooks and without")


@pytest.mark.parametrize("evaluate", [True, False])
def test_frozen_front(evaluate):
    """As detection does it: the stem and layer1 without gradients, or by running statistics too."""

    def freeze(model):
        for part in (model.conv1, model.bn1, model.layer1):
            part.requires_grad_(False)
            part.train(not evaluate)

    def run(model, x):
        result = one_step(model, x)
        frozen = [*model.conv1.parameters(), *model.bn1.parameters(), *model.layer1.parameters()]
        assert all(p.grad is None for p in frozen)
        return result

    hold(run, freeze)
