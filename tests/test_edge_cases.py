"""What torch does at the edges of inference, and so what every engine does: values and statistics.

The numbers are the lines of the list of edge cases. Dtypes, layouts and states are in
test_edge_cases_types.py, training in test_edge_cases_training.py.
"""

import functools

import pytest
import torch
from cases import (
    ENGINES,
    HALF,
    LAYOUTS,
    channels_last,
    over_dtypes,
)
from tolerances import check_classes, judge
from torch import Tensor
from torch.nn import functional as F
from units import CHANNELS, MODULE_ENGINES, UNITS, alike, batch_norms, build, image

import fused_resnet
from fused_resnet import functional, use_engine

NAN, INF = float("nan"), float("inf")
over_engines = pytest.mark.parametrize("engine", ENGINES)
over_modules = pytest.mark.parametrize("unit", UNITS)
over_module_engines = pytest.mark.parametrize("engine", MODULE_ENGINES)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def vectors(channels=3, dtype=torch.float32):
    dtype = torch.float32 if dtype in HALF else dtype
    return torch.linspace(0.5, -1.5, channels, dtype=dtype), torch.linspace(-0.5, 1, channels).to(
        dtype
    )


#: Every op on one image: (ours, torch's).
def conv(x, scale, shift):
    weight = torch.ones(3, 3, 1, 1, dtype=x.dtype)
    weight[0, 1] = -1
    return (
        lambda: functional.conv_bn_act(x, weight, scale, shift, act="relu"),
        lambda: torch.relu(affine(F.conv2d(x, weight), scale, shift)),
    )


def bn(x, scale, shift):
    return (
        lambda: functional.bn_act(x, scale, shift, act="relu"),
        lambda: torch.relu(affine(x, scale, shift)),
    )


def bn_residual(x, scale, shift):
    ones = torch.ones_like(x)
    return (
        lambda: functional.bn_act(ones, scale, shift, x, "relu"),
        lambda: torch.relu(affine(ones, scale, shift) + x),
    )


def maxpool(x, scale, shift):
    return (
        lambda: functional.bn_act_maxpool(x, scale, shift, 3, 2, 1),
        lambda: F.max_pool2d(torch.relu(affine(x, scale, shift)), 3, 2, 1),
    )


def eltwise(op, x, scale, shift):
    other = torch.ones_like(x)
    combine = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum}[op]
    return (
        lambda: functional.eltwise_act([x, other], op, act="relu"),
        lambda: torch.relu(combine(x, other)),
    )


def affine(x, scale, shift):
    wide = (x.float() if x.dtype in HALF else x) * scale.view(1, -1, 1, 1)
    return (wide + shift.view(1, -1, 1, 1)).to(x.dtype)


OPS = {"conv_bn_act": conv, "bn_act": bn, "bn_act_residual": bn_residual, "bn_act_maxpool": maxpool}
OPS |= {f"eltwise_act_{op}": functools.partial(eltwise, op) for op in ("sum", "prod", "max")}
over_ops = pytest.mark.parametrize("op", OPS)


def special(value, dtype, layout="contiguous"):
    """An image with ``value`` in a few places, in the body of a vector and in its rest."""
    x = torch.randn(2, 3, 7, 5).to(dtype)
    for place in ((0, 0, 0, 0), (0, 1, 3, 2), (1, 2, 6, 4)):
        x[place] = value
    return LAYOUTS[layout](x)


def check_op(op, engine, x, scale=None, shift=None):
    default = vectors(dtype=x.dtype)
    scale, shift = default[0] if scale is None else scale, default[1] if shift is None else shift
    ours, theirs = OPS[op](x, scale, shift)
    with use_engine(engine):
        result = ours()
    judge([result], [theirs()], [OPS[op](x.double(), scale.double(), shift.double())[1]()])
    return result


@over_engines
@over_ops
@over_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_line_01_relu_of_nan_is_nan(layout, dtype, op, engine):
    result = check_op(op, engine, special(NAN, dtype, layout))
    assert result.isnan().any()
    assert not result.isnan().all()


@over_engines
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act", "bn_act_residual", "bn_act_maxpool"])
@pytest.mark.parametrize("which", ["scale", "shift"])
def test_line_01_nan_in_a_parameter_is_its_channel(which, op, engine):
    broken = vectors()[which == "shift"].clone()
    broken[1] = NAN
    result = check_op(op, engine, torch.randn(2, 3, 7, 5), **{which: broken})
    assert torch.equal(
        result.isnan(), torch.tensor([False, True, False]).view(1, 3, 1, 1).expand_as(result)
    )


@over_engines
@pytest.mark.parametrize("which", ["weight", "residual"])
def test_line_01_nan_in_weight_or_residual(which, engine):
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(20, 4, 3, 3)
    residual = torch.randn(1, 20, 3, 3)
    {"weight": weight, "residual": residual}[which][0, 1, 1, 1] = NAN
    with use_engine(engine):
        result = functional.conv_bn_act(x, weight, residual=residual, act="relu")
    check_classes(result, torch.relu(F.conv2d(x.double(), weight.double()) + residual.double()))
    assert int(result.isnan().sum()) == (9 if which == "weight" else 1)


@over_module_engines
@over_modules
def test_line_01_modules(unit, engine):
    x = image()
    x[0, 1, 2, 3] = NAN
    assert alike(unit, x, engine=engine).isnan().any()


@over_engines
@over_ops
@over_dtypes
@pytest.mark.parametrize("value", [INF, -INF])
def test_line_05_infinities(value, dtype, op, engine):
    result = check_op(op, engine, special(value, dtype))
    assert not (result == -INF).any()


@over_module_engines
@over_modules
def test_line_07_one_value_per_channel_is_fine_in_evaluation(unit, engine):
    assert alike(unit, image(1, 1, 1), engine=engine).shape[2:] == (1, 1)


@over_module_engines
@over_modules
def test_line_09_no_images(unit, engine):
    before = [bn.num_batches_tracked.clone() for bn in batch_norms(build(unit))]
    assert alike(unit, image(0), engine=engine).shape[0] == 0
    assert all(count == 0 for count in before)


@over_module_engines
def test_line_10_no_rows(engine):
    assert alike("BatchNormAct2d", image(2, 0, 4), engine=engine).shape == (2, CHANNELS, 0, 4)
    for unit in ("ConvBNAct2d", "Sequential"):
        assert isinstance(alike(unit, image(2, 0, 4), engine=engine), Tensor | RuntimeError)


@over_engines
@over_modules
def test_line_10_no_images_in_channels_last(unit, engine):
    alike(unit, channels_last(image(0)), engine=engine)


@over_engines
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("out", "into"), [(0, 3), (4, 0)])
def test_line_10_convolution_without_channels_is_refused(out, into, layout, engine):
    x, weight = LAYOUTS[layout](torch.randn(2, into, 5, 5)), torch.randn(out, into, 3, 3)
    with use_engine(engine), pytest.raises(RuntimeError):
        functional.conv_bn_act(x, weight)


@over_module_engines
@over_modules
@pytest.mark.parametrize("eps", [0.0, -1e-3])
def test_line_11_eps_as_torch_decides(eps, unit, engine):
    def change(m):
        for bn in batch_norms(m):
            bn.eps = eps
            bn.running_var[0] = 0

    alike(unit, image(), change, engine)


@over_module_engines
@over_modules
def test_line_12_negative_variance_is_nan(unit, engine):
    def change(m):
        batch_norms(m)[-1].running_var[1] = -0.5

    result = alike(unit, image(), change, engine)
    assert result[:, 1].isnan().all()
    assert not result[:, 0].isnan().any()


@over_engines
@over_dtypes
def test_line_12_scale_shift(dtype, engine):
    var = torch.tensor([-1.0, 0.0, 1.0, INF, NAN], dtype=dtype)
    with use_engine(engine):
        scale, shift = functional.bn_scale_shift(torch.zeros_like(var), var)
    assert scale.isnan().tolist() == shift.isnan().tolist() == [True, False, False, False, True]
    assert scale[3] == 0


@over_module_engines
def test_line_14_no_running_statistics_uses_the_batch(engine):
    m = fused_resnet.BatchNormAct2d(CHANNELS, track_running_stats=False).eval()
    x = image()
    with use_engine(engine):
        y = m(x)
    theirs, truth = (F.relu(F.batch_norm(t, None, None, training=True)) for t in (x, x.double()))
    judge([y], [theirs], [truth])
    assert list(m.state_dict()) == ["weight", "bias"]


@over_module_engines
@over_modules
@pytest.mark.parametrize("missing", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_line_15_16_affine_parameters_may_be_missing(missing, unit, engine):
    def change(m):
        for bn in batch_norms(m):
            for name in missing:
                setattr(bn, name, None)

    assert isinstance(alike(unit, image(), change, engine), Tensor)
