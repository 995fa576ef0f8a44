"""conv_bn_act: ``act(bn(conv(x)) + residual)``."""

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    assert_identical,
    channels_last,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    per_channel,
    placed,
    shadow,
    torch_act,
    verify,
)
from conv_cases import CASES, SOME, convolutions, eager, ours, raw_arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding
from torch.nn import functional as F

import fused_resnet
from fused_resnet import functional

OP = torch.ops.fused_resnet.conv_bn_act.default
PACK = torch.ops.fused_resnet.conv_pack.default
over_some = pytest.mark.parametrize("case", SOME, ids=str)


@over_backends("conv_bn_act", isa=True)
@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype, backend):
    verify(backend, ours, eager, lambda seed: of_tensors(channels_last, case.inputs(seed, dtype)))


@over_backends("conv_bn_act")
@over_dtypes
@pytest.mark.parametrize("case", SOME[:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, case, dtype, backend):
    """Of the input, with a contiguous weight and a contiguous residual."""

    def inputs(seed):
        made = case.inputs(seed, dtype)
        return {**made, "x": LAYOUTS[layout](made["x"])}

    verify(backend, ours, eager, inputs)


@over_backends("conv_bn_act")
@pytest.mark.parametrize("case", SOME[1:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["weight", "residual", "bn"])
def test_layouts_of_the_rest(which, layout, case, backend):
    def inputs(seed):
        made = case.inputs(seed, torch.float32)
        return {**made, which: of_tensors(LAYOUTS[layout], made[which])}

    verify(backend, ours, eager, inputs)


@over_backends("conv_bn_act")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(
    "present",
    list(itertools.product([False, True], repeat=3)),
    ids=lambda p: "".join(map(str, map(int, p))),
)
def test_epilogues(present, act, dtype, backend):
    """Every choice of scale, shift and residual."""
    case = SOME[1]

    def inputs(seed):
        made = case.inputs(seed, dtype, residual=present[2])
        bn = made.pop("bn")
        return {**made, "scale": bn["gamma"], "shift": bn["beta"]}

    def chosen(x, weight, scale, shift, residual, geometry):
        scale, shift = scale if present[0] else None, shift if present[1] else None
        return functional.conv_bn_act(x, weight, scale, shift, residual, act=act, **geometry)

    def composite(x, weight, scale, shift, residual, geometry):
        y = F.conv2d(x, weight, None, **geometry)
        if present[0]:
            y = y * per_channel(scale.to(y.dtype))
        if present[1]:
            y = y + per_channel(shift.to(y.dtype))
        return torch_act(y if residual is None else y + residual, act)

    verify(backend, chosen, composite, inputs)


@over_backends("conv_bn_act")
@over_some
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, case, backend):
    """The convolution in the lower type, whatever the engine, as torch has it."""

    def under_autocast(f):
        def call(**given):
            with torch.autocast(backend.device, dtype):
                return f(**given)

        return call

    def inputs(seed):
        return case.inputs(seed, torch.float32, residual=False)

    verify(backend, under_autocast(ours), under_autocast(eager), inputs)


@over_backends("conv_bn_act", isa=True)
@pytest.mark.parametrize("case", [case for case in CASES if case.groups > 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(value, dtype, case, backend):
    made = of_tensors(channels_last, case.inputs(0, dtype))
    made["x"][-1, -1, -1, 0] = value  # a corner, of the last group
    with fused_resnet.use_engine(backend.engine):
        result = ours(**backend.move(made)).cpu()
    marks = {"x": (~made["x"].isfinite()).float(), "weight": torch.ones(made["weight"].shape)}
    reached = F.conv2d(**marks, **case.geometry) > 0
    # relu alone makes an infinity finite.
    assert torch.equal(~result.isfinite(), reached & ~(result == 0))
    assert value != torch.inf or not result.isnan().any()


@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weight_gives_the_same_bits(case, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        args = raw_arguments(**of_tensors(channels_last, case.inputs(0, dtype)))
        weight = args[1].contiguous(memory_format=layout)
        packed = PACK(weight, case.groups)
        plain = (args[0], weight, *args[2:])
        assert_identical(OP(*plain, packed), OP(*plain))


@over_layouts
@over_some
def test_opcheck(case, layout):
    args = raw_arguments(**of_tensors(LAYOUTS[layout], case.inputs(0, torch.float32)))
    torch.library.opcheck(OP, args)
    torch.library.opcheck(OP, (args[0], args[1], None, None, None, *args[5:]))


def test_opcheck_pack():
    """Its fake kernel refuses, so only what does not trace is checked."""
    weight = SOME[0].inputs(0, torch.float32)["weight"]
    torch.library.opcheck(
        PACK, (weight, 1), test_utils=("test_schema", "test_autograd_registration")
    )
    with pytest.raises(NotImplementedError, match="conv_pack: weights cannot be packed inside"):
        PACK(shadow(weight), 1)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    case=convolutions(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    has_bn=st.booleans(),
    has_residual=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(case, dtype, layouts, has_bn, has_residual, act, seed):
    made = case.inputs(seed, dtype, residual=has_residual)
    if not has_bn:
        made["bn"] = None
    for name, layout in zip(("x", "weight", "residual"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    args = raw_arguments(**made, act=act)
    result = OP(*args)

    def exact(x, weight, scale, shift, residual):
        y = F.conv2d(x, weight, None, **case.geometry)
        y = y if scale is None else y * per_channel(scale) + per_channel(shift)
        return y if residual is None else y + residual

    tensors = of_tensors(torch.Tensor.double, args[:5])
    steps = made["weight"][0].numel() + 4
    within_rounding(
        result, torch_act(exact(*tensors), act), exact(*of_tensors(torch.abs, tensors)), steps
    )
    fake = OP(*shadow(args))
    assert placed(fake) == placed(result)
    if dtype not in HALF:  # torch 2.11 crashes in some grouped convolutions of half types
        assert placed(result) == placed(eager(**made, act=act))
