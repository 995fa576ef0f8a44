"""What torch does at the edges of inference, and so what every engine does: dtypes, layouts, ranks,
checkpoints and all that is refused. The numbers are the lines of the list of edge cases."""

import copy

import pytest
import torch
from cases import (
    DTYPES,
    ENGINES,
    HALF,
    LAYOUTS,
    assert_identical,
    channels_last,
    misaligned,
    over_dtypes,
    per_channel,
)
from tolerances import judge
from torch import Tensor, nn
from torch.nn import functional as F
from units import CHANNELS, MODULE_ENGINES, UNITS, alike, batch_norms, build, image

from fused_resnet import ConvBNAct2d, functional, use_engine

over_engines = pytest.mark.parametrize("engine", ENGINES)
over_modules = pytest.mark.parametrize("unit", UNITS)
over_module_engines = pytest.mark.parametrize("engine", MODULE_ENGINES)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def vectors(channels=3, dtype=torch.float32):
    dtype = torch.float32 if dtype in HALF else dtype
    return torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)


def affine(x, scale, shift):
    return (x * per_channel(scale) + per_channel(shift)).to(x.dtype)


@over_module_engines
@over_modules
@pytest.mark.parametrize("params", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
def test_line_20_dtypes_of_input_and_batch_norm(dtype, params, unit, engine):
    """Half input with float32 BatchNorm gives half; what torch refuses is refused."""

    def change(m):
        for child in m.modules():
            if isinstance(child, nn.Conv2d) and dtype.is_floating_point:
                child.to(dtype)
        for bn in batch_norms(m):
            bn.to(params)

    result = alike(unit, image().to(dtype), change, engine)
    refused = (params != dtype) and not (dtype in HALF and params == torch.float32)
    assert isinstance(result, Exception if refused else Tensor)


@over_module_engines
def test_line_20_one_parameter_of_another_dtype(engine):
    for name in ("weight", "bias"):

        def change(m, name=name):
            setattr(m, name, nn.Parameter(getattr(m, name).half()))

        assert isinstance(alike("BatchNormAct2d", image(), change, engine), RuntimeError)


@over_module_engines
@pytest.mark.parametrize("unit", sorted(set(UNITS) - {"BatchNormAct2d"}))
def test_line_20_half_input_to_float_weight_is_refused(unit, engine):
    assert isinstance(alike(unit, image().half(), engine=engine), RuntimeError)


@over_modules
def test_line_20_module_half(unit):
    m = build(unit).half()
    assert {bn.running_mean.dtype for bn in batch_norms(m)} == {torch.float16}
    alike(unit, image().half(), nn.Module.half)


@over_engines
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (3, 1, 1), (5,), (2, 1, 5, 5), (4, 2, 3, 5, 5)], ids=str
)
def test_line_21_residual_broadcasts(shape, op, engine):
    x, (scale, shift), residual = torch.randn(2, 3, 5, 5), vectors(), torch.randn(shape)
    weight = torch.randn(3, 3, 1, 1)
    with use_engine(engine):
        if op == "bn_act":
            y, result = x, functional.bn_act(x, scale, shift, residual, "relu")
        else:
            y = F.conv2d(x, weight)
            result = functional.conv_bn_act(x, weight, scale, shift, residual, act="relu")
    expected = torch.relu(affine(y, scale, shift) + residual)
    assert result.stride() == expected.stride()
    double = (
        t.double()
        for t in (F.conv2d(x.double(), weight.double()) if op != "bn_act" else x, scale, shift)
    )
    judge([result], [expected], [torch.relu(affine(*double) + residual.double())])


@over_engines
@pytest.mark.parametrize(
    "pair",
    [
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_line_21_residual_promotes(pair, engine):
    for a, b in (pair, pair[::-1]):
        x, residual = torch.randn(2, 3, 5, 5).to(a), torch.randn(2, 3, 5, 5).to(b)
        scale, shift = vectors(dtype=a)
        with use_engine(engine):
            result = functional.bn_act(x, scale, shift, residual)
        assert result.dtype == torch.promote_types(a, b)
        exact = affine(x.double(), scale.double(), shift.double()) + residual.double()
        judge([result], [affine(x, scale, shift) + residual], [exact])


@over_engines
def test_line_21_residual_that_does_not_broadcast(engine):
    x, (scale, shift) = torch.randn(2, 3, 5, 5), vectors()
    with use_engine(engine), pytest.raises(RuntimeError):
        functional.bn_act(x, scale, shift, torch.randn(2, 4, 5, 5))


def test_line_22_in_place_targets_torch_refuses():
    op = torch.ops.fused_resnet.bn_act_
    scale, shift = vectors()
    with torch.enable_grad(), pytest.raises(RuntimeError):
        op(torch.randn(2, 3, 5, 5, requires_grad=True), scale, shift, None, "relu")
    x, ones, ops = torch.randn(2, 3, 5, 5), torch.ones(3), torch.ops.fused_resnet
    vectors_of = [ones] * 6
    weight = torch.ones(3, 3, 1, 1)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    for argument, call in [
        ("x", lambda t: op(t, scale, shift, None, "relu")),
        ("x", lambda t: ops.batch_norm_act_(t, ones, ones, None, None, 1e-5, None, "relu")),
        ("grad", lambda t: ops.bn_act_backward_(t, x, None, *vectors_of, 50.0, "none")),
        ("added", lambda t: ops.conv_dgrad_(x, weight, t, [5, 5], *geometry)),
    ]:
        expanded = torch.randn(1, 3, 5, 5).expand(2, 3, 5, 5)
        before = expanded.clone()
        with pytest.raises(RuntimeError, match=f"_: {argument} must not .* single memory location"):
            call(expanded)
        assert_identical(expanded.clone(), before, "targets")


def strides(shape, memory_format):
    return torch.empty(shape, memory_format=memory_format).stride()


@over_engines
@pytest.mark.parametrize("x_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("weight_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_line_23_convolution_is_channels_last_if_either_is(weight_format, x_format, engine):
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=x_format)
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=weight_format)
    expected = CHANNELS_LAST if CHANNELS_LAST in (x_format, weight_format) else CONTIGUOUS
    with use_engine(engine):
        result = functional.conv_bn_act(x, weight)
    assert result.stride() == strides((2, 4, 4, 3), expected) == F.conv2d(x, weight).stride()


@over_engines
@pytest.mark.parametrize("op", ["bn_act", "eltwise_act"])
@pytest.mark.parametrize("first", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("second", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_line_23_add_takes_the_first_operands_format(second, first, op, engine):
    a = torch.randn(2, 3, 6, 5).contiguous(memory_format=first)
    b = torch.randn(2, 3, 6, 5).contiguous(memory_format=second)
    with use_engine(engine):
        result = functional.add_act(a, b) if op != "bn_act" else functional.bn_act(a, *vectors(), b)
    assert result.stride() == strides(a.shape, first) == (a + b).stride()


@over_engines
def test_line_23_convolution_of_one_channel_stays_channels_last(engine):
    x, weight = channels_last(torch.randn(2, 1, 6, 5)), torch.randn(4, 1, 3, 3)
    with use_engine(engine):
        result = functional.conv_bn_act(x, weight)
    assert result.stride() == strides((2, 4, 4, 3), CHANNELS_LAST)


@over_engines
def test_line_23_convolution_of_1x1_images_keeps_its_strides(engine):
    x, weight = channels_last(torch.randn(2, 3, 1, 1)), torch.randn(4, 3, 1, 1)
    with use_engine(engine):
        assert functional.conv_bn_act(x, weight).stride() == (4, 1, 4, 4)


@over_module_engines
@over_modules
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_line_23_modules(layout, size, unit, engine):
    alike(unit, LAYOUTS[layout](image(2, *size)), engine=engine)


@over_module_engines
@over_modules
def test_line_24_three_dimensions(unit, engine):
    """A convolution takes an unbatched image, BatchNorm2d does not."""
    error = alike(unit, image()[0], engine=engine)
    assert isinstance(error, ValueError)
    assert "expected 4D input (got 3D input)" in str(error)


@over_engines
@pytest.mark.parametrize("residual", [False, True])
def test_line_24_unbatched_convolution(residual, engine):
    x, weight = torch.randn(3, 6, 5), torch.randn(4, 3, 3, 3)
    scale, shift = vectors(4)
    other = torch.randn(4, 4, 3) if residual else None
    with use_engine(engine):
        result = functional.conv_bn_act(x, weight, scale, shift, other)
        batched = None if other is None else other[None]
        expected = functional.conv_bn_act(x[None], weight, scale, shift, batched)
    assert_identical(result, expected[0])


@over_module_engines
@over_modules
def test_line_24_channels_that_do_not_fit(unit, engine):
    x = torch.randn(2, CHANNELS - 1, 5, 4)
    error = alike(unit, x, engine=engine)
    assert isinstance(error, RuntimeError)
    assert str(CHANNELS) in str(error)
    assert str(CHANNELS - 1) in str(error)


@over_module_engines
@over_modules
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_line_24_statistics_of_another_length(which, unit, engine):
    def change(m):
        bn = batch_norms(m)[0]
        setattr(bn, which, getattr(bn, which)[1:].clone())

    error = alike(unit, image(), change, engine)
    assert isinstance(error, RuntimeError)
    assert which in str(error)


@over_module_engines
@over_modules
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_line_24_evaluation_without_one_of_the_statistics(which, unit, engine):
    error = alike(unit, image(), lambda m: setattr(batch_norms(m)[0], which, None), engine)
    assert isinstance(error, RuntimeError)
    assert f"{which} must be defined in evaluation mode" in str(error)


@over_modules
def test_line_25_checkpoint_without_num_batches_tracked(unit):
    m = build(unit)
    state = m.state_dict()
    plain = {k: v.clone() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    fresh = UNITS[unit].build().eval()
    fresh.load_state_dict(plain, strict=True)
    x = image()
    assert_identical(fresh(x), m(x))
    for key in set(state) - set(plain):
        del state[key]
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        UNITS[unit].build().load_state_dict(state)


@over_modules
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_also_statistics_that_require_grad(which, unit):
    def change(m):
        getattr(batch_norms(m)[0], which).requires_grad_()

    with torch.enable_grad():
        assert isinstance(alike(unit, image(), change), RuntimeError)


@over_module_engines
@over_modules
def test_also_device_mismatch(unit, engine):
    assert isinstance(alike(unit, image().to("meta"), engine=engine), RuntimeError)


@over_modules
def test_also_a_module_on_meta(unit):
    """Shapes can be computed without data, as torch computes them."""
    m = build(unit).to("meta")
    x = channels_last(image()).to("meta")
    expected = UNITS[unit].plain(copy.deepcopy(m), x)
    result = m(x)
    assert result.device.type == "meta"
    assert (result.shape, result.stride()) == (expected.shape, expected.stride())


def test_also_padding_same_with_a_stride():
    with pytest.raises(ValueError, match="same"):
        ConvBNAct2d(3, 4, 3, stride=2, padding="same")


@over_module_engines
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_also_padding_by_name(padding, engine):
    m = ConvBNAct2d(CHANNELS, 4, 3, padding=padding).eval()
    x = image()
    with use_engine(engine):
        judge([m(x)], [F.relu(m.bn(m.conv(x)))], [F.relu(m.bn(m.conv(x)))])


@over_engines
@over_dtypes
def test_also_misaligned_storage(dtype, engine):
    x, weight = (
        misaligned(torch.randn(2, 3, 5, 5).to(dtype)),
        misaligned(torch.randn(4, 3, 3, 3).to(dtype)),
    )
    scale, shift = (misaligned(v) for v in vectors(4, dtype))
    assert dtype == torch.float64 or x.data_ptr() % 16 in (2, 4)
    with use_engine(engine):
        result = functional.conv_bn_act(x, weight, scale, shift)
        aligned = functional.conv_bn_act(*(t.clone() for t in (x, weight, scale, shift)))
    assert_identical(result, aligned)


@over_engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_also_negative_bit(dtype, engine):
    image = torch.complex(*torch.randn(2, 2, 3, 5, 5, dtype=dtype)).conj().imag
    assert image.is_neg()
    scale, shift = vectors(dtype=dtype)
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    with use_engine(engine):
        for f in (
            lambda x: functional.bn_act(x, scale, shift, x, "relu"),
            lambda x: functional.bn_act_maxpool(x, scale, shift, 3),
            lambda x: functional.eltwise_act([x, x], "prod"),
            lambda x: functional.conv_bn_act(x, weight),
        ):
            assert_identical(f(image), f(image.resolve_neg().contiguous()))


class Tagged(Tensor):
    """A subclass in the manner of torch's documentation."""


@over_engines
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act", "bn_act_maxpool", "eltwise_act"])
def test_also_tensor_subclass_stays_what_it_is(op, engine):
    x, (scale, shift) = torch.randn(2, 3, 5, 5).as_subclass(Tagged), vectors()
    call = {
        "conv_bn_act": lambda x: functional.conv_bn_act(x, torch.randn(3, 3, 1, 1), scale, shift),
        "bn_act": lambda x: functional.bn_act(x, scale, shift),
        "bn_act_maxpool": lambda x: functional.bn_act_maxpool(x, scale, shift, 3),
        "eltwise_act": lambda x: functional.add_act(x, x),
    }[op]
    with use_engine(engine):
        assert type(call(x)) is Tagged


def test_also_raw_ops_refuse_a_gradient():
    ops, x = torch.ops.fused_resnet, torch.randn(2, 3, 5, 5, requires_grad=True)
    (scale, shift), weight = vectors(), torch.randn(4, 3, 3, 3)
    calls = {
        "eltwise_act": lambda: ops.eltwise_act([scale, x], "sum", None, "relu"),
        "bn_scale_shift": lambda: ops.bn_scale_shift(x[0, 0, 0], scale, None, None, 1e-5),
        "bn_act": lambda: ops.bn_act(x, scale, shift, None, "relu"),
        "bn_act_": lambda: ops.bn_act_(x * 1, scale, shift, None, "relu"),
        "bn_act_maxpool": lambda: ops.bn_act_maxpool(x, scale, shift, *[[3, 3]] * 4, False, "none"),
        "conv_pack": lambda: ops.conv_pack(x, 1),
        "conv_bn_act": lambda: ops.conv_bn_act(
            x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none"
        ),
    }
    for name, call in calls.items():
        with (
            torch.enable_grad(),
            pytest.raises(RuntimeError, match=rf"{name}: .*fused_resnet.functional"),
        ):
            call()


@over_module_engines
@over_modules
@pytest.mark.parametrize("batch", [1, 3])
def test_also_vmap_in_evaluation(batch, unit, engine):
    """Over images, as torch.func has it: the results of one call after another."""
    m, x = build(unit), torch.randn(batch, 2, CHANNELS, 5, 4)
    with use_engine(engine):
        result = torch.func.vmap(m)(x)
    exact = copy.deepcopy(m).double()
    plain = UNITS[unit].plain
    judge(
        list(result),
        [plain(copy.deepcopy(m), one) for one in x],
        [plain(exact, one.double()) for one in x],
    )
