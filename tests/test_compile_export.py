"""torch.compile without graph breaks or recompilation, and torch.export into another process."""

import copy
import subprocess
import sys

import pytest
import torch
from models import basic, bottleneck, double, images, small
from tolerances import judge
from torch import nn

import fused_resnet

BLOCKS = {"basic": basic, "bottleneck": bottleneck}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def net():
    return small(), images(0, 2, 33), images(0, 1, 33)


def forms(source, x):
    """What there is to compile and export of one model."""
    fused = fused_resnet.fuse(copy.deepcopy(source))
    frozen = fused_resnet.freeze(source, example=x)
    half = fused_resnet.freeze(source, example=x, dtype=torch.bfloat16)
    return {"fused": fused, "frozen": frozen, "frozen-bf16": half}


@pytest.fixture(scope="module")
def nets(net):
    return forms(net[0], net[2])


FORMS = ("fused", "frozen", "frozen-bf16")


def dtype_of(form):
    return torch.bfloat16 if form == "frozen-bf16" else torch.float32


def check(outputs, source, x, dtype=torch.float32):
    plain = copy.deepcopy(source).to(dtype)
    with torch.no_grad():
        judge([outputs], [plain(x.to(dtype))], [double(source, x)])


def compiled(model, backend):
    return torch.compile(model, fullgraph=True, backend=backend)


class Counter:
    """A backend that counts graphs and the calls of our ops in them."""

    def __init__(self):
        self.graphs, self.ops = 0, []

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        targets = [str(node.target) for node in graph.graph.nodes]
        self.ops += [target for target in targets if "fused_resnet" in target]
        return graph.forward


@pytest.mark.parametrize("form", FORMS)
def test_one_graph(net, nets, form):
    """One graph with our ops in it, and no second one for a second call."""
    source, x, _ = net
    x = x.to(dtype_of(form))
    counter = Counter()
    model = compiled(nets[form], counter)
    with torch.no_grad():
        first = model(x)
        again = model(x + 1)
        assert torch.equal(model(x), first)
    assert not torch.equal(again, first)
    assert counter.graphs == 1
    convolutions = [name for name in counter.ops if "bn_act" in name or "norm_act" in name]
    assert len(convolutions) >= 17
    check(first, source, x, dtype_of(form))


@pytest.mark.parametrize("form", FORMS)
def test_aot_eager(net, nets, form):
    source, x, _ = net
    x = x.to(dtype_of(form))
    with torch.no_grad():
        check(compiled(nets[form], "aot_eager")(x), source, x, dtype_of(form))


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_follows_its_tensors_and_modes(build):
    """What is compiled reads live tensors, and trains."""
    source = build()
    model = fused_resnet.fuse(copy.deepcopy(source))
    program = compiled(model, "aot_eager")
    x = images(0, 2, 9, channels=24)
    with torch.no_grad():
        program(x)
        for m in (source, model):
            m.conv1.weight.mul_(2)
            m.bn1.running_mean.add_(1)
        check(program(x), source, x)
    exact = copy.deepcopy(source).double()
    results = []
    for m in (model, source, exact):
        run = (program if m is model else m).train()
        run(x.to(m.conv1.weight.dtype)).square().sum().backward()
        statistics = [b for b in m.buffers() if b.is_floating_point()]
        results.append([*(p.grad for p in m.parameters()), *statistics])
    judge(*results)
    source.load_state_dict(model.state_dict())
    with torch.no_grad():
        check(program.eval()(x), source.eval(), x)


def test_an_obstacle_after_compiling():
    """A hook set later is not skipped."""
    model = fused_resnet.fuse(basic())
    program = compiled(model, "eager")
    x = images(0, 2, 9, channels=24)
    with torch.no_grad():
        program(x)
        model.relu = nn.SiLU()
        plain = basic()
        plain.relu = nn.SiLU()
        assert torch.equal(program(x), plain(x))


def test_follows_the_engine():
    """What was traced for one engine is not used for another."""
    counter, x = Counter(), images(0, 2, 9, channels=24)
    program = compiled(fused_resnet.fuse(basic()), counter)
    with torch.no_grad():
        program(x)
        assert counter.ops
        counter.ops.clear()
        with fused_resnet.use_engine("reference"):
            program(x)
        assert counter.graphs == 2
        assert not counter.ops
        program(x)
        assert counter.graphs == 2


def test_dynamic_shapes(net, nets):
    """One graph for every batch size."""
    source = net[0]
    counter = Counter()
    model = torch.compile(nets["frozen"], fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            y = images(batch, batch, 33)
            check(model(y), source, y)
    assert counter.graphs == 1


@pytest.mark.parametrize("form", ["fused", "frozen"])
def test_inductor(form):
    source = basic()
    x = images(0, 2, 9, channels=24)
    if form == "fused":
        model = fused_resnet.fuse(copy.deepcopy(source))
    else:
        model = fused_resnet.freeze(source, example=x)
    program = compiled(model, "inductor")
    with torch.no_grad():
        first = program(x)
        assert torch.equal(program(x), first)
    check(first, source, x)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_inductor_on_a_network(net, nets, form):
    source, x, _ = net
    x = x.to(dtype_of(form))
    with torch.no_grad():
        check(compiled(nets[form], "inductor")(x), source, x, dtype_of(form))


LOAD = """
import sys, torch, fused_resnet
x, expected = torch.load(sys.argv[1], weights_only=True)
for path in sys.argv[2:]:
    program = torch.export.load(path)
    # Regions without gradients or autocast are modules of their own in there.
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    kinds = {str(node.target) for graph in graphs for node in graph.nodes}
    assert any("bn_act" in kind or "norm_act" in kind for kind in kinds), kinds
    with torch.no_grad():
        assert torch.equal(program.module()(x), expected)
print("equal")
"""


@pytest.mark.parametrize("form", FORMS)
def test_export(net, nets, form, tmp_path, request):
    """The program carries plain tensors, runs here and in a process that never saw the model."""
    source, x, _ = net
    x = x.to(dtype_of(form))
    paths = []
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(nets[form], (x,), strict=strict)
            y = program.module()(x)
        check(y, source, x, dtype_of(form))
        names = {name.removeprefix("model.") for name in program.state_dict}
        assert not [name for name in names if "packed" in name]
        if form == "fused":
            assert names == set(source.state_dict())
        paths.append(tmp_path / f"{strict}.pt2")
        torch.export.save(program, paths[-1])
    torch.save((x, y), tmp_path / "data.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "data.pt", *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=request.config.rootpath
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.parametrize("size", [33, 129])
@pytest.mark.parametrize("form", ["fused", "frozen"])
def test_export_with_a_dynamic_batch(net, nets, form, size):
    """Also over sizes of a batch of which a model that is not exported takes some in slices."""
    source, x = net[0], images(0, 2, size)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = (batch,) if form == "fused" else ((batch,),)  # frozen: forward(*args, **kwargs)
    with torch.no_grad():
        program = torch.export.export(nets[form], (x,), dynamic_shapes=shapes)
        for n in (1, 5):
            y = images(n, n, size)
            check(program.module()(y), source, y)


def test_exporting_leaves_the_model_as_it_is(net, nets):
    x = net[1]
    frozen = copy.deepcopy(nets["frozen"])
    expected = frozen(x)
    state = list(frozen.state_dict())
    torch.export.export(frozen, (x,))
    assert torch.equal(frozen(x), expected)
    assert list(frozen.state_dict()) == state
