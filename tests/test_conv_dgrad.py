"""conv_dgrad: the gradient of a convolution's input, plus what else comes to it."""

import math

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    TILE,
    Source,
    assert_identical,
    at_threads,
    bits,
    channels_last,
    copied,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    placed,
    shadow,
    verify,
)
from conv_cases import CASES, SOME, Conv, convolutions
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines, reference

OP = torch.ops.fused_resnet.conv_dgrad.default
IN_PLACE = torch.ops.fused_resnet.conv_dgrad_.default
#: Of which a phase of three images with 64 channels just exceeds what is computed at a time.
_SLICED = 2 * (math.isqrt(TILE["kPhaseBytes"][0] // (3 * 64 * 4)) + 1)
#: Input that no window reads, kernels smaller than their stride, padding larger than the kernel.
GAPS = [
    Conv(2, (5, 9), (8, 6), kernel=(3, 3), stride=(2, 2), padding=(0, 0)),
    Conv(2, (5, 9), (11, 9), kernel=(2, 3), stride=(4, 5), padding=(1, 0)),
    Conv(2, (32, 70), (6, 7), kernel=(1, 1), stride=(1, 1), padding=(2, 3)),
    Conv(2, (5, 9), (3, 2), kernel=(2, 2), padding=(3, 4)),
    Conv(1, (33, 40), (3, 2), kernel=(3, 3), padding=(5, 6)),
    Conv(1, (64, 64), (7, 9), kernel=(3, 3), stride=(2, 3), padding=(4, 7), dilation=(2, 3)),
    Conv(1, (40, 33), (14, 15), stride=(2, 2)),
    Conv(1, (40, 33), (9, 9), dilation=(2, 4), stride=(4, 6), padding=(2, 4)),
    Conv(3, (64, 3), (_SLICED, _SLICED), (1, 1), (2, 2), (0, 0)),  # of two slices of images
]
over_cases = pytest.mark.parametrize("case", sorted({*CASES, *GAPS}, key=str), ids=str)
over_some = pytest.mark.parametrize("case", [*SOME, *GAPS[:2]], ids=str)


def inputs(case, seed, dtype, added=True):
    source = Source(seed, dtype)
    fan_out = case.channels[1] // case.groups * case.kernel[0] * case.kernel[1]
    weight = source.normal(case.channels[1], case.channels[0] // case.groups, *case.kernel)
    return {
        "grad": source.normal(case.batch, case.channels[1], *case.out_size),
        "weight": weight / fan_out**0.5,
        "added": source.normal(case.batch, case.channels[0], *case.size) if added else None,
        "input_size": list(case.size),
        "stride": list(case.stride),
        "padding": list(case.padding),
        "dilation": list(case.dilation),
        "groups": case.groups,
    }


def ours(**given):
    return engines.implementation("conv_dgrad", engines.wish())(**given)


def eager(grad, weight, added, input_size, stride, padding, dilation, groups):
    x = grad.new_empty(grad.size(0), weight.size(1) * groups, *input_size)
    layout = reference.memory_format(grad, weight)
    dx = torch.ops.aten.convolution_backward(
        grad,
        x.contiguous(memory_format=layout),
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0].contiguous(memory_format=layout)
    return dx if added is None else dx + added


@over_backends("conv_dgrad", isa=True)
@over_dtypes
@over_cases
def test_cases(case, dtype, backend):
    verify(backend, ours, eager, lambda seed: of_tensors(channels_last, inputs(case, seed, dtype)))


@over_backends("conv_dgrad", emulated=False)
@over_dtypes
@over_some
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["grad", "weight", "added"])
def test_layouts(which, layout, case, dtype, backend):
    def make(seed):
        made = inputs(case, seed, dtype)
        return {**made, which: LAYOUTS[layout](made[which])}

    verify(backend, ours, eager, make)


@over_backends("conv_dgrad")
@over_dtypes
@over_some
def test_without_added(case, dtype, backend):
    def make(seed):
        return of_tensors(channels_last, inputs(case, seed, dtype, added=False))

    verify(backend, ours, eager, make)


@over_backends("conv_dgrad")
@over_some
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite(value, case, backend):
    """Reaches the input pixels that its window reads, and no others."""
    made = inputs(case, 0, torch.float32)
    made["grad"][0, -1, -1, 0] = value
    made["added"][0, 0, 0, -1] = value
    result = engines.implementation("conv_dgrad", backend.engine)(**backend.move(made)).cpu()
    marks = {name: (~made[name].isfinite()).float() for name in ("grad", "added")}
    reached = eager(**{**made, **marks, "weight": torch.ones_like(made["weight"])}) > 0
    assert torch.equal(~result.isfinite(), reached)


@over_dtypes
@pytest.mark.parametrize("case", [*SOME, *GAPS], ids=str)
def test_is_the_same_for_any_number_of_threads(case, dtype):
    args = tuple(of_tensors(channels_last, inputs(case, 0, dtype)).values())
    result = OP(*args)
    for threads in (1, 2, 3):
        assert_identical(at_threads(threads, OP, *args), result)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad", torch.ones(2, 9, 6), "grad must have 4 dimensions"),
        ("grad", torch.ones(2, 9, 6, 6), r"grad must have shape \[2, 9, 6, 7\], got"),
        ("grad", torch.ones(2, 9, 6, 7).int(), "grad must be float"),
        ("weight", torch.ones(9, 5, 3), "weight must have 4 dimensions"),
        ("weight", torch.ones(9, 5, 3, 3).half(), "weight must be"),
        ("weight", torch.ones(9, 0, 3, 3), "weight must have no dimension of size zero"),
        ("added", torch.ones(2, 5, 6, 6), r"added must have shape \[2, 5, 6, 7\], got"),
        ("added", torch.ones(2, 5, 6, 7).double(), "added must be"),
        ("input_size", [6], "input_size must"),
        ("input_size", [-1, 7], "input_size must"),
        ("stride", [0, 1], "stride must"),
        ("padding", [-1, 0], "padding must"),
        ("dilation", [1, 0], "dilation must"),
        ("dilation", [9, 9], "kernel .* is larger than the padded input"),
        ("groups", 2, "groups must be positive and divide the output channels 9, got 2"),
    ],
)
@pytest.mark.parametrize("op", [OP, IN_PLACE], ids=["out_of_place", "in_place"])
def test_bad_input(op, name, value, words):
    made = {**inputs(Conv(), 0, torch.float32), name: value}
    with pytest.raises((RuntimeError, NotImplementedError), match=f"conv_dgrad_?: {words}"):
        op(*made.values())


@over_layouts
@over_some
def test_opcheck(case, layout):
    for added in (True, False):
        made = of_tensors(LAYOUTS[layout], inputs(case, 0, torch.float32, added))
        torch.library.opcheck(OP, tuple(made.values()))
        if added:
            torch.library.opcheck(IN_PLACE, tuple(made.values()))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    case=convolutions(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    added=st.booleans(),
    seed=st.integers(0, 9),
)
def test_fuzz(case, dtype, layouts, added, seed):
    made = inputs(case, seed, dtype, added)
    for name, layout in zip(("grad", "weight", "added"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    result = OP(*made.values())
    exact = of_tensors(torch.Tensor.double, made)
    steps = case.channels[1] // case.groups * case.kernel[0] * case.kernel[1] + 4
    within_rounding(result, eager(**exact), eager(**of_tensors(torch.abs, exact)), steps)
    assert placed(result) == placed(OP(*shadow(tuple(made.values()))))
    if added and layouts[2] != "expanded":
        args = list(made.values())
        args[2] = copied(made["added"])
        assert IN_PLACE(*args) is None
        assert torch.equal(bits(args[2]), bits(result))


@over_some
def test_vendor_in_place(case):
    made = inputs(case, 0, torch.float32)
    result = engines.implementation("conv_dgrad", "vendor")(**made)
    engines.implementation("conv_dgrad_", "vendor")(**made)
    assert torch.equal(made["added"], result)
