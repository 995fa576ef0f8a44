"""The body of plain 1x1 convolutions that only compute capability 9.0 has, beside the usual one.

Emulated, it runs anywhere; a GPU has yet to confirm it, so nothing takes it that does not ask.
"""

import itertools
from typing import Any

import pytest
import torch
from cases import CUDA_TILE, HALF, assert_identical, channels_last, moved, of_tensors
from conv_cases import Conv, eager, pointwise, raw_arguments
from simt_engine import scheduled
from tolerances import judge
from torch import Tensor

from fused_resnet import engines

SEEDS = range(3)
ROWS = CUDA_TILE["kWgmmaGroupRows"][0]  # of a warpgroup; a block has twice as many
STAGE = 64  # channels
over_half = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))

#: At the edges of rows, columns and stages, and more stages than a ring has. A GPU without
#: multiprocessors to spare, as the emulated one is, takes the wide tile where columns fill it.
EDGES = [
    *(pointwise(n, (16, 24)) for n in (1, 63, ROWS, 65, 127, 2 * ROWS, 129, 257)),
    *(pointwise(130, (16, n)) for n in (8, 56, 64, 72, 120, 128, 136, 192, 264)),
    *(pointwise(9, (n, 8)) for n in (8, STAGE - 8, STAGE, STAGE + 8, 2 * STAGE, 3 * STAGE)),
    *(pointwise(130, (n * STAGE + 16, w)) for n in (2, 3, 4, 5, 8) for w in (24, 120)),
    Conv(3, (32, 40), (7, 9), kernel=(1, 1), padding=(0, 0)),
    Conv(2, (64, 256), (1, 1), kernel=(1, 1), padding=(0, 0)),
    Conv(0, (32, 40), (7, 9), kernel=(1, 1), padding=(0, 0)),
]

#: Enough for a whole GPU to take the wide tile.
LARGE = [pointwise(20001, (depth, width)) for depth in (8, 200, 1024) for width in (120, 256)]


def op(engine: str) -> Any:
    return engines.implementation("conv_bn_act", engine)


@pytest.fixture
def hopper():
    """The engine that has the body on a GPU that has its instructions."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"no GPU 9.0: this is {torch.cuda.get_device_capability()}")
    return "native"


@pytest.fixture(params=["simt", pytest.param("hopper", marks=pytest.mark.gpu)])
def engine(request):
    """An engine that has it: the emulator's, or the one on a GPU."""
    return request.getfixturevalue(request.param) or "simt"


def both(engine: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What the body makes of the op's arguments, and what the usual one does."""
    device = "cpu" if engine == "simt" else "cuda"
    args = of_tensors(lambda t: moved(t, device), args)
    return op(engine)(*args, wgmma=True), op(engine)(*args)


def compare(engine: str, case: Conv, dtype: torch.dtype, **given: Any) -> None:
    sides = []
    for seed in SEEDS:
        made = of_tensors(channels_last, case.inputs(seed, dtype))
        made |= {name: value for name, value in given.items() if value is None}
        act = given.get("act", "relu")
        got, usual = both(engine, raw_arguments(**made, act=act))
        assert got.stride() == usual.stride()
        sides.append((got, usual, eager(**of_tensors(Tensor.double, made), act=act)))
    judge(*zip(*sides, strict=True))


@over_half
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case, dtype, engine):
    compare(engine, case, dtype)


@pytest.mark.gpu
@over_half
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_wide_tile(case, dtype, hopper):
    compare(hopper, case, dtype)


@over_half
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize(("bn", "residual"), list(itertools.product([True, False], repeat=2)))
def test_epilogues(bn, residual, act, dtype, engine):
    given = {} if bn else {"bn": None}
    given |= {} if residual else {"residual": None}
    compare(engine, pointwise(130, (72, 80)), dtype, act=act, **given)


@pytest.mark.parametrize("seed", SEEDS)
@over_half
def test_any_order_gives_the_same_bits(dtype, seed, simt):
    """Of threads and of what is asynchronous, over more stages than the ring has."""
    for case in (pointwise(130, (6 * STAGE, 64)), pointwise(130, (6 * STAGE, 128))):
        args = raw_arguments(**of_tensors(channels_last, case.inputs(seed, dtype)))
        expected, _ = both("simt", args)
        with scheduled(seed):
            assert_identical(both("simt", args)[0], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_pixel(value, engine):
    made = pointwise(129, (72, 72)).inputs(0, torch.bfloat16, residual=False)
    made["x"][0, 71, 0, 128] = value
    made["bn"] = None
    got, usual = both(engine, raw_arguments(**of_tensors(channels_last, made), act="none"))
    assert_identical(got.isfinite(), usual.isfinite())
    assert not got[..., 128].isfinite().any()
    assert got[..., :128].isfinite().all()


def test_weights_in_any_layout_that_is_read_wide(engine):
    """Contiguous ones are, a slice of input channels is, and so is what conv_pack makes."""
    made = of_tensors(channels_last, pointwise(70, (72, 72)).inputs(0, torch.float16))
    expected, _ = both(engine, raw_arguments(**made))
    wider = torch.full((72, 88, 1, 1), torch.nan, dtype=torch.float16)
    weights = [made["weight"].contiguous(), wider[:, 8:80].copy_(made["weight"])]
    for weight in weights:
        assert_identical(both(engine, raw_arguments(**{**made, "weight": weight}))[0], expected)


REFUSED = {
    "float32": (Conv(1, (16, 16), (4, 4), kernel=(1, 1), padding=(0, 0)), torch.float32),
    "kernel": (Conv(1, (16, 16), (4, 4)), torch.bfloat16),
    "stride": (Conv(1, (16, 16), (4, 4), (1, 1), (2, 2), (0, 0)), torch.bfloat16),
    "padding": (Conv(1, (16, 16), (4, 4), (1, 1), (1, 1), (1, 0)), torch.bfloat16),
    "groups": (Conv(1, (16, 16), (4, 4), (1, 1), (1, 1), (0, 0), groups=2), torch.bfloat16),
    "in_channels": (pointwise(16, (12, 16)), torch.bfloat16),
    "out_channels": (pointwise(16, (16, 12)), torch.bfloat16),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_does_not_take_is_refused(what, engine):
    case, dtype = REFUSED[what]
    args = raw_arguments(**of_tensors(channels_last, case.inputs(0, dtype)))
    with pytest.raises(RuntimeError, match=r"conv_bn_act: wgmma must be False unless .*; got x \["):
        both(engine, args)


@pytest.mark.parametrize("which", ["x", "weight", "residual"])
def test_misaligned_tensors_are_refused(which, engine):
    made = of_tensors(channels_last, pointwise(9, (16, 16)).inputs(0, torch.bfloat16))
    t = made[which]
    behind = t.new_full((t.numel() + 1,), torch.nan).as_strided(t.shape, t.stride(), 1)
    args = raw_arguments(**{**made, which: behind.copy_(t)})
    with pytest.raises(RuntimeError, match=r"wgmma must be False unless .* of aligned tensors"):
        both(engine, args)


def test_cpus_refuse_it():
    made = of_tensors(channels_last, pointwise(9, (16, 16)).inputs(0, torch.bfloat16))
    with pytest.raises(RuntimeError, match="conv_bn_act: wgmma must be False unless on a GPU"):
        op("native")(*raw_arguments(**made), wgmma=True)
