"""conv_int8: ``act(conv(x) * scale + shift + residual * factor)`` of bytes, exact up to there."""

import itertools

import pytest
import torch
from cases import assert_identical, at_threads, channels_last, over_backends, placed, shadow
from conv_cases import CASES, SOME, Conv, convolutions
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import UNIT
from torch.nn import functional as F

from fused_resnet import engines, reference_int8

OP = torch.ops.fused_resnet.conv_int8.default
PACK = torch.ops.fused_resnet.conv_int8_pack.default
NATIVE = engines.implementation("conv_int8", "native")
over_engines = over_backends("conv_int8", isa=True)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t if t.dim() < 2 else t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand(t.shape),
}


def arguments(case, seed, residual="bytes", act="relu", out_zero=0, x_zero=0):
    """Of a convolution whose results reach over the bytes and somewhat beyond."""
    g = torch.Generator().manual_seed(seed)
    fan_in = case.channels[0] // case.groups
    terms = fan_in * case.kernel[0] * case.kernel[1]

    def integers(least, most, *shape):
        return torch.randint(least, most + 1, shape, generator=g)

    x = integers(0, 255, case.batch, case.channels[0], *case.size).to(torch.uint8)
    weight = integers(-128, 127, case.channels[1], fan_in, *case.kernel).to(torch.int8)
    scale = (torch.rand(case.channels[1], generator=g) + 0.5) / (110 * terms**0.5)
    shift = 100 * torch.rand(case.channels[1], generator=g)
    shape = (case.batch, case.channels[1], *case.out_size)
    added = {
        "none": lambda: None,
        "bytes": lambda: integers(0, 255, *shape).to(torch.uint8),
        "floats": lambda: torch.randn(shape, generator=g) * 100,
    }[residual]()
    pairs = [list(case.geometry[name]) for name in ("stride", "padding", "dilation")]
    tensors = (channels_last(x), x_zero, weight, scale, shift)
    added = None if added is None else channels_last(added)
    return (*tensors, added, 0.37, *pairs, case.groups, act, out_zero)


def check(result, args):
    """Within the roundings there are of what float64 makes of the same numbers.

    The padding holds x's zero: where that is taken off beforehand it is a zero of the convolution.
    """
    x, x_zero, weight, scale, shift, residual, factor, *geometry, act, out_zero = args
    offset = x_zero * weight.double().sum((1, 2, 3))
    sums = F.conv2d(x.double() - x_zero, weight.double(), None, *geometry)
    sums += offset.view(1, -1, 1, 1)
    terms = [sums * scale.double().view(1, -1, 1, 1), shift.double().view(1, -1, 1, 1)]
    if residual is not None:
        terms.append(residual.double() * factor)
    exact, magnitude = sum(terms), sum(t.abs() for t in terms)
    exact = exact.relu() if act == "relu" else exact
    bound = 6 * UNIT[torch.float32] * magnitude
    if out_zero is not None:
        exact, bound = (exact + out_zero).clamp(0, 255), bound + 0.5
        assert result.dtype == torch.uint8
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= bound).all()


@over_engines
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("x_zero", "out_zero"), [(0, 0), (131, 90), (0, None)])
def test_cases(case, x_zero, out_zero, backend):
    """The native engine's bits are those of the specification, with any number of threads."""
    act = "none" if out_zero else "relu"
    args = arguments(case, 0, act=act, out_zero=out_zero, x_zero=x_zero)
    implementation = engines.implementation("conv_int8", backend.engine)
    result = implementation(*backend.move(args)).cpu()
    check(result, args)
    if backend == ("cpu", "native"):
        assert_identical(result, reference_int8.conv_int8(*args), "native and reference")
        assert_identical(at_threads(1, implementation, *args), result, "one thread and two")


@over_engines
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize(
    ("residual", "act", "out_zero", "x_zero"),
    [*itertools.product(("none", "bytes", "floats"), ("none", "relu"), (None, 0, 77, 255), (0, 9))],
)
def test_epilogues(residual, act, out_zero, x_zero, case, backend):
    args = arguments(case, 1, residual, act, out_zero, x_zero)
    result = engines.implementation("conv_int8", backend.engine)(*backend.move(args)).cpu()
    check(result, args)
    assert_identical(result, reference_int8.conv_int8(*args))


@over_engines
@pytest.mark.parametrize("depth", [3, 64, 517])
def test_sums_do_not_saturate(depth, backend):
    """The largest and the least there are: pairs of these products are beyond 16 bits."""
    case = Conv(1, (depth, 40), (5, 6))
    x, _, weight, scale, shift, *rest = arguments(case, 0, "none", "none", None)
    x.fill_(255)
    weight[::2], weight[1::2] = 127, -128
    args = (x, 0, weight, torch.ones_like(scale), torch.zeros_like(shift), *rest)
    result = engines.implementation("conv_int8", backend.engine)(*backend.move(args)).cpu()
    sums = F.conv2d(x.double(), weight.double(), None, *rest[2:6])
    assert torch.equal(result, sums.float())


@over_engines
def test_rounding(backend):
    """Halves go to even numbers, what is beyond the bytes to their ends, NaN to the least."""
    values = [0.5, 1.5, 2.5, 254.5, 255.5, 1e30, torch.inf, -0.5, -3.0, -torch.inf, torch.nan]
    expected = [0, 2, 2, 254, 255, 255, 255, 0, 0, 0, 0]
    x = torch.zeros(1, 4, 1, 1, dtype=torch.uint8)
    weight = torch.zeros(len(values), 4, 1, 1, dtype=torch.int8)
    shift = torch.tensor(values)
    for act, zero in itertools.product(("none", "relu"), (0, 3)):
        args = (x, 0, weight, torch.ones_like(shift), shift, None, 1.0, [1, 1], [0, 0], [1, 1], 1)
        conv = engines.implementation("conv_int8", backend.engine)
        found = conv(*backend.move((*args, act, zero))).flatten().tolist()
        if zero == 0:
            assert found == expected
        else:
            assert found[0] == zero
            assert found[-1] == found[-2] == (zero if act == "relu" else 0)
        real = conv(*backend.move((*args, act, None))).flatten().cpu()
        assert torch.equal(real, shift.relu() if act == "relu" else shift) or real[-1].isnan()
        assert torch.equal(real[:-1], (shift.relu() if act == "relu" else shift)[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 2, 3, 5])
def test_layouts(which, layout):
    """Of the input, the weight, the scale and the residual."""
    args = list(arguments(SOME[1], 2, x_zero=3))
    args[which] = LAYOUTS[layout](args[which])
    before = args[which].clone()
    result = OP(*args)
    assert_identical(result, reference_int8.conv_int8(*args))
    assert placed(OP(*shadow(args))) == placed(result)
    assert torch.equal(args[which], before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weight_gives_the_same_bits(case):
    args = arguments(case, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = args[2].contiguous(memory_format=layout)
        assert_identical(OP(*args, PACK(weight, case.groups)), OP(*args))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_opcheck(case, layout):
    args = arguments(case, 0)
    torch.library.opcheck(OP, (LAYOUTS[layout](args[0]), *args[1:]))
    torch.library.opcheck(OP, arguments(case, 0, "none", "none", None))


def test_opcheck_pack():
    """Its fake kernel refuses, so only what does not trace is checked."""
    weight = arguments(SOME[0], 0)[2]
    torch.library.opcheck(
        PACK, (weight, 1), test_utils=("test_schema", "test_autograd_registration")
    )
    with pytest.raises(NotImplementedError, match="conv_int8_pack: weights cannot be packed"):
        PACK(shadow(weight), 1)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    case=convolutions(),
    residual=st.sampled_from(["none", "bytes", "floats"]),
    act=st.sampled_from(["none", "relu"]),
    out_zero=st.none() | st.integers(0, 255),
    x_zero=st.integers(0, 255),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    seed=st.integers(0, 9),
)
def test_fuzz(case, residual, act, out_zero, x_zero, layouts, seed):
    args = list(arguments(case, seed, residual, act, out_zero, x_zero))
    for which, layout in zip((0, 2), layouts, strict=True):
        args[which] = LAYOUTS[layout](args[which])
    result = OP(*args)
    assert_identical(result, reference_int8.conv_int8(*args))
    check(result, args)
    assert placed(OP(*shadow(args))) == placed(result)


ONES = torch.ones(9)
BAD = [
    (0, torch.zeros(5, 6, 7, dtype=torch.uint8), "x must have 4 dimensions, got 3"),
    (0, torch.zeros(2, 5, 6, 7), "x must be uint8, got float32"),
    (0, torch.zeros(2, 4, 6, 7, dtype=torch.uint8), "x must have 5 channels.*got 4"),
    (1, 256, "x_zero must be from 0 to 255, got 256"),
    (2, torch.zeros(9, 5, 3, 3), "weight must be int8, got float32"),
    (2, torch.zeros(9, 5, 3, dtype=torch.int8), "weight must have 4 dimensions, got 3"),
    (2, torch.zeros(9, 5, 115, 115, dtype=torch.int8), "weight must have at most 65793 values"),
    (3, ONES[1:], r"scale must have shape \[9\], got \[8\]"),
    (4, ONES.double(), "shift must be float32, got float64"),
    (5, torch.zeros(2, 9, 6, 7, dtype=torch.int8), "residual must be uint8 or float32, got int8"),
    (5, torch.zeros(2, 9, 6, 6, dtype=torch.uint8), "residual must have shape"),
    (7, [0, 1], "stride must be two integers of at least 1, got"),
    (8, [0], "padding must be two integers of at least 0, got"),
    (9, [9, 1], "kernel .* is larger than the padded input"),
    (10, 2, "groups must be positive and divide the output channels 9, got 2"),
    (11, "gelu", 'act must be "none" or "relu", got "gelu"'),
    (12, -1, "out_zero must be from 0 to 255, got -1"),
    (13, torch.zeros(7, dtype=torch.uint8), "packed must have shape"),
]


@pytest.mark.parametrize(("index", "instead", "words"), BAD)
def test_bad_input(index, instead, words):
    args = [*arguments(SOME[1], 0), None]
    args[index] = instead
    with pytest.raises(RuntimeError, match=f"conv_int8: {words}"):
        NATIVE(*args)


def test_bad_input_pack():
    with pytest.raises(RuntimeError, match="conv_int8_pack: weight must be int8, got float32"):
        PACK(torch.zeros(9, 5, 3, 3), 1)


def test_other_engines_and_devices_have_none():
    for engine, device in (("triton", "cpu"), ("native", "cuda"), ("vendor", "cuda")):
        assert engines.why_not(engine, "conv_int8", device, torch.float32) is not None
    with pytest.raises(NotImplementedError):
        torch.ops.fused_resnet_triton.conv_int8(*arguments(SOME[1], 0))


def test_no_gradients():
    args = list(arguments(SOME[1], 0))
    args[3].requires_grad_()
    with pytest.raises(RuntimeError, match="a raw op has no backward"):
        OP(*args)
