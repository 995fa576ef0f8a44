"""A block that trains under torch's transforms: compiled, and differentiated as torch can.

A compiled one runs fused; torch.func and forward mode are left to torch, with torch's results.
"""

import copy

import pytest
import torch
from cases import SEEDS
from models import basic, bottleneck, images
from test_training_use import grads, state
from tolerances import judge
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from units import judge_all

import fused_resnet


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("build", [basic, bottleneck])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step(backend, build):
    """One graph, and no other one for a second step."""
    plain = build().train()
    ours, exact = fused_resnet.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    counter = CompileCounterWithBackend(backend)
    program = torch.compile(ours, fullgraph=True, backend=counter)
    results = []
    for model, run in ((ours, program), (plain, plain), (exact, exact)):
        for seed in SEEDS[:2]:
            x = images(seed, 2, 9, channels=24).to(next(model.parameters()).dtype)
            output = run(x)
            output.square().mean().backward()
        results.append([output, grads(model), state(model)])
    assert counter.frame_count == 1
    floating = [[t for t in tree_leaves(r) if t.is_floating_point()] for r in results]
    judge(*floating)
    assert ours.bn1.num_batches_tracked == plain.bn1.num_batches_tracked


def trio(train: bool) -> list[tuple[nn.Module, Tensor]]:
    """A block fused, plain and in float64, and its input."""
    plain, x = bottleneck().train(train), images(0, 4, 9, channels=24)
    ours, exact = fused_resnet.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    return [(ours, x), (plain, x), (exact, x.double())]


def call(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Without a trace in ``model``: torch's transforms let nobody else's tensors be changed."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return torch.func.functional_call(model, (params, buffers), (x,))


over_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@over_modes
def test_func_grad(train):
    results = []
    for model, x in trio(train):

        def loss(params, model=model, x=x):
            return call(model, params, x).square().mean()

        results.append(torch.func.grad(loss)(dict(model.named_parameters())))
    judge_all(*results)


def test_vmap():
    results = []
    for model, x in trio(train=False):
        with torch.no_grad():
            results.append(torch.func.vmap(model)(x.view(2, 2, *x.shape[1:])))
    judge_all(*results)


@over_modes
@pytest.mark.parametrize("through", ["func", "forward_ad", "no_grad"])
def test_forward_mode(through, train):
    results = []
    for model, x in trio(train):
        tangent = x.flip(0)
        if through == "func":
            output = torch.func.jvp(lambda x, model=model: call(model, {}, x), (x,), (tangent,))
        else:
            # Tangents are followed where gradients are not.
            with forward_ad.dual_level(), torch.set_grad_enabled(through == "forward_ad"):
                output = tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))))
        assert output[1].abs().sum() > 0
        results.append(list(output))
    judge_all(*results)
