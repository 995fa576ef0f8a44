"""What a network from Caffe's files is afterwards: a module like any other."""

import copy
import pickle
import subprocess
import sys

import caffe_numpy
import given_times
import pytest
import torch
from caffe_numpy import Net, caffemodel
from models import SEEDS, double, runs_fused
from test_caffe import image, layer
from tolerances import judge
from torch import nn

import fused_resnet
from fused_resnet import caffe

INPUT = 'input: "data" input_shape { dim: 2 dim: 8 dim: 12 dim: 12 }\n'


def conv(name: str, bottom: str, out: int = 8, relu: bool = True, size: int = 1) -> str:
    """A convolution, its BatchNorm and Scale, and a ReLU, in place as Caffe's files have them."""
    sizes = f"num_output: {out} kernel_size: {size} pad: {size // 2}"
    param = f"convolution_param {{ {sizes} bias_term: false }}"
    text = layer(f'type: "Convolution" {param}', bottom, name, name)
    text += layer('type: "BatchNorm"', name, name, f"bn_{name}")
    text += layer('type: "Scale" scale_param { bias_term: true }', name, name, f"scale_{name}")
    return text + layer('type: "ReLU"', name, name, f"relu_{name}") if relu else text


def add(bottoms: str, top: str, param: str = "") -> str:
    text = layer(f'type: "Eltwise" {param}', bottoms, top, top)
    return text + layer('type: "ReLU"', top, top, f"relu_{top}")


PROD = "eltwise_param { operation: PROD }"
#: What is special about a graph -> its layers, and the pairs of each chain that is found in it.
GRAPHS = {
    "identity": (conv("a", "data") + conv("b", "a", relu=False) + add("data b", "y"), [2]),
    "identity-first": (conv("a", "data") + conv("b", "a", relu=False) + add("b data", "y"), [2]),
    "shortcut": (
        conv("s", "data", relu=False)
        + conv("a", "data", size=3)
        + conv("b", "a", relu=False)
        + add("s b", "y"),
        [3],
    ),
    "shortcut-last": (
        conv("a", "data")
        + conv("b", "a", relu=False)
        + conv("s", "data", relu=False)
        + add("s b", "y"),
        [3],
    ),
    "two-branches": (
        conv("a", "data")
        + conv("b", "a", relu=False)
        + conv("c", "data")
        + conv("d", "c", relu=False)
        + add("b d", "y"),
        [2, 2],
    ),
    "shortcut-with-relu": (
        conv("s", "data") + conv("a", "data", relu=False) + add("s a", "y"),
        [1, 1],
    ),
    "long": ("".join(conv(f"c{i}", f"c{i - 1}" if i else "data", size=3) for i in range(4)), [4]),
    "read-twice": (conv("a", "data") + conv("b", "a") + add("a b", "y"), [1, 1]),
    "conv-read-twice": (
        layer(
            'type: "Convolution" '
            "convolution_param { num_output: 8 kernel_size: 1 bias_term: false }",
            top="a",
        )
        + layer('type: "BatchNorm"', "a", "b", "b")
        + add("a b", "y"),
        [],
    ),
    "same-twice": (conv("a", "data", relu=False) + add("a a", "y"), [1]),
    "product": (conv("a", "data", relu=False) + add("data a", "y", PROD), [1]),
    "three": (
        conv("a", "data", relu=False) + conv("b", "data", relu=False) + add("a data b", "y"),
        [1, 1],
    ),
    "no-relu": (
        conv("a", "data", relu=False) + layer('type: "Eltwise"', "data a", "y", "y"),
        [1],
    ),
    "two-outputs": (conv("a", "data") + conv("b", "a") + conv("c", "a", out=3), [1, 1, 1]),
}


def load(folder, text: str, seed: int = 0) -> nn.Module:
    net = Net(INPUT + text, seed=seed)
    net.run(image(2, 8, 12, 12))
    (folder / "net.prototxt").write_text(INPUT + text)
    (folder / "net.caffemodel").write_bytes(caffemodel(net.blobs))
    return caffe.load(folder / "net.prototxt", folder / "net.caffemodel")


def leaves(y) -> list[torch.Tensor]:
    return [*y.values()] if isinstance(y, dict) else [y]


@pytest.fixture
def block(tmp_path):
    return load(tmp_path, GRAPHS["shortcut"][0])


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(tmp_path, name):
    """What is found in it, and that it computes the same, in inference and in training."""
    text, chains = GRAPHS[name]
    plain = load(tmp_path, text)
    assert sorted(len(unit.pairs) for unit in plain.units if unit.chain) == sorted(chains)
    fused, exact = fused_resnet.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = torch.from_numpy(image(2, 8, 12, 12))
    with torch.no_grad():
        frozen = fused_resnet.freeze(plain, example=x)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            truth = exact(x.double())
            for net in (fused, frozen):
                outputs = leaves(net(given))
                judge(outputs, leaves(plain(given)), leaves(truth))
            assert [y.stride() for y in leaves(fused(given))] == [
                y.stride() for y in leaves(plain(given))
            ]
    for net in (fused, plain, exact):
        given = x.to(next(net.parameters()).dtype)
        sum(y.square().sum() for y in leaves(net.train()(given))).backward()
    judge(*([p.grad for p in net.parameters()] for net in (fused, plain, exact)))
    judge(*([b for b in net.buffers() if b.dim()] for net in (fused, plain, exact)))


def test_tuned(block, tmp_path, monkeypatch):
    """Trained as a whole as it is fastest, run by convolutions."""
    given_times.keep_in(monkeypatch, tmp_path)
    given_times.prefer(monkeypatch, "eager")
    net, x = fused_resnet.fuse(block), torch.from_numpy(image(2, 8, 12, 12))
    assert {c.op for c in fused_resnet.tune(net, x)} >= {"conv_bn_act", "conv_bn_act + residual"}
    assert {e.engine for e in fused_resnet.report(net, engines=True)} == {"eager"}
    assert [c.op for c in fused_resnet.tune(net.train(), x)] == ["FusedCaffeNet"]
    assert not runs_fused(net, x)


def test_copies(block, tmp_path):
    x = torch.from_numpy(image(3, 8, 9, 10))
    net = fused_resnet.fuse(block)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other = caffe.load(tmp_path / "net.prototxt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        y = net(x)
        for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(again) is type(net)
            assert torch.equal(again(x), y)
        assert torch.equal(fused_resnet.fuse(other)(x), y)
        assert type(fused_resnet.unfuse(net)).__name__ == "CaffeNet"


def test_exports(block):
    x = torch.from_numpy(image(2, 8, 12, 12))
    net = fused_resnet.fuse(block)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
        y = torch.from_numpy(image(3, 8, 12, 12))
        judge([program.module()(y)], [fused_resnet.unfuse(copy.deepcopy(net))(y)], [double(net, y)])
    assert "fused_resnet" in str(program.graph)


def test_traces_as_it_was(block):
    plain = copy.deepcopy(block)
    traced = [torch.fx.symbolic_trace(m).code for m in (fused_resnet.fuse(block), plain)]
    assert traced[0] == traced[1]


def test_one_hook_stops_one_chain(tmp_path):
    """The others run on, also frozen, and the report names the one."""
    text = GRAPHS["shortcut"][0] + conv("last", "y")
    net = fused_resnet.fuse(load(tmp_path, text))
    plain = fused_resnet.unfuse(copy.deepcopy(net))
    seen = []
    net.relu_a.register_forward_hook(lambda *args: seen.append(1))
    x = torch.from_numpy(image(1, 8, 12, 12))
    reasons = {entry.conv: entry.reason for entry in fused_resnet.report(net)}
    assert reasons["last"] is None
    assert reasons["a"] == reasons["s"] == "the block's ReLU: it has hooks"
    with torch.no_grad():
        frozen = fused_resnet.freeze(net, example=x)
        for m in (net, frozen):
            seen.clear()
            assert runs_fused(m, x)
            assert seen
            judge([m(x)], [plain(x)], [double(plain, x)])
    kinds = {name: type(m).__name__ for name, m in frozen.model.named_children()}
    assert (kinds["last"], kinds["a"]) == ("FrozenConv", "Conv2d")
    with pytest.raises(RuntimeError, match="strict"):
        fused_resnet.fuse(net, strict=True)


@pytest.mark.parametrize("name", ["identity", "two-branches", "three", "long"])
def test_autocast(tmp_path, name):
    """The types of eager torch, in training too; also where what is added is not cast."""
    found = []
    for seed in SEEDS:
        plain = load(tmp_path, GRAPHS[name][0], seed)
        fused = fused_resnet.fuse(copy.deepcopy(plain))
        exact = copy.deepcopy(plain).train().double()
        x = torch.from_numpy(image(2, 8, 12, 12, seed=seed))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fused.train()(x), plain.train()(x)
        assert ours.dtype == theirs.dtype
        found.append((ours, theirs, exact(x.double())))
    judge(*zip(*found, strict=True))


def test_lean_memory(block):
    net = fused_resnet.fuse(block, memory="lean")
    assert net.memory == "lean"
    x = torch.from_numpy(image(2, 8, 12, 12))
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def python(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_stays_away_from_protobuf(request):
    code = "import sys, fused_resnet; print('google.protobuf' in sys.modules)"
    assert python(code, request.config.rootpath) == "False\n"


def test_without_protobuf(request):
    code = (
        "import sys; sys.modules['google.protobuf'] = None; import fused_resnet\n"
        "try: fused_resnet.caffe.load('x')\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install 'fused_resnet[caffe]'" in python(code, request.config.rootpath)


def test_example(tmp_path, request):
    """The script, as the README calls it."""
    from PIL import Image

    text = caffe_numpy.resnet((1, 1, 1, 1), size=64, classes=7)
    net = Net(text)
    net.run(image(1, 3, 64, 64))
    (tmp_path / "net.prototxt").write_text(text)
    (tmp_path / "net.caffemodel").write_bytes(caffemodel(net.blobs))
    Image.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
    script = request.config.rootpath / "examples" / "load_caffe.py"
    files = [script, tmp_path / "net.prototxt", tmp_path / "net.caffemodel"]
    options = ["--image", tmp_path / "red.png", "--size", "64"]
    done = subprocess.run([sys.executable, *files, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, error, *classes = done.stdout.splitlines()
    assert first == "17 of 17 conv/BatchNorm pairs fused"
    assert error.startswith("mean error against float64: ")
    assert len({line.split()[-1] for line in classes}) == 5
    values = [float(line.split()[0]) for line in classes]
    assert values == sorted(values, reverse=True)
