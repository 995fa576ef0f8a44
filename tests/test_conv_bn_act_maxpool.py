"""conv_bn_act_maxpool: ``max_pool2d(act(bn(conv(x))))`` without the image in between."""

from dataclasses import dataclass, field
from typing import Any

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
from conv_cases import Conv, eager, scale_shift
from torch.nn import functional as F

from fused_resnet import engines

OP = "conv_bn_act_maxpool"
STEM = {"kernel_size": 3, "stride": 2, "padding": 1}
SEVEN = {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}


@dataclass(frozen=True)
class Case:
    """A convolution, and how its result is pooled."""

    conv: Conv
    pool: dict[str, Any] = field(default_factory=lambda: STEM, hash=False)

    def __str__(self) -> str:
        return f"{self.conv}-{'-'.join(f'{k}={v}' for k, v in self.pool.items())}"

    @property
    def work(self) -> float:
        return self.conv.work

    def inputs(self, seed: int, dtype: torch.dtype) -> dict[str, Any]:
        made = self.conv.inputs(seed, dtype, residual=False)
        return {name: made[name] for name in ("x", "weight", "bn")}


#: Stems, then tiles that end within the image and beyond it, then every way a window can lie.
SHAPES = [
    Case(Conv(2, (3, 16), (23, 21), **SEVEN)),
    Case(Conv(1, (3, 65), (9, 11), **SEVEN)),
    Case(Conv(1, (3, 3), (70, 34), (1, 1), padding=(0, 0))),
    Case(Conv(1, (1, 5), (17, 62), (2, 3))),
    Case(Conv(2, (4, 8), (9, 8), stride=(2, 1), dilation=(1, 2), padding=(0, 2))),
    Case(Conv(1, (20, 7), (8, 9))),
    Case(Conv(2, (3, 5), (7, 6)), {"kernel_size": 2}),
    Case(Conv(2, (3, 5), (7, 6)), {"kernel_size": 2, "ceil_mode": True}),
    Case(Conv(1, (3, 5), (8, 9)), {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True}),
    Case(Conv(1, (2, 9), (9, 7)), {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)}),
    Case(
        Conv(1, (3, 4), (9, 9)), {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": (2, 3)}
    ),
    Case(
        Conv(1, (3, 4), (6, 5)), {"kernel_size": 3, "stride": 4, "dilation": 2, "ceil_mode": True}
    ),
    Case(Conv(1, (3, 4), (3, 3)), {"kernel_size": 1, "stride": 3}),
    # Windows altogether in the padding, by dilation.
    Case(Conv(1, (3, 4), (1, 2)), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}),
    # A window that no tile holds.
    Case(Conv(1, (2, 3), (26, 25), (1, 1), padding=(0, 0)), {"kernel_size": 19, "stride": 5}),
    Case(Conv(1, (1, 1), (1, 1), (1, 1), padding=(0, 0)), {"kernel_size": 1}),
    Case(Conv(0, (3, 4), (6, 5))),
]
SOME = SHAPES[0]


def pairs(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


def arguments(case: Case, x, weight, bn, act: str = "relu") -> tuple[Any, ...]:
    """As the op's schema takes them."""
    scale, shift = scale_shift(bn)
    geometry = (list(getattr(case.conv, name)) for name in ("stride", "padding", "dilation"))
    kernel, stride, padding, dilation = (
        pairs(case.pool.get(name, otherwise))
        for name, otherwise in (
            ("kernel_size", None),
            ("stride", case.pool["kernel_size"]),
            ("padding", 0),
            ("dilation", 1),
        )
    )
    ceil_mode = case.pool.get("ceil_mode", False)
    return x, weight, scale, shift, *geometry, kernel, stride, padding, dilation, ceil_mode, act


def check(backend, case: Case, inputs, act: str = "relu") -> None:
    def ours(**given):
        args = arguments(case, **given, act=act)
        return engines.implementation(OP, engines.wish())(*args)

    def in_steps(**given):
        y = eager(**given, residual=None, geometry=case.conv.geometry, act=act)
        return F.max_pool2d(y, **case.pool)

    verify(backend, ours, in_steps, inputs)


@over_backends(OP)
@over_dtypes
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, dtype, backend):
    check(backend, case, lambda seed: of_tensors(channels_last, case.inputs(seed, dtype)))


@over_backends(OP)
@pytest.mark.parametrize("which", ["x", "weight", "bn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, which, backend):
    def inputs(seed):
        made = SOME.inputs(seed, torch.float32)
        return {**made, which: of_tensors(LAYOUTS[layout], made[which])}

    check(backend, SOME, inputs)


@over_backends(OP)
@over_dtypes
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_epilogues(act, present, dtype, backend):
    def inputs(seed):
        made = of_tensors(channels_last, SOME.inputs(seed, dtype))
        return made if present else {**made, "bn": None}

    check(backend, SOME, inputs, act)


@over_backends(OP)
@over_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_windows(value, dtype, backend):
    """A channel with a zero weight beside the others: zero times infinity is NaN, there too."""

    def inputs(seed):
        made = of_tensors(channels_last, SOME.inputs(seed, dtype))
        made["x"][0, 1, 9, 20] = value
        made["weight"][3] = 0
        return made

    check(backend, SOME, inputs)


@pytest.mark.parametrize("namespace", ["fused_resnet", "fused_resnet_triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_fake_kernels(case, layout, namespace):
    made = of_tensors(LAYOUTS[layout], case.inputs(0, torch.float16))
    args = arguments(case, **made)
    fake = getattr(getattr(torch.ops, namespace), OP).default(*shadow(args))
    assert placed(fake) == placed(engines.implementation(OP, "reference")(*args))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.ones(3, 4, 4), "x must have 4 dimensions"),
        (0, torch.ones(2, 4, 9, 9), "x must have 3 channels"),
        (1, torch.ones(4, 3, 7, 7).double(), "weight must be float32 as x is"),
        (2, torch.ones(5), r"scale must have shape \[16\]"),
        (4, [0, 1], "stride must be two integers of at least 1"),
        (7, [0, 1], "kernel_size must be two integers of at least 1"),
        (9, [2, 1], "padding must be at most half of kernel_size"),
        (10, [9, 9], "kernel_size .* is larger than the padded input"),
        (12, "gelu", 'act must be "none" or "relu"'),
    ],
)
@over_backends(OP)
def test_bad_input(at, value, words, backend):
    if backend.engine == "reference":
        return
    args = list(arguments(SOME, **SOME.inputs(0, torch.float32)))
    args[at] = value
    with pytest.raises(RuntimeError, match=f"{OP}: {words}"):
        engines.implementation(OP, backend.engine)(*backend.move(args))


def test_a_tile_holds_what_its_windows_read():
    """Of every tile that fits, the one that leaves the fewest; of ResNets' stem, 8x7."""
    if engines.unavailable("triton") is not None:
        pytest.skip("no triton engine")
    from fused_resnet.triton_kernels.conv_bn_act_maxpool import reads, tile_of
    from fused_resnet.triton_kernels.pooling import Pooling

    stem = Pooling((3, 3), (2, 2), (1, 1), (1, 1))
    assert tile_of(256, 56, 56, stem) == (8, 7)
    assert tile_of(8, 56, 56, stem) is None
    for rows in (9, 20, 64, 128):
        for size in ((56, 56), (1, 90), (90, 1), (3, 5)):
            h, w = tile_of(rows, *size, stem)
            assert reads(h, stem, 0) * reads(w, stem, 1) <= rows
            fits = [
                -(-size[0] // i) * -(-size[1] // j)
                for i in range(1, size[0] + 1)
                for j in range(1, size[1] + 1)
                if reads(i, stem, 0) * reads(j, stem, 1) <= rows
            ]
            assert -(-size[0] // h) * -(-size[1] // w) == min(fits)


def test_stem_reads_its_input_once(monkeypatch):
    """And writes nothing but the pooled image."""
    if engines.unavailable("triton") is not None:
        pytest.skip("no triton engine")
    from fused_resnet.triton_kernels import launch, ops

    case = Case(Conv(2, (3, 64), (64, 64), **SEVEN))
    made = of_tensors(channels_last, case.inputs(0, torch.bfloat16))
    args = shadow(arguments(case, **made))
    with launch.recording() as launches:
        out = ops.IMPLEMENTATIONS[OP](*args)
    (only,) = launches
    vectors = 2 * 4 * 64
    assert only.bytes() == 2 * (args[0].numel() + args[1].numel() + out.numel()) + vectors
