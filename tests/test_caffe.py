"""Networks read from Caffe's files, against Caffe's rules in NumPy."""

import copy
import functools
import itertools
from pathlib import Path

import caffe_numpy
import numpy as np
import pytest
import torch
from caffe_numpy import Net, caffemodel
from models import runs_fused
from tolerances import judge
from torch import nn

import fused_resnet
from fused_resnet import caffe

pytest.importorskip("google.protobuf", reason="no protobuf")

SEED = Path(__file__).parent / "caffe_seed_block.prototxt"
INPUT = 'input: "data" input_shape { dim: 2 dim: 6 dim: 7 dim: 9 }\n'


def image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loaded(folder, net: Net, text: str, weights: bytes | None = None) -> nn.Module:
    """What load makes of a network in NumPy, once that has run and has weights."""
    (folder / "net.prototxt").write_text(text)
    (folder / "net.caffemodel").write_bytes(weights or caffemodel(net.blobs))
    return caffe.load(folder / "net.prototxt", folder / "net.caffemodel")


def values(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each module of a network makes."""
    found = {}

    def keep(module, inputs, output, name):
        found[name] = output

    for name, m in net.named_children():
        m.register_forward_hook(functools.partial(keep, name=name))
    with torch.no_grad():
        net(x)
    return found


def same(ours: torch.Tensor, truth: np.ndarray) -> None:
    """In float64 both are the truth: the rule leaves what float64 rounds."""
    exact = torch.from_numpy(truth)
    judge([ours], [exact], [exact])


def layer(text: str, bottom: str = "data", top: str = "y", name: str = "layer") -> str:
    bottoms = "".join(f'bottom: "{b}" ' for b in bottom.split())
    return f'layer {{ name: "{name}" {bottoms} top: "{top}" {text} }}\n'


# --- whole networks


@pytest.fixture(scope="module")
def resnet50():
    """The text, the network in NumPy, an image, and what each layer makes of it."""
    text, x = caffe_numpy.resnet(size=64), image(1, 3, 64, 64)
    net = Net(text)
    made, _ = net.run(x)
    return text, net, x, made


@pytest.fixture(scope="module")
def resnet50_module(resnet50, tmp_path_factory):
    text, net, _, _ = resnet50
    return loaded(tmp_path_factory.mktemp("resnet50"), net, text)


def test_resnet50_layer_by_layer(resnet50, resnet50_module):
    _, _, x, made = resnet50
    found = values(copy.deepcopy(resnet50_module).double(), torch.from_numpy(x).double())
    # A Scale is part of the BatchNorm before it.
    expected = {name.replace("scale", "bn"): made[name] for name in made}
    assert found.keys() == expected.keys()
    assert len(expected) == 53 * 2 + 1 + 16 * 2 + 16 * 2 + 1 + 3
    for name, truth in expected.items():
        same(found[name], truth)


def test_resnet50_fused_and_frozen(resnet50, resnet50_module):
    _, _, x, made = resnet50
    x, truth = torch.from_numpy(x), torch.from_numpy(made["prob"])
    fused = fused_resnet.fuse(copy.deepcopy(resnet50_module), strict=True)
    assert len(fused_resnet.report(fused)) == 53
    assert {type(unit.shortcut) for unit in fused.units if len(unit.chain) == 3} > {type(None)}
    frozen = fused_resnet.freeze(resnet50_module, example=x)
    with torch.no_grad():
        eager = resnet50_module(x)
        for net in (fused, frozen):
            assert runs_fused(net, x)
            judge([net(x)], [eager], [truth])


def test_blocks_are_chains(resnet50_module):
    """Every convolution, BatchNorm, ReLU and Eltwise is in an epilogue: 17 chains, no more."""
    chains = [unit for unit in resnet50_module.units if unit.chain]
    assert [len(unit.chain) for unit in chains] == [1] + 16 * [3]
    assert sum(unit.shortcut is not None for unit in chains) == 4
    others = [unit.steps[0].module for unit in resnet50_module.units if not unit.chain]
    assert others == ["pool1", "pool5", "fc", "prob"]
    residual = chains[2]
    assert residual.inputs == (chains[1].output, chains[1].output)


def test_seed_block(tmp_path):
    """The first block, as the notes have it: a file with tabs and the old input_dim."""
    text = SEED.read_text()
    assert "\t" in text
    net, x = Net(text), image(1, 3, 64, 65)
    made, _ = net.run(x)
    module = caffe.load(SEED)
    assert list(module.state_dict()) == list(loaded(tmp_path, net, text).state_dict())
    module = loaded(tmp_path, net, text)
    found = values(copy.deepcopy(module).double(), torch.from_numpy(x).double())
    for name, truth in {name.replace("scale", "bn"): made[name] for name in made}.items():
        same(found[name], truth)
    assert [len(unit.chain) for unit in module.units] == [1, 0, 3]
    assert len(fused_resnet.report(fused_resnet.fuse(module, strict=True))) == 5
    with torch.no_grad():
        assert module(torch.from_numpy(x)).shape == (1, 256, 16, 16)


@pytest.mark.parametrize(("depths", "pairs"), [((3, 4, 23, 3), 104), ((3, 8, 36, 3), 155)])
def test_deeper(tmp_path, depths, pairs):
    (tmp_path / "net.prototxt").write_text(caffe_numpy.resnet(depths, classes=10))
    module = fused_resnet.fuse(caffe.load(tmp_path / "net.prototxt"), strict=True)
    assert len(fused_resnet.report(module)) == pairs


# --- layer by layer

CONV = 'type: "Convolution" convolution_param {{ num_output: 8 {} }}'
POOL = 'type: "Pooling" pooling_param {{ {} }}'
BN = 'type: "BatchNorm" '
RESHAPE = 'type: "Reshape" reshape_param {{ {} }}'
LAYERS = {
    "conv": layer(CONV.format("kernel_size: 3")),
    "conv-sides": layer(CONV.format("kernel_h: 3 kernel_w: 1 pad_h: 1 stride_h: 2 stride_w: 1")),
    "conv-pad-w": layer(CONV.format("kernel_size: 3 pad_h: 0 pad_w: 1 stride: 2")),
    "conv-repeated": layer(
        CONV.format("kernel_size: 3 kernel_size: 1 pad: 1 pad: 0 stride: 1 stride: 2")
    ),
    "conv-dilation": layer(CONV.format("kernel_size: 3 pad: 2 dilation: 2 bias_term: false")),
    "conv-group": layer(CONV.format("kernel_size: 3 group: 2 engine: CAFFE")),
    "bn": layer(BN),
    "bn-eps": layer(BN + "batch_norm_param { eps: 0.1 use_global_stats: true }"),
    "bn-batch": layer(BN + "batch_norm_param { use_global_stats: false }"),
    "scale": layer('type: "Scale"'),
    "scale-bias": layer('type: "Scale" scale_param { bias_term: true }'),
    "scale-axis": layer('type: "Scale" scale_param { axis: 2 num_axes: 2 bias_term: true }'),
    "scale-all": layer('type: "Scale" scale_param { axis: -3 num_axes: -1 }'),
    "scale-scalar": layer('type: "Scale" scale_param { num_axes: 0 }'),
    "scale-two-bottoms": layer(POOL.format("global_pooling: true pool: AVE"), top="a", name="a")
    + layer('type: "Flatten"', "a", "b", "b")
    + layer('type: "Scale" scale_param { axis: 0 bias_term: true }', "data b"),
    "relu": layer('type: "ReLU"'),
    "relu-slope": layer('type: "ReLU" relu_param { negative_slope: 0.1 }'),
    "pool-sides": layer(POOL.format("kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 1")),
    "pool-floor": layer(POOL.format("kernel_size: 2 stride: 2 round_mode: FLOOR")),
    "pool-average": layer(POOL.format("kernel_size: 3 stride: 2 pad: 1 pool: AVE")),
    "pool-global-max": layer(POOL.format("global_pooling: true")),
    "pool-global-average": layer(POOL.format("global_pooling: true pool: AVE")),
    "inner-product": layer('type: "InnerProduct" inner_product_param { num_output: 5 }'),
    "inner-product-transposed": layer(
        'type: "InnerProduct" inner_product_param { num_output: 5 transpose: true axis: 2 }'
    ),
    "inner-product-plain": layer(
        'type: "InnerProduct" inner_product_param { num_output: 5 bias_term: false axis: -1 }'
    ),
    "softmax": layer('type: "Softmax"'),
    "softmax-axis": layer('type: "Softmax" softmax_param { axis: -1 }'),
    "dropout": layer('type: "Dropout" dropout_param { dropout_ratio: 0.3 }'),
    "flatten": layer('type: "Flatten" flatten_param { axis: 2 }'),
    "reshape": layer(RESHAPE.format("shape { dim: 0 dim: -1 }")),
    "reshape-axes": layer(RESHAPE.format("shape { dim: 2 dim: 3 } axis: 1 num_axes: 1")),
    "reshape-copy": layer(RESHAPE.format("shape { dim: -1 dim: 0 } axis: -3 num_axes: 2")),
    "reshape-behind": layer(RESHAPE.format("shape { dim: 1 } axis: -1")),
    "concat": layer('type: "Concat"', "data data"),
    "concat-axis": layer('type: "Concat" concat_param { axis: -2 }', "data data data"),
    "concat-dim": layer('type: "Concat" concat_param { concat_dim: 2 }', "data data"),
    **{
        f"eltwise-{op}-{count}": layer(
            f'type: "Eltwise" eltwise_param {{ operation: {op} }}',
            " ".join(["a", "b", "data"][:count]),
        )
        for op in ("SUM", "PROD", "MAX")
        for count in (2, 3)
    },
    "eltwise-coeff": layer(
        'type: "Eltwise" eltwise_param { coeff: 0.5 coeff: -1 coeff: 2 }', "data a b"
    ),
}
SOURCES = layer(CONV.format("kernel_size: 1").replace("8", "6"), top="a", name="a") + layer(
    CONV.format("kernel_size: 1").replace("8", "6"), top="b", name="b"
)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_layer(tmp_path, name):
    """Each layer in float64 against NumPy, and fused, with a ReLU behind it in place."""
    text = INPUT + (SOURCES if "eltwise" in name else "") + LAYERS[name]
    text += layer('type: "ReLU"', "y", "y", "relu")
    net, x = Net(text), image(2, 6, 7, 9)
    _, blobs = net.run(x)
    module = loaded(tmp_path, net, text)
    x, truth = torch.from_numpy(x), blobs["y"]
    with torch.no_grad():
        same(copy.deepcopy(module).double()(x.double()), truth)
        judge([fused_resnet.fuse(copy.deepcopy(module))(x)], [module(x)], [torch.from_numpy(truth)])


@pytest.mark.parametrize("method", ["MAX", "AVE"])
@pytest.mark.parametrize("pad", [0, 1])
def test_pooling_rounds_up(tmp_path, method, pad):
    """Every size, window and step; a window that Caffe lets lie outside of the image is refused."""
    path = tmp_path / "net.prototxt"
    refused = 0
    for size, k, s in itertools.product(range(2, 10), range(2, 4), range(1, 5)):
        param = f"kernel_size: {k} stride: {s} pad: {pad} pool: {method}"
        text = f'input: "data" input_dim: 1 input_dim: 2 input_dim: {size} input_dim: {size + 1}\n'
        path.write_text(text + layer(POOL.format(param)))
        x = image(1, 2, size, size + 1)
        steps = [-(-(n + 2 * pad - k) // s) for n in (size, size + 1)]
        outside = not pad and any(n * s >= size + i for i, n in enumerate(steps))
        if outside or min(steps) < 0:
            refused += outside
            with pytest.raises(caffe.CaffeError, match=r"layer 'layer': Pooling: "):
                caffe.load(path)
            continue
        made, _ = Net(path.read_text()).run(x)
        same(caffe.load(path)(torch.from_numpy(x).double()), made["layer"])
    assert (refused > 0) == (pad == 0)


def test_batch_norm_without_weight(tmp_path):
    """A scale factor of 0 makes mean and variance 0."""
    text = INPUT + layer(BN)
    ones = np.ones(6, np.float32)
    net = Net(text, {"layer": [ones, ones, np.zeros(1, np.float32)]})
    made, _ = net.run(image(2, 6, 7, 9))
    module = loaded(tmp_path, net, text)
    assert module.layer.weight is None
    with torch.no_grad():
        same(module.double()(torch.from_numpy(image(2, 6, 7, 9)).double()), made["layer"])
