"""Caffe's files: forms they come in, and what is wrong with them, named."""

import numpy as np
import pytest
import torch
from caffe_numpy import Net, caffemodel, field, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st
from test_caffe import image, same

from fused_resnet import caffe

HEAD = 'input: "data"\ninput_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8\n'
CONV = """layer {
  name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } }
  param { lr_mult: 1 }
}
"""
BN = """layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
"""
FC = """layer {
  name: "fc" type: "InnerProduct" bottom: "conv" top: "fc"
  inner_product_param { num_output: 2 }
}
"""
TEXT = HEAD + CONV + BN + FC
OLD = """input: "data" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8
layers {
  name: "conv" type: CONVOLUTION bottom: "data" top: "conv" blobs_lr: 1 weight_decay: 0
  convolution_param { num_output: 4 kernel_size: 3 }
}
layers { name: "relu" type: RELU bottom: "conv" top: "conv" }
layers { name: "pool" type: POOLING bottom: "conv" top: "pool" pooling_param { kernel_size: 2 } }
layers { name: "sum" type: ELTWISE bottom: "pool" bottom: "pool" top: "sum" }
layers { name: "drop" type: DROPOUT bottom: "sum" top: "sum" }
layers {
  name: "fc" type: INNER_PRODUCT bottom: "sum" top: "fc" inner_product_param { num_output: 2 }
}
layers { name: "prob" type: SOFTMAX bottom: "fc" top: "prob" }
"""
FORMS = {
    "input_dim": HEAD,
    "input_shape": 'input: "data" input_shape { dim: 1 dim: 3 dim: 8 dim: 8 }\n',
    "Input": 'layer { name: "i" type: "Input" top: "data" '
    "input_param { shape: { dim: [1, 3, 8, 8] } } }\n",
}


def weights(text: str = TEXT) -> dict[str, list[np.ndarray]]:
    net = Net(text)
    net.run(image(1, 3, 8, 8))
    return net.blobs


def load(folder, text: str = TEXT, model: bytes | None = None):
    (folder / "net.prototxt").write_text(text)
    if model is None:
        return caffe.load(folder / "net.prototxt")
    (folder / "net.caffemodel").write_bytes(model)
    return caffe.load(str(folder / "net.prototxt"), folder / "net.caffemodel")


def error(folder, *args) -> str:
    with pytest.raises(caffe.CaffeError) as caught:
        load(folder, *args)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def check(net, text: str, blobs) -> None:
    x = image(1, 3, 8, 8)
    made, _ = Net(text, blobs).run(x)
    with torch.no_grad():
        same(net.double()(torch.from_numpy(x).double()), [*made.values()][-1])


@pytest.mark.parametrize("form", FORMS)
def test_inputs(tmp_path, form):
    blobs = weights()
    check(load(tmp_path, FORMS[form] + CONV + BN + FC, caffemodel(blobs)), TEXT, blobs)


@pytest.mark.parametrize("double", [False, True])
def test_old_form(tmp_path, double):
    """V1 layers, by numbers, and blobs of four dimensions."""
    blobs = weights(OLD)
    net = load(tmp_path, OLD, caffemodel(blobs, old=True, double=double))
    assert torch.equal(net.conv.weight, torch.from_numpy(blobs["conv"][0]))
    check(net, OLD, blobs)


def test_round_trip(tmp_path):
    """Bytes written by hand are what protobuf writes of them."""
    from fused_resnet.caffe_proto import from_binary

    blobs = weights()
    model = caffemodel(blobs)
    parsed = from_binary(model)
    assert parsed.SerializeToString() == model
    assert [layer.name for layer in parsed.layer] == ["conv", "bn", "scale", "fc"]
    net = load(tmp_path, TEXT, model)
    mean, var, (factor,) = blobs["bn"]
    state = {
        "conv.weight": blobs["conv"][0],
        "conv.bias": blobs["conv"][1],
        "bn.weight": blobs["scale"][0],
        "bn.bias": blobs["scale"][1],
        "bn.running_mean": mean * (1 / factor),
        "bn.running_var": var * (1 / factor),
        "bn.num_batches_tracked": np.array(0),
        "fc.weight": blobs["fc"][0],
        "fc.bias": blobs["fc"][1],
    }
    assert list(net.state_dict()) == list(state)
    for name, array in state.items():
        assert torch.equal(net.state_dict()[name], torch.from_numpy(array)), name


def test_values_with_a_tag_each(tmp_path):
    blobs = weights()
    layers = (
        field(100, field(1, name.encode()) + b"".join(field(7, unpacked(a)) for a in arrays))
        for name, arrays in blobs.items()
    )
    check(load(tmp_path, TEXT, b"".join(layers)), TEXT, blobs)


def test_what_the_network_lacks_is_left_out(tmp_path):
    """Layers and fields that are not its own; weights also stand in the prototxt."""
    model = caffemodel({**weights(), "loss": [np.ones(3)]}) + field(77, b"of a fork")
    load(tmp_path, TEXT, model)
    text = TEXT.replace("num_output: 2 }", "num_output: 2 bias_term: false }")
    values = " ".join(f"data: {i}" for i in range(288))
    net = load(
        tmp_path,
        text.replace('name: "fc"', f'name: "fc" blobs {{ shape {{ dim: 2 dim: 144 }} {values} }}'),
    )
    assert torch.equal(net.fc.weight, torch.arange(288.0).reshape(2, 144))


def test_phases(tmp_path):
    """Data for training is left out, and what it alone has need not be known."""
    data = 'layer { name: "d" type: "Data" top: "data" top: "label" include { phase: TRAIN } '
    data += 'transform_param { crop_size: 8 } data_param { source: "x" backend: LMDB } }\n'
    loss = 'layer { name: "l" type: "SoftmaxWithLoss" bottom: "fc" exclude { phase: TEST } }\n'
    extra = 'layer { name: "e" type: "LRN" bottom: "fc" top: "e" include { stage: "extra" } }\n'
    kept = FC.replace('top: "fc"', 'top: "fc" include { phase: TEST not_stage: "extra" }')
    net = load(tmp_path, data + HEAD + CONV + BN + kept + loss + extra)
    assert [name for name, _ in net.named_children()] == ["conv", "bn", "fc"]


def test_names(tmp_path):
    """What torch does not allow, what a module has already, and what comes twice."""
    relu = 'layer {{ name: "{}" type: "ReLU" bottom: "fc" top: "fc" }}\n'
    names = ("a.b", "forward", "units", "relu", "relu", "res/1x1", "")
    net = load(tmp_path, TEXT + "".join(map(relu.format, names)))
    found = [name for name, _ in net.named_children()][3:]
    assert found == ["a_b", "forward_", "units_", "relu", "relu_", "res/1x1", "ReLU"]
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


LRN = 'layer { name: "norm" type: "LRN" bottom: "fc" top: "n" }\n'
RELU = 'layer {{ name: "r" type: "ReLU" {} }}\n'
RESHAPE = RELU.replace("ReLU", "Reshape").replace(
    "{}", 'bottom: "fc" top: "n" reshape_param {{ {} }}'
)
WRONG = {
    "unknown type": (TEXT + LRN, "layer 'norm': type must be one of BatchNorm, .* got 'LRN'"),
    "unknown field": (TEXT + "layer { lrn_param { } }", 'line 14, .* no field named "lrn_param"'),
    "two sizes left": (TEXT + RESHAPE.format("shape { dim: -1 dim: -1 }"), "Reshape: only one"),
    "too few values": (TEXT + RESHAPE.format("shape { dim: 0 dim: 7 }"), "Reshape: shape"),
    "too many axes": (TEXT + RESHAPE.format("num_axes: 9"), "num_axes 9 at axis 0 does not fit"),
    "open bracket": (TEXT + "layer {", "line 14, "),
    "closing bracket": (TEXT.replace("scale_param {", "scale_param"), "line 9, "),
    "enum": (OLD.replace("RELU", "RELOO"), "line 6, .* no value named RELOO"),
    "no integer": (TEXT.replace("num_output: 4", "num_output: x"), "line 5, .* integer"),
    "not text": ("\udcff", "codec"),
    "no layers": (HEAD, "the network has no layers"),
    "empty": ("", "must have one input, got none"),
    "two inputs": (f'input: "b" {FORMS["Input"]}{CONV}', "must have one input, got b, data"),
    "no shape": ('input: "data"\n' + CONV, "input 'data' must have a shape, got None"),
    "no size": (TEXT.replace("input_dim: 3", "input_dim: 0"), "input 'data' must have a shape"),
    "three dims": (TEXT.replace("input_dim: 3", ""), "1 inputs, 3 input_dim"),
    "both kinds": (TEXT + OLD[OLD.index("layers") :], "layers of both kinds"),
    "bottom": (TEXT.replace('bottom: "data"', 'bottom: "dat"'), "'conv': no layer .* 'dat'"),
    "top": (TEXT + RELU.format('bottom: "fc" top: "conv"'), "'r': an earlier layer makes its top"),
    "tops": (TEXT + RELU.format('bottom: "fc" top: "a" top: "b"'), "'r': ReLU must have 1 top"),
    "bottoms": (TEXT + RELU.format('top: "a"'), "'r': ReLU must have 1 bottoms, got 0"),
    "one term": (
        TEXT + RELU.format('bottom: "fc" top: "a"').replace("ReLU", "Eltwise"),
        "2 or more",
    ),
    "rules": (TEXT + RELU.format("include { } exclude { }"), "'r': it has rules of both kinds"),
    "no kernel": (TEXT.replace("kernel_size: 3", ""), "'conv': Convolution: kernel_size must be"),
    "two kernels": (TEXT.replace("kernel_size: 3", "kernel_size: 3 kernel_h: 3"), "kernel_h too"),
    "half a stride": (TEXT.replace("kernel_size: 3", "kernel_size: 3 stride_h: 2"), "stride must"),
    "too large": (TEXT.replace("kernel_size: 3", "kernel_size: 9"), "'conv': Convolution: .*9"),
    "groups": (TEXT.replace("num_output: 4", "num_output: 4 group: 2"), "'conv': .*groups"),
    "no outputs": (TEXT.replace("num_output: 2", ""), "'fc': InnerProduct: num_output must be"),
    "axis": (TEXT.replace("num_output: 2", "num_output: 2 axis: 4"), "'fc': .*axis 4"),
    "shared": (
        TEXT.replace("lr_mult: 1", 'name: "w"')
        + FC.replace('"fc"', '"f"').replace("inner", 'param { name: "w" } inner', 1),
        "'f': its param 'w' is another layer's",
    ),
    "one name": (TEXT + FC.replace('top: "fc"', 'top: "g"'), "'fc': its name 'fc' is another"),
    "stochastic": (
        TEXT
        + RELU.format('bottom: "conv" top: "p" pooling_param { pool: STOCHASTIC }').replace(
            "ReLU", "Pooling"
        ),
        "'r': Pooling: pool must be MAX or AVE",
    ),
    "shapes": (
        TEXT + RELU.format('bottom: "conv" bottom: "fc" top: "e"').replace("ReLU", "Eltwise"),
        "'r': Eltwise: its inputs must have one shape, got",
    ),
    "coeff": (
        TEXT
        + RELU.format(
            'bottom: "fc" bottom: "fc" top: "e" eltwise_param { operation: PROD coeff: 2 }'
        ).replace("ReLU", "Eltwise"),
        "'r': Eltwise: coeff is for operation SUM only, got PROD",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_prototxt(tmp_path, name):
    text, words = WRONG[name]
    path = tmp_path / "net.prototxt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(caffe.CaffeError, match=f"(?s){path}: .*{words}"):
        caffe.load(path)


def test_wrong_blobs(tmp_path):
    good = weights()
    cases = {
        "layer 'fc': expected 2 blobs of weights, got 0": {**good, "fc": []},
        "layer 'bn': expected 3 blobs of weights, got 2": {**good, "bn": good["bn"][:2]},
        r"layer 'conv': blob 0 must have shape (4, 3, 3, 3), got (4, 3, 9)": {
            **good,
            "conv": [good["conv"][0].reshape(4, 3, 9), good["conv"][1]],
        },
        "layer 'scale': blob 1 must have shape (4,), got (1, 4)": {
            **good,
            "scale": [good["scale"][0], good["scale"][1][None]],
        },
    }
    for words, blobs in cases.items():
        assert f"net.caffemodel: {words}" in error(tmp_path, TEXT, caffemodel(blobs))
    short = field(7, field(1, bytes([4]))) + field(5, bytes(12))
    layer = field(100, field(1, b"scale") + field(7, short) * 2)
    message = error(tmp_path, TEXT, caffemodel(good) + layer)
    assert "layer 'scale': blob 0 must have 4 values, got 3" in message


def test_truncated(tmp_path):
    """Wherever a file ends too early, nothing is loaded."""
    model = caffemodel(weights(OLD), old=True)
    assert load(tmp_path, OLD, model) is not None
    for end in {*range(0, len(model), 7), *range(len(model) - 40, len(model))}:
        assert "net.caffemodel: " in error(tmp_path, OLD, model[:end])
    assert "not a binary caffemodel" in error(tmp_path, OLD, OLD.encode())


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.prototxt"):
        caffe.load(tmp_path / "no.prototxt")
    (tmp_path / "net.prototxt").write_text(TEXT)
    with pytest.raises(FileNotFoundError, match=r"no\.caffemodel"):
        caffe.load(tmp_path / "net.prototxt", tmp_path / "no.caffemodel")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, len(TEXT)), st.integers(0, 40), st.sampled_from(["", "{", "}", ":", '"', "x"])
)
def test_any_damage_is_named(tmp_path_factory, start, length, instead):
    """A prototxt with a hole loads, or raises the one error."""
    path = tmp_path_factory.getbasetemp() / "damaged.prototxt"
    path.write_text(TEXT[:start] + instead + TEXT[start + length :])
    message = str(path)
    try:
        caffe.load(path)
    except caffe.CaffeError as error:
        message = str(error)
    assert str(path) in message


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=4, max_size=4))
def test_any_value_comes_through(tmp_path_factory, values):
    """NaN and infinities, too, and to the bit."""
    folder = tmp_path_factory.getbasetemp()
    blobs = weights()
    blobs["scale"][1] = np.array(values, np.float32)
    bias = load(folder, TEXT, caffemodel(blobs)).bn.bias.detach()
    assert bias.numpy().tobytes() == blobs["scale"][1].tobytes()
