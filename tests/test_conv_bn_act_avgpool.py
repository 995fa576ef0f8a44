"""conv_bn_act_avgpool: the mean over each image of ``act(bn(conv(x)) + residual)``."""

import itertools

import pytest
import torch
from cases import (
    LAYOUTS,
    channels_last,
    of_tensors,
    over_backends,
    over_dtypes,
    placed,
    shadow,
    verify,
)
from conv_cases import GEOMETRIES, GROUPED, SOME, Conv, eager, raw_arguments
from torch.nn import functional as F

from fused_resnet import engines

OP = "conv_bn_act_avgpool"
#: Images of less than a tile, of one, of several and a part; the ends of ResNets in small.
SHAPES = [
    *SOME,
    Conv(2, (5, 9), (8, 8)),
    Conv(2, (4, 130), (9, 15), (1, 1), padding=(0, 0)),
    Conv(3, (16, 40), (7, 7), (1, 1), padding=(0, 0)),
    Conv(2, (16, 16), (7, 7)),
    GROUPED[2],
    GEOMETRIES[1],
    Conv(2, (7, 3), (1, 1), (1, 1), padding=(0, 0)),
    Conv(0),
]
over_shapes = pytest.mark.parametrize("case", SHAPES, ids=str)


def ours(**given):
    return engines.implementation(OP, engines.wish())(*raw_arguments(**given))


def in_steps(**given):
    return F.adaptive_avg_pool2d(eager(**given), 1)


@over_backends(OP)
@over_dtypes
@over_shapes
def test_shapes(case, dtype, backend):
    def inputs(seed):
        return of_tensors(channels_last, case.inputs(seed, dtype))

    verify(backend, ours, in_steps, inputs)


@over_backends(OP)
@pytest.mark.parametrize("which", ["x", "weight", "residual", "bn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, which, backend):
    def inputs(seed):
        made = SOME[1].inputs(seed, torch.float32)
        return {**made, which: of_tensors(LAYOUTS[layout], made[which])}

    verify(backend, ours, in_steps, inputs)


@over_backends(OP)
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(
    ("has_bn", "has_residual"), list(itertools.product([True, False], repeat=2))
)
def test_epilogues(has_bn, has_residual, act, backend):
    def inputs(seed):
        made = SOME[1].inputs(seed, torch.float32, residual=has_residual)
        return {**made, "act": act} if has_bn else {**made, "bn": None, "act": act}

    verify(backend, ours, in_steps, inputs)


@over_backends(OP)
@over_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_image(value, dtype, backend):
    def inputs(seed):
        made = of_tensors(channels_last, SOME[1].inputs(seed, dtype))
        made["residual"][1, 4, 2, 3] = value
        return made

    verify(backend, ours, in_steps, inputs)


@over_backends(OP)
def test_sums_of_half_types_do_not_overflow(backend):
    case = Conv(1, (8, 8), (9, 9), (1, 1), padding=(0, 0))
    made = case.inputs(0, torch.float16)
    made["x"], made["residual"] = made["x"] * 0, torch.full_like(made["residual"], 60000.0)
    given = backend.move({**made, "bn": None})
    result = engines.implementation(OP, backend.engine)(*raw_arguments(**given))
    assert torch.equal(result.cpu(), made["residual"][..., :1, :1])


@pytest.mark.parametrize("namespace", ["fused_resnet", "fused_resnet_triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@over_shapes
def test_fake_kernels(case, layout, namespace):
    made = of_tensors(LAYOUTS[layout], case.inputs(0, torch.float32))
    args = raw_arguments(**made)
    fake = getattr(getattr(torch.ops, namespace), OP).default(*shadow(args))
    assert placed(fake) == placed(engines.implementation(OP, "reference")(*args))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.ones(3, 4, 4), "x must have 4 dimensions"),
        (1, torch.ones(9, 5, 3, 3).double(), "weight must be float32 as x is"),
        (3, torch.ones(5), r"shift must have shape \[9\]"),
        (4, torch.ones(2, 9, 1, 1), "residual must have shape"),
        (5, [0, 1], "stride must be two integers of at least 1"),
        (8, 2, "groups must be positive and divide the output channels 9"),
        (9, "gelu", 'act must be "none" or "relu"'),
    ],
)
@over_backends(OP)
def test_bad_input(at, value, words, backend):
    if backend.engine == "reference":
        return
    args = list(raw_arguments(**SOME[1].inputs(0, torch.float32)))
    args[at] = value
    with pytest.raises(RuntimeError, match=f"{OP}: {words}"):
        engines.implementation(OP, backend.engine)(*backend.move(args))


def test_no_image_is_written():
    if engines.unavailable("triton") is not None:
        pytest.skip("no triton engine")
    from fused_resnet.triton_kernels import launch, ops

    case = Conv(3, (16, 40), (7, 7), (1, 1), padding=(0, 0))
    args = shadow(raw_arguments(**case.inputs(0, torch.float16)))
    with launch.recording() as launches:
        ops.IMPLEMENTATIONS[OP](*args)
    assert [each.finalizes for each in launches] == [False, True]
    written = {tuple(t.shape) for each in launches for t in launch.tensors_in(each.writes)}
    assert written == {(3, 40), (3, 40, 1, 1)}
