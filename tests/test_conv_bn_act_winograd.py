"""conv_bn_act_winograd: ``act(bn(conv(x)) + residual)`` of a 3x3 kernel by fewer products."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from cases import (
    LAYOUTS,
    PANELS,
    ROOT,
    ROWS,
    around,
    assert_identical,
    channels_last,
    of_tensors,
    over_backends,
    over_layouts,
    per_channel,
    placed,
    shadow,
    torch_act,
)
from conv_cases import Conv, raw_arguments
from conv_cases import eager as in_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import judge, within_rounding
from torch.nn import functional as F

from fused_resnet import engines, winograd

NAME = "conv_bn_act_winograd"
OP = torch.ops.fused_resnet.conv_bn_act_winograd.default
PACK = torch.ops.fused_resnet.conv_winograd_pack.default
DIRECT = torch.ops.fused_resnet.conv_bn_act.default

SIZES = [*itertools.product(range(1, 10), (1, 4, 5, 9)), *((n, n) for n in (13, 14, 28))]
CASES = [
    *(Conv(1 + (h + w) % 3, (5, 9), (h, w)) for h, w in SIZES),
    *(Conv(2, (5, 9), size, padding=(0, 0)) for size in SIZES if min(size) > 2),
    Conv(1, (5, 9), (6, 7), padding=(0, 1)),
    Conv(1, (5, 9), (4, 3), padding=(7, 5)),  # whole tiles in the padding
    *(Conv(1, (6, width), (5, 6)) for width in around(*PANELS)),
    *(Conv(1, (depth, 9), (5, 6)) for depth in around(16)),
    # As many tiles as rows of a register tile, of those of two outputs.
    *(Conv(1, (17, 9), (2, 2 * rows)) for rows in around(*ROWS, (ROWS[-1] + 2) // 2)),
    Conv(1, (270, 40), (9, 8)),  # more than one sum in registers
    Conv(2, (130, 70), (40, 41)),  # several blocks of tiles
    Conv(0),
]
SOME = [Conv(2, (16, 32), (7, 8)), Conv(2, (5, 9), (6, 7)), Conv(3, (33, 40), (9, 5))]
over_tiles = pytest.mark.parametrize("tile", [2, 4])
over_some = pytest.mark.parametrize("case", SOME, ids=str)


def arguments(tile, **given):
    """As the op's schema has them."""
    x, weight, scale, shift, residual, _, padding, _, _, act = raw_arguments(**given)
    return x, weight, scale, shift, residual, padding, tile, act


def exact(x, weight, scale, shift, residual, padding, tile, act):
    y = F.conv2d(x, weight, None, padding=padding)
    y = y if scale is None else y * per_channel(scale) + per_channel(shift)
    return torch_act(y if residual is None else y + residual, act)


def magnitude(x, weight, scale, shift, residual, padding, tile, act):
    """What the op adds up, every term of it replaced by its absolute value."""
    a, g, b = (m.abs() for m in winograd.matrices(tile))
    (top, left), (rows, columns) = padding, x.shape[2:]
    height, width = rows + 2 * top - 2, columns + 2 * left - 2
    x = F.pad(x.abs(), (left, left + -width % tile, top, top + -height % tile))
    tiles = x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
    v = torch.einsum("ik,jl,nchwij->nchwkl", b, b, tiles)
    u = torch.einsum("kp,lq,ocpq->ockl", g, g, weight.abs())
    y = torch.einsum("ki,lj,ockl,nchwkl->nohiwj", a, a, u, v).flatten(4).flatten(2, 3)
    y = y[:, :, :height, :width]
    y = y if scale is None else y * per_channel(scale.abs()) + per_channel(shift.abs())
    return y if residual is None else y + residual.abs()


def check(result, args):
    """Within what rounding explains: a term goes through two transforms, twice two additions and
    multiplications each way, the sum over channels, and the epilogue."""
    double = of_tensors(torch.Tensor.double, args)
    steps = args[0].size(1) + 2 * 4 * 2 + 1 + 2 * 4 * 2 + 4
    within_rounding(result, exact(*double), magnitude(*double), steps)


def run(backend, args):
    result = engines.implementation(NAME, backend.engine)(*backend.move(args))
    assert result.device.type == backend.device
    return result.cpu()


@over_backends(NAME, isa=True)
@over_tiles
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, tile, backend):
    args = arguments(tile, **of_tensors(channels_last, case.inputs(0, torch.float32)))
    check(run(backend, args), args)


@over_backends(NAME)
@over_tiles
@pytest.mark.parametrize("case", [*SOME, Conv(2, (64, 40), (14, 14))], ids=str)
def test_errors_are_as_much_larger_as_foretold(case, tile, backend):
    """Than eager torch's."""
    found = []
    for seed in range(3):
        given = of_tensors(channels_last, case.inputs(seed, torch.float32))
        args = arguments(tile, **given)
        truth = exact(*of_tensors(torch.Tensor.double, args))
        found.append((run(backend, args), in_steps(**given), truth))
    judge(*zip(*found, strict=True), times=winograd.amplification(tile))


@over_backends(NAME)
@over_tiles
@over_some
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "residual", "bn"])
def test_layouts(which, layout, case, tile, backend):
    made = case.inputs(0, torch.float32)
    made[which] = of_tensors(LAYOUTS[layout], made[which])
    args = arguments(tile, **made)
    result = run(backend, args)
    check(result, args)
    assert placed(result) == placed(in_steps(**made))


@over_backends(NAME)
@over_tiles
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=3)), ids=str)
def test_epilogues(present, act, tile, backend):
    """Every choice of scale, shift and residual."""
    args = list(arguments(tile, **SOME[1].inputs(0, torch.float32), act=act))
    args[2:5] = [t if there else None for t, there in zip(args[2:5], present, strict=True)]
    result = run(backend, args)
    ones, zeros = torch.ones(9), torch.zeros(9)
    args[2] = ones if args[2] is None else args[2]
    args[3] = zeros if args[3] is None else args[3]
    check(result, args)


def read_by(at, size, padding, tile):
    """Which of ``size`` outputs are in a tile that reads the input at ``at``, in one dimension."""
    first = torch.arange(size + 2 * padding - 2) // tile * tile
    return (first <= at + padding) & (at + padding < first + tile + 2)


@over_backends(NAME, isa=True)
@over_tiles
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
def test_what_is_not_finite_is_never_lost(padding, value, tile, backend):
    """It is where torch has it, and nowhere but in tiles that read it."""
    case = Conv(1, (5, 9), (7, 10), padding=padding)
    made = of_tensors(channels_last, case.inputs(0, torch.float32))
    clean = run(backend, arguments(tile, **made, act="none"))
    for h, w in itertools.product(*map(range, case.size)):
        x = channels_last(made["x"].clone())
        x[0, h % 5, h, w] = value
        given = {**made, "x": x}
        result = run(backend, arguments(tile, **given, act="none"))
        expected = in_steps(**given, act="none")
        assert not (~expected.isfinite() & result.isfinite()).any()
        assert not (expected.isnan() & ~result.isnan()).any()
        rows, columns = (read_by((h, w)[i], case.size[i], padding[i], tile) for i in (0, 1))
        elsewhere = ~(rows[:, None] & columns)
        assert torch.equal(result[..., elsewhere], clean[..., elsewhere])
        with_relu = run(backend, arguments(tile, **given))
        assert torch.equal(with_relu.isnan(), result.isnan())


@over_tiles
@over_some
def test_packed_weight_gives_the_same_bits(case, tile):
    for layout in LAYOUTS.values():
        args = arguments(tile, **of_tensors(layout, case.inputs(0, torch.float32)))
        assert_identical(OP(*args, PACK(args[1], tile)), OP(*args))


@over_tiles
@over_layouts
@over_some
def test_opcheck(case, layout, tile):
    args = arguments(tile, **of_tensors(LAYOUTS[layout], case.inputs(0, torch.float32)))
    torch.library.opcheck(OP, args)
    torch.library.opcheck(OP, (*args[:2], None, None, None, *args[5:]))


def test_opcheck_pack():
    """Its fake kernel refuses, so only what does not trace is checked."""
    weight = SOME[0].inputs(0, torch.float32)["weight"]
    torch.library.opcheck(
        PACK, (weight, 4), test_utils=("test_schema", "test_autograd_registration")
    )
    with pytest.raises(NotImplementedError, match="conv_winograd_pack: weights cannot be packed"):
        PACK(shadow(weight), 4)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    batch=st.integers(0, 3),
    tile=st.sampled_from([2, 4]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    has_bn=st.booleans(),
    has_residual=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(size, padding, channels, batch, tile, layouts, has_bn, has_residual, act, seed):
    size = tuple(max(n, 3 - 2 * p) for n, p in zip(size, padding, strict=True))
    case = Conv(batch, channels, size, padding=padding)
    made = case.inputs(seed, torch.float32, residual=has_residual)
    if not has_bn:
        made["bn"] = None
    for name, layout in zip(("x", "weight", "residual"), layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    args = arguments(tile, **made, act=act)
    result = OP(*args)
    check(result, args)
    assert placed(OP(*shadow(args))) == placed(result) == placed(in_steps(**made, act=act))


def asks_for_huge_pages(t):
    """Whether the memory in the middle of ``t`` is marked so, as Linux tells."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


def test_packed_weights_ask_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages to ask for")
    weight = torch.randn(256, 256, 3, 3)
    assert asks_for_huge_pages(PACK(weight, 4))
    assert asks_for_huge_pages(torch.ops.fused_resnet.conv_pack(weight, 1))


BAD = [
    (0, torch.ones(5, 4, 4), "x must have 4 dimensions"),
    (0, torch.ones(2, 5, 6, 7).double(), "weight must be float64 as x is, got float32"),
    (0, torch.ones(2, 4, 6, 7), "x must have 5 channels"),
    (0, torch.ones(2, 5, 0, 7), "kernel .* is larger than the padded input"),
    (1, torch.ones(9, 5, 3, 3).half(), "weight must be float32, got float16"),
    (1, torch.ones(9, 5, 1, 3), r"weight must be of a kernel 3x3, got \[9, 5, 1, 3\]"),
    (1, torch.ones(9, 3, 3), "weight must have 4 dimensions"),
    (2, torch.ones(5), r"scale must have shape \[9\], got \[5\]"),
    (3, torch.ones(9).double(), "shift must be float32, got float64"),
    (4, torch.ones(2, 9, 1, 1), "residual must have shape"),
    (5, [0, -1], "padding must be two integers of at least 0"),
    (6, 3, "tile must be 2 or 4, got 3"),
    (7, "gelu", 'act must be "none" or "relu"'),
]


@pytest.mark.parametrize(("at", "value", "words"), BAD)
def test_bad_input(at, value, words):
    args = list(arguments(4, **SOME[1].inputs(0, torch.float32)))
    args[at] = value
    with pytest.raises(RuntimeError, match=f"{NAME}: {words}"):
        OP(*args)


def test_bad_packed_weight():
    args = arguments(4, **SOME[1].inputs(0, torch.float32))
    for packed in (PACK(args[1], 2), PACK(args[1], 4)[1:], PACK(args[1], 4).double()):
        with pytest.raises(RuntimeError, match=f"{NAME}: packed must"):
            OP(*args, packed)
    with pytest.raises(RuntimeError, match="conv_winograd_pack: tile must be 2 or 4, got 5"):
        PACK(args[1], 5)
    with pytest.raises(RuntimeError, match="conv_winograd_pack: weight must be float32"):
        PACK(args[1].double(), 2)


def test_a_raw_op_has_no_backward():
    args = arguments(2, **SOME[1].inputs(0, torch.float32))
    with pytest.raises(RuntimeError, match=f"{NAME}: an input requires grad"):
        OP(args[0].requires_grad_(), *args[1:])


# Winograd's transforms.


@over_tiles
def test_matrices_make_a_convolution(tile):
    a, g, b = winograd.matrices(tile)
    d, w = torch.randn(tile + 2).double(), torch.randn(3).double()
    y = a.T @ ((g @ w) * (b.T @ d))
    torch.testing.assert_close(y, d.unfold(0, 3, 1) @ w)


def test_amplification():
    """What is known of 1 and 2 as points: errors are 7 to 17 times a direct convolution's."""
    assert winograd.amplification(2) == pytest.approx(5 / 3)
    assert 4 < winograd.amplification(4) < 6


def test_the_kernels_points_are_those_of_the_matrices():
    text = (ROOT / "csrc/kernels/cpu/winograd.h").read_text()
    near, far = map(float, re.search(r"kNear = ([\d.]+), kFar = ([\d.]+);", text).groups())
    assert winograd.POINTS[4] == (0, near, -near, far, -far)
