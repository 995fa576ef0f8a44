"""The vendor engine: when it is taken, and when cuDNN's fused kernels may stand in for it."""

import pytest
import torch
from cases import DTYPES, SEEDS, Source, assert_identical, channels_last, placed
from tolerances import judge
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fused_resnet import engines, vendor
from fused_resnet.frozen_conv import CUDNN, FrozenConv
from fused_resnet.reference import accumulation_dtype

WINDOW = ([1, 1], [1, 1], [1, 1])


def given(device="cuda", dtype=torch.float32, batch=2, shift=None, scale=False, residual=False):
    """Arguments of conv_bn_act up to its window; of any size, as nothing is allocated."""
    with FakeTensorMode():
        x = torch.empty(batch, 8, 16, 16, dtype=dtype, device=device)
        vectors = [torch.empty(8, dtype=d, device=device) for d in (torch.float32, shift) if d]
        return (
            x,
            torch.empty(8, 8, 3, 3, dtype=dtype, device=device),
            vectors[0] if scale else None,
            vectors[-1] if shift else None,
            torch.empty_like(x) if residual else None,
        )


def why_not(act="relu", deterministic=False, **kwargs):
    return vendor.cudnn_why_not(*given(**kwargs), *WINDOW, act, deterministic)


@pytest.mark.parametrize("residual", [False, True])
def test_cudnn_takes_what_it_computes_exactly(residual):
    assert why_not(residual=residual) is None
    assert why_not(residual=residual, shift=torch.float32) is None
    for dtype in (torch.float16, torch.bfloat16):
        assert why_not(residual=residual, dtype=dtype) is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device": "cpu"}, "on cpu"),
        ({"dtype": torch.float64}, "float64"),
        ({"act": "none"}, "ReLU"),
        ({"scale": True, "shift": torch.float32}, "scale"),
        # Half types keep their shift in float32: as a bias it would be rounded.
        ({"dtype": torch.bfloat16, "shift": torch.float32}, "shift is torch.float32"),
        ({"deterministic": True}, "deterministic"),
        ({"batch": 0}, "elements"),
        ({"batch": 2**20}, "elements"),  # 2**31 of them
    ],
    ids=str,
)
def test_cudnn_leaves_what_it_would_change(asked, words):
    assert words in why_not(**asked)


def test_the_largest_tensor_counts():
    """The output may be the larger one."""
    x, weight, *rest = given(batch=2**18)
    with FakeTensorMode():
        wide = torch.empty(64, 8, 3, 3, device="cuda")
    assert vendor.cudnn_why_not(x, weight, *rest, *WINDOW, "relu", False) is None
    assert "elements" in vendor.cudnn_why_not(x, wide, *rest, *WINDOW, "relu", False)


def test_determinism_is_torchs_wish(monkeypatch):
    torch.use_deterministic_algorithms(False)
    assert not vendor.must_be_deterministic()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert vendor.must_be_deterministic()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert vendor.must_be_deterministic()


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_values(kernel, residual):
    """Of cuDNN's fused kernels; NaN, which they may lose, is the tuner's question."""
    torch.use_deterministic_algorithms(False)
    window = ([1, 1], [kernel // 2] * 2, [1, 1])
    sides = []
    for seed in SEEDS:
        source = Source(seed, torch.float32)
        weight = source.normal(24, 16, kernel, kernel) / (16 * kernel**2) ** 0.5
        x, shift = source.normal(2, 16, 9, 7), source.normal(24)
        tensors = [channels_last(t).to("cuda") for t in (x, weight, source.normal(2, 24, 9, 7))]
        x, weight, r = tensors
        shift = shift.to("cuda")
        ours = vendor.conv_bn_act_cudnn(x, weight, shift, r if residual else None, *window, 1)

        def eager(x, weight, shift, r):
            y = F.conv2d(x, weight, shift, *window)
            return torch.relu(y + r if residual else y)

        theirs = eager(x, weight, shift, r)
        assert placed(ours) == placed(theirs)
        sides.append((ours, theirs, eager(*(t.double() for t in (x, weight, shift, r)))))
    judge(*zip(*sides, strict=True))


def test_layout_on_a_gpu():
    """That of every engine; torch's own convolution of float64 is always contiguous on CUDA."""
    with FakeTensorMode():
        layout = {"device": "cuda", "memory_format": torch.channels_last, "dtype": torch.float64}
        x, weight = torch.empty((2, 8, 6, 7), **layout), torch.empty((8, 8, 3, 3), **layout)
        y = vendor.conv_bn_act(x, weight, None, None, None, *WINDOW, 1, "none")
        dx = vendor.conv_dgrad(y, weight, None, [6, 7], *WINDOW, 1)
        theirs = F.conv2d(x, weight, None, *WINDOW)
    assert theirs.is_contiguous()
    assert placed(y) == placed(dx) == placed(x)


# The chooser.


@pytest.fixture
def all_on_cuda(monkeypatch):
    """As if every op had a CUDA kernel, and there were a CUDA library."""
    monkeypatch.setitem(engines._NATIVE, "cuda", frozenset(engines.OPS))
    monkeypatch.setattr(engines.native, "cuda_why_not", None)


def test_untuned_on_a_gpu(all_on_cuda):
    """Convolutions go to the vendor, whatever their layout, and everything around them is ours."""
    for op in engines.OPS:
        expected = "vendor" if op in ("conv_bn_act", "conv_dgrad", "conv_wgrad") else "native"
        for dtype in DTYPES:
            for suited in (False, True):
                assert engines.choose(op, "cuda", dtype, "auto", suited) == expected
            assert engines.choose(op, "cuda", dtype, "native") == "native"


# A frozen layer's engine.


def layer(dtype=torch.float32):
    conv, bn = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        bn.running_var.uniform_(0.5, 2)
        return FrozenConv.of(conv, bn, dtype)


def test_untuned_layer():
    assert layer().engine == engines.choose("conv_bn_act", "cpu", torch.float32)


def test_candidates_on_the_cpu():
    assert layer().candidates(torch.randn(1, 8, 5, 5), "relu", None) == ["native", "vendor"]


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ({"vendor": 1.0, "native": 0.98, CUDNN: 0.99}, "vendor"),  # not clearly faster
        ({"vendor": 1.0, "native": 0.5, CUDNN: 0.6}, "native"),
        ({"vendor": 1.0, "native": 0.5, CUDNN: 0.4}, CUDNN),
    ],
)
def test_what_is_clearly_faster_is_taken(seconds, taken, monkeypatch):
    made = layer()
    monkeypatch.setattr(FrozenConv, "candidates", lambda self, *args: list(seconds))
    monkeypatch.setattr(
        "fused_resnet.measure.clock_in_sequence",
        lambda device: lambda call, repeats: (call(), seconds[made.engine])[1],
    )
    made.tune(torch.randn(1, 8, 5, 5), "relu")
    assert made.engine == taken


def stand_in(x, weight, shift, residual, stride, padding, dilation, groups):
    """For cuDNN's fused kernel: it has no scale, and rounds once."""
    wide = accumulation_dtype(x.dtype)
    y = F.conv2d(x.to(wide), weight.to(wide), shift.to(wide), stride, padding, dilation, groups)
    y = y if residual is None else y + residual.to(wide)
    return torch.relu(y).to(x.dtype)


@pytest.mark.parametrize(
    ("spoil", "offered"),
    [
        (lambda y: y, True),
        (torch.nan_to_num, False),  # it loses NaN
        (lambda y: y * (1 + 2**-5), False),  # its error is outside the rule
    ],
)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cudnn_is_tried_on_the_layer(dtype, residual, spoil, offered, monkeypatch):
    """There is no cuDNN in this test."""
    monkeypatch.setattr(vendor, "cudnn_why_not", lambda *args: None)
    monkeypatch.setattr(vendor, "conv_bn_act_cudnn", lambda *args: spoil(stand_in(*args)))
    made, x = layer(dtype), torch.randn(2, 8, 5, 5, dtype=dtype)
    r = torch.randn(2, 8, 5, 5, dtype=dtype) if residual else None
    assert made.folded == (dtype == torch.float32)
    assert (CUDNN in made.candidates(x, "relu", r)) == offered
    assert x.isfinite().all()
    made.engine = CUDNN
    assert_identical(made(x, "relu", r), spoil(stand_in(*made._for_cudnn(x, "relu", r))))


def test_what_cudnn_does_not_take_is_the_vendors():
    """A layer tuned for cuDNN meets what it was not tuned on."""
    made, x = layer(torch.bfloat16), torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)
    made.engine = "vendor"
    expected = made(x, "none")
    made.engine = CUDNN
    assert_identical(made(x, "none"), expected)
