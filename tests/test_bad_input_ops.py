"""Bad input to ops: torch's exception type, a message that names op, argument, expected and got,
and nothing changed."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from cases import ENGINES, assert_identical, channels_last, copied, of_tensors
from torch.nn import functional as F

from fused_resnet import engines, functional, use_engine

X = torch.linspace(-2, 3, 240).view(2, 4, 6, 5)
ONES = torch.ones(4)
GOOD: dict[str, dict[str, Any]] = {
    "conv_bn_act": {
        "x": X,
        "weight": torch.linspace(-1, 1, 216).view(6, 4, 3, 3),
        "scale": torch.ones(6),
        "shift": torch.zeros(6),
        "residual": torch.randn(2, 6, 4, 3),
        "act": "relu",
    },
    "bn_act": {"x": X, "scale": ONES, "shift": ONES, "residual": X, "act": "relu"},
    "bn_act_maxpool": {"x": X, "scale": ONES, "shift": ONES, "kernel_size": 3, "padding": 1},
    "global_avg_pool": {"x": X},
    "bn_scale_shift": {
        "running_mean": ONES,
        "running_var": ONES,
        "weight": ONES,
        "bias": ONES,
        "eps": 1e-5,
    },
    "eltwise_act": {"inputs": [X, X], "op": "sum", "coeff": [1.0, 2.0], "act": "relu"},
}


def torch_bn(x, mean, var, weight, bias):
    return F.batch_norm(x, mean, var, weight, bias)


class Bad(NamedTuple):
    op: str
    given: dict[str, Any]  # in place of the good arguments
    error: type[Exception]
    words: str  # in the message, beside the op's name: argument, expected, got
    torchs: Any = None  # the call of torch's that raises the same type


CONV, BN, POOL = "conv_bn_act", "bn_act", "bn_act_maxpool"
SCALE, ELTWISE, AVERAGE = "bn_scale_shift", "eltwise_act", "global_avg_pool"
WEIGHT = GOOD[CONV]["weight"]


def conv(**given):
    """torch's convolution, then what our op does after it, of the same arguments."""
    whole = {**GOOD[CONV], **given}
    geometry = {k: v for k, v in given.items() if k in ("stride", "padding", "dilation", "groups")}
    return lambda: F.conv2d(whole["x"], whole["weight"], None, **geometry) + whole["residual"]


def pool(*args):
    return lambda: F.max_pool2d(X, *args)


def bad_conv(error, words, **given):
    return Bad(CONV, given, error, words, conv(**given))


BAD = [
    bad_conv(RuntimeError, "4D.*(2D|got 2)", x=X[0, 0], residual=None),
    bad_conv(RuntimeError, "4D.*(5D|got 5)", x=X[None]),
    bad_conv(RuntimeError, "4D.*(3D|got 3)", weight=WEIGHT[0]),
    bad_conv(RuntimeError, "4 channels.*got 3", x=X[:, :3]),
    bad_conv(RuntimeError, "groups.*3", groups=3),
    bad_conv(RuntimeError, "groups.*0", groups=0),
    bad_conv(RuntimeError, "weight.*(Double|float64).*|.*(Float|float32)", weight=WEIGHT.double()),
    bad_conv(RuntimeError, "weight", x=X.half(), residual=None),
    bad_conv(RuntimeError, "padding.*at least 0.*got -1|negative padding", padding=-1),
    bad_conv(RuntimeError, "padding.*at least 0.*got", padding=(0, -2)),
    bad_conv(RuntimeError, "stride.*at least 1.*got 0", stride=0),
    bad_conv(RuntimeError, "dilation.*at least 1.*got 0", dilation=0),
    bad_conv(RuntimeError, "padding.*two integers.*got", padding=(1, 1, 1)),
    bad_conv(RuntimeError, "(?i)kernel.*larger than|kernel size can't be greater", x=X[:, :, :2]),
    bad_conv(RuntimeError, r"residual.*\(2, 6, 4, 3\).*\(2, 5, 4, 3\)",
             residual=torch.ones(2, 5, 4, 3)),
    bad_conv(RuntimeError, "residual.*device", residual=torch.ones(2, 6, 4, 3, device="meta")),
    Bad(CONV, {"weight": WEIGHT.to("meta")}, RuntimeError, "weight.*device"),
    Bad(CONV, {"scale": torch.ones(5)}, RuntimeError, r"scale.*\[6\].*got \[5\]"),
    Bad(CONV, {"shift": torch.ones(6, 1)}, RuntimeError, r"shift.*\[6\].*got \[6, 1\]"),
    Bad(CONV, {"scale": torch.ones(6).double()}, RuntimeError, "scale.*float32.*got float64"),
    Bad(CONV, {"scale": torch.ones(6, device="meta")}, RuntimeError, "scale.*device"),
    Bad(CONV, {"x": X.int(), "weight": WEIGHT.int()}, NotImplementedError, "floating point.*int32"),
    Bad(CONV, {"act": "gelu"}, ValueError, '"none" or "relu", got \'gelu\''),
    Bad(BN, {"x": X[0]}, ValueError, "4D.*3D", lambda: torch.nn.BatchNorm2d(4)(X[0])),
    Bad(BN, {"x": X[:, :3], "residual": None}, RuntimeError, r"scale.*\[3\].*got \[4\]",
        lambda: torch_bn(X[:, :3], ONES, ONES, None, None)),
    Bad(BN, {"shift": ONES[:2]}, RuntimeError, r"shift.*\[4\].*got \[2\]",
        lambda: torch_bn(X, ONES, ONES, None, ONES[:2])),
    Bad(BN, {"x": X.int()}, NotImplementedError, "floating point.*int32",
        lambda: torch_bn(X.int(), ONES, ONES, None, None)),
    Bad(BN, {"scale": ONES.half()}, RuntimeError, "scale.*float32.*got float16",
        lambda: torch_bn(X, ONES.half(), ONES.half(), None, None)),
    Bad(BN, {"shift": ONES.to("meta")}, RuntimeError, "shift.*device",
        lambda: torch_bn(X, ONES, ONES, None, ONES.to("meta"))),
    Bad(BN, {"residual": X.to("meta")}, RuntimeError, "residual.*device", lambda: X + X.to("meta")),
    Bad(BN, {"residual": X[:, :3]}, RuntimeError, r"residual.*\(2, 4, 6, 5\).*\(2, 3, 6, 5\)",
        lambda: X + X[:, :3]),
    Bad(BN, {"act": "RELU"}, ValueError, "act must be.*got 'RELU'"),
    Bad(POOL, {"x": X[0]}, ValueError, "4D.*3D", lambda: torch.nn.BatchNorm2d(4)(X[0])),
    Bad(POOL, {"scale": ONES[:3]}, RuntimeError, r"scale.*\[4\].*got \[3\]"),
    Bad(POOL, {"padding": 2}, RuntimeError, "padding.*half.*got.*2", pool(3, 3, 2)),
    Bad(POOL, {"padding": -1}, RuntimeError, "padding.*at least 0.*got -1", pool(3, 3, -1)),
    Bad(POOL, {"stride": 0}, RuntimeError, "stride.*at least 1.*got 0", pool(3, 0)),
    Bad(POOL, {"kernel_size": 0}, RuntimeError, "kernel_size.*at least 1.*got 0", pool(0)),
    Bad(POOL, {"dilation": 0}, RuntimeError, "dilation.*at least 1.*got 0", pool(3, 3, 0, 0)),
    Bad(POOL, {"kernel_size": 9}, RuntimeError, "kernel_size.*(larger|too small)", pool(9)),
    Bad(POOL, {"act": ""}, ValueError, "act must be.*got ''"),
    Bad(SCALE, {"running_var": ONES[:3]}, RuntimeError, r"running_var.*4.*3",
        lambda: torch_bn(X, ONES, ONES[:3], None, None)),
    Bad(SCALE, {"weight": ONES[:3]}, RuntimeError, r"weight.*4.*3",
        lambda: torch_bn(X, ONES, ONES, ONES[:3], None)),
    Bad(SCALE, {"running_mean": ONES[None]}, RuntimeError, "running_mean.*1.*2",
        lambda: torch_bn(X, ONES[None], ONES, None, None)),
    Bad(SCALE, {"bias": ONES.to("meta")}, RuntimeError, "bias.*device",
        lambda: torch_bn(X, ONES, ONES, ONES, ONES.to("meta"))),
    Bad(SCALE, {"running_mean": ONES.int()}, NotImplementedError, "floating point.*int32"),
    Bad(ELTWISE, {"inputs": [X, X[:, :3]]}, RuntimeError,
        r"inputs.*\(2, 4, 6, 5\), \(2, 3, 6, 5\)", lambda: X + X[:, :3]),
    Bad(ELTWISE, {"inputs": [X, X.to("meta")]}, RuntimeError, "input.*device",
        lambda: X + X.to("meta")),
    Bad(ELTWISE, {"inputs": []}, ValueError, "at least one tensor, got none"),
    Bad(ELTWISE, {"inputs": [X.int(), X.int()]}, NotImplementedError, "floating point.*int32"),
    Bad(ELTWISE, {"op": "min"}, ValueError, '"sum", "prod" or "max", got \'min\''),
    Bad(ELTWISE, {"coeff": [1.0]}, ValueError, "coeff must hold 2 numbers.*got 1"),
    Bad(ELTWISE, {"op": "max"}, ValueError, "coeff is for op.*got op 'max'"),
    Bad(ELTWISE, {"act": "tanh"}, ValueError, "act must be.*got 'tanh'"),
    Bad(AVERAGE, {"x": X[0]}, ValueError, "4D.*3D"),
    Bad(AVERAGE, {"x": X.int()}, NotImplementedError, "floating point.*int32"),
]  # fmt: skip


def name(bad):
    def short(value):
        if isinstance(value, torch.Tensor):
            return f"{tuple(value.shape)}{str(value.dtype)[6:]}{value.device}".replace(" ", "")
        return str(list(map(short, value))) if isinstance(value, list) else repr(value)

    return f"{bad.op}-" + ",".join(f"{k}={short(v)}" for k, v in bad.given.items())


def on_cpu(t):
    return t if t.device.type == "cpu" else tuple(t.shape)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_are_good(op):
    getattr(functional, op)(**GOOD[op])


@pytest.mark.parametrize(
    ("bad", "engine"),
    [
        pytest.param(bad, engine, id=f"{name(bad)}-{engine}")
        for bad in BAD
        for engine, ops in ENGINES.items()
        if bad.op in ops
    ],
)
@pytest.mark.parametrize(
    "layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"]
)
def test_functional(layout, bad, engine):
    given = of_tensors(lambda t: layout(t) if t.dim() == 4 else t, {**GOOD[bad.op], **bad.given})
    before = copied(given)
    with use_engine(engine), pytest.raises(bad.error) as raised:
        getattr(functional, bad.op)(**given)
    message = str(raised.value)
    assert bad.op in message
    assert re.search(bad.words, message, re.DOTALL), message
    assert_identical(of_tensors(on_cpu, given), of_tensors(on_cpu, before), "inputs")


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.torchs], ids=name)
def test_torch_raises_the_same_type(bad):
    with pytest.raises(bad.error):
        bad.torchs()


RAW = torch.ops.fused_resnet
RAW_GOOD = {
    "conv_bn_act": (X, WEIGHT, torch.ones(6), None, None, [1, 1], [0, 0], [1, 1], 1, "relu"),
    "bn_act": (X, ONES, ONES, None, "relu"),
    "bn_act_": (X, ONES, ONES, X.clone(), "relu"),
    "bn_act_maxpool": (X, ONES, ONES, [3, 3], [2, 2], [1, 1], [1, 1], False, "relu"),
    "global_avg_pool": (X,),
    "bn_scale_shift": (ONES, ONES, None, None, 1e-5),
    "conv_pack": (WEIGHT, 1),
    "eltwise_act": ([X, X], "sum", None, "relu"),
}
#: (op, which argument, what instead, words of the message)
RAW_BAD = [
    ("conv_bn_act", 0, X[0], "x must have 4 dimensions, got 3"),
    ("conv_bn_act", 0, X[:, 1:], "x must have 4 channels.*got 3"),
    ("conv_bn_act", 0, X.int(), "x must be float32, float64, bfloat16 or float16"),
    ("conv_bn_act", 1, WEIGHT[0], "weight must have 4 dimensions, got 3"),
    ("conv_bn_act", 1, WEIGHT.half(), "weight must be float32 as x is, got float16"),
    ("conv_bn_act", 1, WEIGHT[:, :0], "weight must have no dimension of size zero, got"),
    ("conv_bn_act", 2, ONES, r"scale must have shape \[6\], got \[4\]"),
    ("conv_bn_act", 3, ONES.double(), "shift must be float32, got float64"),
    ("conv_bn_act", 4, X, r"residual must have shape \[2, 6, 4, 3\], got \[2, 4, 6, 5\]"),
    ("conv_bn_act", 5, [0, 1], r"stride must be two integers of at least 1, got \[0, 1\]"),
    ("conv_bn_act", 6, [0, -1], r"padding must be two integers of at least 0, got \[0, -1\]"),
    ("conv_bn_act", 7, [1], r"dilation must be two integers of at least 1, got \[1\]"),
    ("conv_bn_act", 7, [9, 1], "kernel .* is larger than the padded input"),
    ("conv_bn_act", 8, 4, "groups must be positive and divide the output channels 6, got 4"),
    ("conv_bn_act", 9, "tanh", 'act must be "none" or "relu", got "tanh"'),
    ("bn_act", 0, X[0], "x must have 4 dimensions, got 3"),
    ("bn_act", 1, ONES[1:], r"scale must have shape \[4\], got \[3\]"),
    ("bn_act", 2, ONES.half(), "shift must be float32, got float16"),
    ("bn_act", 3, X[:1], "residual must have shape"),
    ("bn_act", 3, X.double(), "residual must be float32 as x is, got float64"),
    ("bn_act", 4, "tanh", "act must be"),
    ("bn_act_", 0, X[0], "x must have 4 dimensions, got 3"),
    ("bn_act_", 3, X[:1], "residual must have shape"),
    ("bn_act_", 4, "tanh", "act must be"),
    ("bn_act_maxpool", 1, ONES[1:], "scale must have shape"),
    ("bn_act_maxpool", 3, [0, 3], "kernel_size must be two integers of at least 1, got"),
    ("bn_act_maxpool", 4, [2], "stride must be two integers of at least 1, got"),
    ("bn_act_maxpool", 5, [2, 2], "padding must be at most half of .*kernel_size.*got"),
    ("bn_act_maxpool", 6, [0, 1], "dilation must be two integers of at least 1, got"),
    ("bn_act_maxpool", 8, "tanh", "act must be"),
    ("global_avg_pool", 0, X[0], "x must have 4 dimensions, got 3"),
    ("global_avg_pool", 0, X.int(), "x must be float32, float64, bfloat16 or float16"),
    ("bn_scale_shift", 0, X, "running_mean must have 1 dimensions, got 4"),
    ("bn_scale_shift", 1, ONES[1:], "running_var must have shape"),
    ("bn_scale_shift", 2, ONES.double(), "weight must be float32, got float64"),
    ("conv_pack", 0, WEIGHT[0], "weight must have 4 dimensions, got 3"),
    ("conv_pack", 1, 0, "groups must be positive and divide the output channels 6, got 0"),
    ("eltwise_act", 0, [X, X[:1]], "every input must have shape"),
    ("eltwise_act", 0, [X, X.half()], "every input must be float32 as x is, got float16"),
    ("eltwise_act", 1, "min", 'op must be "sum", "prod" or "max", got "min"'),
    ("eltwise_act", 2, [1.0], "coeff must hold 2 numbers, one per input, got 1"),
    ("eltwise_act", 3, "tanh", "act must be"),
]


def has(engine, op):
    return engines.why_not(engine, op.removesuffix("_"), "cpu", torch.float32) is None


@pytest.mark.parametrize(
    ("engine", "op", "index", "instead", "words"),
    [
        pytest.param(engine, *bad, id=f"{engine}-{i}")
        for engine in ("native", "triton")
        for i, bad in enumerate(RAW_BAD)
        if engine == "native" or (bad[0] != "conv_pack" and has(engine, bad[0]))
    ],
)
def test_raw(engine, op, index, instead, words):
    given = copied(list(RAW_GOOD[op]))
    given[index] = instead
    before = copied(given)
    with pytest.raises(RuntimeError, match=f"{op}: {words}"):
        engines.implementation(op, engine)(*given)
    assert_identical(given, before, "inputs")


def test_packed_weight_of_another_convolution():
    packed = RAW.conv_pack(torch.randn(6, 5, 3, 3), 1)
    with pytest.raises(RuntimeError, match="conv_bn_act: packed must have shape"):
        RAW.conv_bn_act(*RAW_GOOD["conv_bn_act"], packed)
