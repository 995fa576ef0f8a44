"""bn_act: ``act(x * scale + shift + residual)``, and its in-place forms."""

import pytest
import torch
from cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    TILE,
    Source,
    around,
    assert_identical,
    at_threads,
    bits,
    copied,
    of_tensors,
    over_backends,
    over_dtypes,
    over_layouts,
    over_raw_backends,
    per_channel,
    placed,
    scale_shift,
    shadow,
    torch_act,
    torch_batch_norm,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import within_rounding

from fused_resnet import engines, functional

OP = torch.ops.fused_resnet.bn_act.default
IN_PLACE = torch.ops.fused_resnet.bn_act_.default
#: The in-place form that is given BatchNorm's own tensors.
BATCH_NORM = torch.ops.fused_resnet.batch_norm_act_.default

_GRAIN = TILE["kGrain"][0]
#: Vectors of 8 and 16, in the channels and in the pixels; more than one thread's share; nothing.
SHAPES = [
    *((2, n, 3, 2) for n in around(8, 16)),
    *((2, 3, 1, n) for n in around(8, 16)),
    (2, 9, 1, 1),
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (2, 2, 1, _GRAIN + 1),
    (1, 1, 3, _GRAIN),
    (2, _GRAIN // 8 + 1, 3, 3),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
]


def inputs(seed, shape, dtype, residual=True):
    source = Source(seed, dtype)
    return {
        "x": source.normal(*shape),
        "bn": source.batch_norm(shape[1]),
        "residual": source.normal(*shape) if residual else None,
    }


def ours(x, bn, residual, act="relu"):
    return functional.bn_act(x, *scale_shift(**bn), residual, act)


def eager(x, bn, residual, act="relu"):
    y = torch_batch_norm(x, **bn)
    return torch_act(y if residual is None else y + residual, act)


@over_backends("bn_act", isa=True)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, dtype, backend):
    verify(backend, ours, eager, lambda s: of_tensors(LAYOUTS[layout], inputs(s, shape, dtype)))


@over_backends("bn_act")
@over_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "residual", "bn"])
def test_layouts(which, layout, dtype, backend):
    def laid_out(seed):
        made = inputs(seed, (2, 17, 5, 6), dtype)
        return {**made, which: of_tensors(LAYOUTS[layout], made[which])}

    verify(backend, ours, eager, laid_out)


@over_backends("bn_act")
@over_dtypes
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_epilogues(residual, act, dtype, backend):
    verify(
        backend,
        lambda **t: ours(**t, act=act),
        lambda **t: eager(**t, act=act),
        lambda seed: inputs(seed, (2, 17, 5, 6), dtype, residual),
    )


def raw_arguments(x, bn, residual, act="relu"):
    return (x, *scale_shift(**bn), residual, act)


@over_raw_backends("bn_act")
@over_dtypes
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_gives_the_same_bits(shape, layout, dtype, backend):
    op, in_place = (engines.implementation(f"bn_act{form}", backend.engine) for form in ("", "_"))
    args = raw_arguments(**of_tensors(LAYOUTS[layout], inputs(0, shape, dtype)))
    args = backend.move(args)
    expected = op(*args)
    for threads in (1, 2):
        given = copied(args)
        assert at_threads(threads, in_place, *given) is None
        assert torch.equal(bits(given[0]), bits(expected))
        assert given[0].stride() == args[0].stride()
        assert_identical(given[1:], args[1:], "inputs")


#: Triton's engine has not the form that takes BatchNorm's tensors.
_COMPILED = [p for p in over_raw_backends("bn_act").args[1] if p.values[0].engine != "triton"]


@pytest.mark.parametrize("backend", _COMPILED)
@over_dtypes
@over_layouts
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "accumulated"])
def test_batch_norm_in_place_gives_the_same_bits(own, affine, layout, dtype, backend):
    """With BatchNorm's tensors in the type of x or, of half types, in float32; affine or not."""
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 17, 5, 6), dtype))
    mean, var, gamma, beta = (v.to(dtype) if own else v for v in made["bn"].values())
    norm = (mean, var, gamma, beta, EPS) if affine else (mean, var, None, None, EPS)
    args = of_tensors(lambda t: t.to(backend.device), (made["x"], norm, made["residual"]))
    forms = ("bn_scale_shift", "bn_act", "batch_norm_act_")
    vectors, op, in_place = (engines.implementation(form, backend.engine) for form in forms)
    x, norm, residual = copied(args)
    expected = op(x, *vectors(*norm), residual, "relu")
    assert in_place(x, *norm, residual, "relu") is None
    assert_identical(x, expected)
    assert_identical((norm, residual), args[1:], "inputs")


def test_batch_norm_in_place_refuses_what_does_not_fit():
    made = inputs(0, (2, 5, 3, 4), torch.float32)
    norm = tuple(made["bn"].values())
    with pytest.raises(RuntimeError, match="bn_act_: scale must have shape \\[5\\], got \\[4\\]"):
        BATCH_NORM(made["x"], *(v[:4] for v in norm), EPS, None, "relu")
    with pytest.raises(RuntimeError, match="bn_act_: scale must be float64, got float32"):
        BATCH_NORM(made["x"].double(), *norm, EPS, None, "relu")
    for i in range(4):
        elsewhere = [v.to("meta") if i == j else v for j, v in enumerate(norm)]
        with pytest.raises(RuntimeError, match="must be on the device of x"):
            BATCH_NORM(made["x"], *elsewhere, EPS, None, "relu")


def test_in_place_is_seen_by_autograd():
    """Overwriting what a backward needs must raise there, not spoil the gradient."""
    _, scale, shift, residual, _ = raw_arguments(**inputs(0, (2, 5, 3, 4), torch.float32))
    leaf = torch.randn(2, 5, 3, 4, requires_grad=True)
    y = torch.relu(leaf)
    IN_PLACE(y.detach(), scale, shift, residual, "relu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_leaves_what_lies_between_alone():
    x, scale, shift, _, _ = raw_arguments(**inputs(0, (2, 5, 3, 4), torch.float32))
    larger = torch.full((2, 5, 3, 9), 7.0)
    larger[..., 1::2] = x
    IN_PLACE(larger[..., 1::2], scale, shift, None, "none")
    assert (larger[..., ::2] == 7).all()


@over_layouts
@pytest.mark.parametrize("op", [OP, IN_PLACE], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_opcheck(residual, op, layout):
    made = inputs(0, (2, 5, 3, 4), torch.float32, residual)
    torch.library.opcheck(op, raw_arguments(**of_tensors(LAYOUTS[layout], made)))


@over_layouts
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_opcheck_of_batch_norm(residual, layout):
    made = of_tensors(LAYOUTS[layout], inputs(0, (2, 5, 3, 4), torch.float32, residual))
    args = (made["x"], *made["bn"].values(), EPS, made["residual"], "relu")
    torch.library.opcheck(BATCH_NORM, args)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 6), st.integers(0, 20))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    residual=st.booleans(),
    act=st.sampled_from(["none", "relu"]),
    seed=st.integers(0, 9),
)
def test_fuzz(shape, dtype, layouts, residual, act, seed):
    made = inputs(seed, shape, dtype, residual)
    for name, layout in zip(made, layouts, strict=True):
        made[name] = of_tensors(LAYOUTS[layout], made[name])
    args = raw_arguments(**made, act=act)
    result = OP(*args)

    def exact(x, scale, shift, residual):
        y = x * per_channel(scale) + per_channel(shift)
        return y if residual is None else y + residual

    tensors = of_tensors(torch.Tensor.double, args[:4])
    magnitude = exact(*of_tensors(torch.abs, tensors))
    within_rounding(result, torch_act(exact(*tensors), act), magnitude, 3)
    fake = OP(*shadow(args))
    assert placed(fake) == placed(result)
    assert placed(result) == placed(eager(**made, act=act))
    if layouts[0] != "expanded":
        x = copied(args[0])
        assert IN_PLACE(x, *args[1:]) is None
        assert torch.equal(bits(x), bits(result))
