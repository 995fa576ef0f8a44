"""The ops of chains: each is the chain of ops that its name says, in one pass over memory.

The specification is made of functions that are held against torch elsewhere, so that it stands for
eager torch here.
"""

import pytest
import torch
from cases import (
    LAYOUTS,
    Source,
    backends,
    channels_last,
    of_tensors,
    over_backends,
    over_dtypes,
    placed,
    shadow,
    verify,
)
from conv_cases import GEOMETRIES, GROUPED, Conv

from fused_resnet import engines, reference_chain

#: A tile and more in every direction, strides with and without taps in every phase, a stem, groups.
CASES = [
    Conv(2, (17, 20), (9, 10)),
    Conv(2, (16, 24), (8, 9), stride=(2, 2)),
    Conv(1, (12, 8), (13, 12), kernel=(1, 1), padding=(0, 0)),
    Conv(2, (9, 17), (7, 6), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    GEOMETRIES[0],
    GROUPED[2],
    Conv(0),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_whether = pytest.mark.parametrize("whole", [True, False])


def vectors(source, channels, *names):
    made = source.batch_norm(channels)
    return [made[name] for name in names]


def images(case, source):
    """x, weight, and what is like the output."""
    taps = case.kernel[0] * case.kernel[1] * case.channels[0] // case.groups
    weight = source.normal(case.channels[1], case.channels[0] // case.groups, *case.kernel)
    return (
        source.normal(case.batch, case.channels[0], *case.size),
        weight / taps**0.5,
        source.normal(case.batch, case.channels[1], *case.out_size),
    )


def geometry(case):
    return [*(list(p) for p in (case.stride, case.padding, case.dilation)), case.groups]


def bn_act_conv_stats(case, source, whole):
    x, weight, _ = images(case, source)
    prologue = [*vectors(source, case.channels[0], "gamma", "beta"), "relu"]
    return [x, *(prologue if whole else [None, None, "none"]), weight, *geometry(case)]


def projection(case, source, stride):
    """x2, weight2, scale2 and stride2 of a 1x1 convolution of another image to the same output."""
    channels, out = case.channels[1], case.channels[1]
    down, across = stride
    size = (down * (case.out_size[0] - 1) + 1, across * case.out_size[1])
    weight = source.normal(out, channels, 1, 1) / channels**0.5
    scale = vectors(source, out, "gamma")[0]
    return [source.normal(case.batch, channels, *size), weight, scale, list(stride)]


def bn_act_conv_bn_act(case, source, whole):
    x, weight, residual = images(case, source)
    prologue = [*vectors(source, case.channels[0], "gamma", "beta"), "relu"]
    epilogue = [*vectors(source, case.channels[1], "gamma", "beta"), residual]
    if whole:
        rest = projection(case, source, (2, 3))
        return [x, *prologue, weight, *epilogue, *geometry(case), "relu", *rest]
    return [x, None, None, "relu", weight, None, None, None, *geometry(case), "none"]


def gradient(case, source, whole):
    """grad, y, a, b and c."""
    grad, y = (images(case, source)[2] for _ in range(2))
    a, b, c = vectors(source, case.channels[1], "gamma", "beta", "mean")
    return [grad, y, a, b, c] if whole else [grad, None, a, None, None]


def bn_backward_conv_dgrad(case, source, whole):
    x, weight, _ = images(case, source)
    rest = [None] * 6
    if whole:
        rest = [x.flip(0), x, *vectors(source, case.channels[0], "gamma", "beta", "mean", "var")]
    given = [*gradient(case, source, whole), weight, *rest]
    return [*given, list(case.size), *geometry(case)]


def bn_backward_conv_wgrad(case, source, whole):
    x = images(case, source)[0]
    prologue = [None, None, None, "none"]
    if whole:
        prologue = [*vectors(source, case.channels[0], "gamma", "beta", "mean"), "relu"]
    given = [*gradient(case, source, whole), x, *prologue]
    return [*given, list(case.kernel), *geometry(case)]


def bn_act_gram_backward(case, source, whole):
    pixels = Conv(case.batch, case.channels, case.size, (1, 1), padding=(0, 0))
    x, weight, grad = images(pixels, source)
    channels = case.channels[0]
    scale, shift, center, mean = vectors(source, channels, "gamma", "beta", "mean", "mean")
    invstd, offset = vectors(source, channels, "var", "beta")
    matrix = source.normal(channels, channels)
    if whole:
        return [
            grad,
            weight,
            x,
            scale,
            shift,
            center,
            "relu",
            matrix,
            offset,
            x.flip(0),
            mean,
            invstd,
        ]
    return [grad, weight, x, None, None, center, "none", matrix, offset, None, None, None]


INPUTS = {
    f.__name__: f
    for f in (
        bn_act_conv_stats,
        bn_act_conv_bn_act,
        bn_backward_conv_dgrad,
        bn_backward_conv_wgrad,
        bn_act_gram_backward,
    )
}


def check(op, backend, make):
    """By the rule; what is rounded between the ops is rounded so by eager torch, too."""

    def ours(given):
        return engines.implementation(op, engines.wish())(*given)

    def eager(given):
        return getattr(reference_chain, op)(*given)

    verify(backend, ours, eager, lambda seed: {"given": make(seed)})


def test_all_are_tested():
    """One has a file of its own."""
    assert sorted([*INPUTS, "relu_backward_conv_wgrad"]) == sorted(engines.CHAIN_OPS)


#: Each op on every backend that has it.
over_ops = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, *p.values, id=f"{op}-{p.id}", marks=p.marks)
        for op in INPUTS
        for p in backends(op)
    ],
)


@over_ops
@over_dtypes
@over_cases
@over_whether
def test_cases(op, whole, case, dtype, backend):
    check(
        op,
        backend,
        lambda seed: of_tensors(channels_last, INPUTS[op](case, Source(seed, dtype), whole)),
    )


@over_backends("bn_act_conv_bn_act")
@over_dtypes
@over_cases
@pytest.mark.parametrize("scales", [(False, False), (False, True), (True, False), (True, True)])
def test_projection(scales, case, dtype, backend):
    """Without a residual, at every pixel; each product with a scale of its own, or none."""

    def make(seed):
        source = Source(seed, dtype)
        *rest, act = bn_act_conv_bn_act(case, source, False)
        rest[6] = vectors(source, case.channels[1], "beta")[0]
        x2, weight2, scale2, stride2 = projection(case, source, (1, 1))
        rest[5] = vectors(source, case.channels[1], "gamma")[0] if scales[0] else None
        second = [x2, weight2, scale2 if scales[1] else None, stride2]
        return of_tensors(channels_last, [*rest, act, *second])

    check("bn_act_conv_bn_act", backend, make)


@over_backends("bn_backward_conv_dgrad")
@over_dtypes
@over_cases
@pytest.mark.parametrize("stride", [2, 3])
def test_added_to_every_so_many(stride, case, dtype, backend):
    check("bn_backward_conv_dgrad", backend, lambda seed: spread(case, Source(seed, dtype), stride))


def spread(case, source, stride):
    given = bn_backward_conv_dgrad(case, source, True)
    given[6] = given[6][:, :, ::stride, ::stride]
    return of_tensors(channels_last, [*given, stride])


@over_backends("bn_act_gram_backward")
@over_dtypes
@over_cases
@over_whether
def test_gram_of_every_so_many(whole, case, dtype, backend):
    check("bn_act_gram_backward", backend, lambda seed: part(case, Source(seed, dtype), whole))


def part(case, source, whole):
    given = bn_act_gram_backward(case, source, whole)
    given[0] = given[0][:, :, ::2, ::2]
    if whole:
        given[9:] = given[9][:, :, ::2, ::2], None, None
    return of_tensors(channels_last, [*given, 2])


@over_ops
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "misaligned", "negative"])
def test_layouts(op, layout, backend):
    def make(seed):
        return of_tensors(LAYOUTS[layout], INPUTS[op](CASES[0], Source(seed, torch.float32), True))

    check(op, backend, make)


#: What is put into one element of an operand, by the seed.
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def small(op):
    """What an infinite gradient makes of the padding's zeros is not the same in torch's kernels."""
    return Conv(2, (5, 7), (5, 6), padding=(0, 0) if op == "bn_backward_conv_wgrad" else (1, 1))


def operands():
    """Each tensor of an op's arguments, on every backend that has the op."""
    for op, make in INPUTS.items():
        schema = getattr(torch.ops.fused_resnet, op).default._schema
        given = make(small(op), Source(0, torch.float32), True)
        for at, (argument, value) in enumerate(zip(schema.arguments, given, strict=False)):
            for p in backends(op) if isinstance(value, torch.Tensor) else ():
                name = f"{op}-{argument.name}-{p.id}"
                yield pytest.param(op, at, *p.values, id=name, marks=p.marks)


@pytest.mark.parametrize(("op", "at", "backend"), operands())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_finite_comes_out(dtype, op, at, backend):
    def make(seed):
        given = INPUTS[op](small(op), Source(seed, dtype), True)
        operand = given[at] = given[at].clone()
        operand.view(-1)[operand.numel() // 2] = NOT_FINITE[seed]
        return of_tensors(channels_last, given)

    check(op, backend, make)


@over_cases
@over_whether
@pytest.mark.parametrize("op", INPUTS)
def test_fake_kernels(op, whole, case):
    check_fake(op, of_tensors(channels_last, INPUTS[op](case, Source(0, torch.float16), whole)))


@over_cases
def test_fake_kernels_of_strides(case):
    check_fake("bn_backward_conv_dgrad", spread(case, Source(0, torch.float16), 2))
    check_fake("bn_act_gram_backward", part(case, Source(0, torch.float16), True))


def check_fake(op, given):
    fake = getattr(torch.ops.fused_resnet_triton, op).default(*shadow(given))
    real = engines.implementation(op, "reference")(*given)
    for a, b in zip(fake, real, strict=True) if isinstance(fake, tuple) else [(fake, real)]:
        assert placed(a) == placed(b)


BAD = [
    ("bn_act_conv_stats", 1, None, "scale, shift must be given together"),
    ("bn_act_conv_stats", 3, "gelu", 'act must be "none" or "relu"'),
    ("bn_act_conv_bn_act", 7, torch.ones(2, 20, 9, 9), "residual must have shape"),
    ("bn_act_conv_bn_act", 13, None, "x2, weight2 must be given together"),
    ("bn_act_conv_bn_act", 13, torch.ones(2, 20, 9, 30), "x2 must have .2, 9, 10. images"),
    ("bn_act_conv_bn_act", 14, torch.ones(20, 20, 3, 3), "weight2 must have shape .20, 20, 1"),
    ("bn_act_conv_bn_act", 15, torch.ones(19), "scale2 must have shape"),
    ("bn_act_conv_bn_act", 16, [0, 3], "stride2 must be two integers of at least 1"),
    ("bn_backward_conv_dgrad", 1, None, "y, b must be given together"),
    ("bn_backward_conv_dgrad", 7, None, "x, scale, shift, mean, invstd must be given together"),
    ("bn_backward_conv_dgrad", 17, 2, "added must have shape .2, 17, 5, 5."),
    ("bn_backward_conv_dgrad", 17, 0, "added_stride must be at least 1"),
    ("bn_backward_conv_wgrad", 5, torch.ones(2, 17, 9, 9), "grad must have shape"),
    ("bn_act_gram_backward", 7, torch.ones(17, 16), "matrix must have shape"),
    ("bn_act_gram_backward", 12, 0, "stride must be at least 1"),
    ("bn_act_gram_backward", 12, 2, "stride must be 1 with mean and invstd"),
]


@pytest.mark.parametrize(
    ("op", "at", "value", "words", "backend"),
    [
        pytest.param(*bad, *p.values, id=f"{bad[3]}-{p.id}", marks=p.marks)
        for bad in BAD
        for p in backends(bad[0])
        if p.values[0].engine != "reference"
    ],
)
def test_bad_input(op, at, value, words, backend):
    given = INPUTS[op](CASES[0], Source(0, torch.float32), True)
    given[at : at + 1] = [value]
    with pytest.raises(RuntimeError, match=f"{op}: {words}"):
        engines.implementation(op, backend.engine)(*backend.move(given))
