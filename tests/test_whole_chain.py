"""A chain in one op each way: the same as op by op, to the bit."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from cases import HALF, assert_identical
from test_training import (
    BLOCKS,
    CHANGES,
    build,
    fixed_statistics,
    gradient,
    inputs,
    only_norms,
    with_bias,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet import training, whole_chain

over_blocks = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def vendor():
    with fused_resnet.use_engine("vendor"):
        yield


@contextlib.contextmanager
def counted():
    """How often a chain went forward and backward by the ops."""
    with (
        mock.patch.object(whole_chain, "forward", wraps=whole_chain.forward) as forward,
        mock.patch.object(whole_chain, "backward", wraps=whole_chain.backward) as backward,
    ):
        yield lambda: (forward.call_count, backward.call_count)


def op_by_op():
    return mock.patch.object(training, "_runs_whole", return_value=False)


def results(block, x, autocast=None, need_x=True):
    """The output, every gradient, and every buffer, of two steps."""
    block, found = copy.deepcopy(block), []
    for _ in range(2):
        x = x.detach().requires_grad_(need_x)
        kinds = {"device_type": x.device.type, "dtype": autocast or torch.bfloat16}
        with torch.autocast(**kinds, enabled=autocast is not None):
            out = block(x)
        out.backward(gradient(out).to(out.device))
        found += [out.detach().clone(), *(t.grad for t in (x, *block.parameters()))]
        found += [b.clone() for b in block.buffers()]
    return [t for t in found if t is not None]


def check(block, x, autocast=None, need_x=True, whole=True):
    with counted() as calls:
        ours = results(block, x, autocast, need_x)
    assert calls() == ((2, 2) if whole else (0, 0))
    with op_by_op(), counted() as calls:
        theirs = results(block, x, autocast, need_x)
    assert calls() == (0, 0)
    assert [t.stride() for t in ours] == [t.stride() for t in theirs]
    assert_identical(ours, theirs, "whole")


@over_blocks
@pytest.mark.parametrize("memory", ["auto", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_op_by_op(name, memory, dtype):
    check(fused_resnet.fuse(build(name).to(dtype), memory=memory), inputs(0, dtype))


@over_blocks
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("memory", ["auto", "fast"])
def test_under_autocast(name, memory, dtype):
    check(fused_resnet.fuse(build(name), memory=memory), inputs(0, batch=13), dtype)


@pytest.mark.gpu
@over_blocks
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu(name, autocast, monkeypatch):
    """Where it is what the engine that is chosen by itself does."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with fused_resnet.use_engine("auto"):
        check(fused_resnet.fuse(build(name).cuda()), inputs(0, batch=13).cuda(), autocast)


@over_blocks
@pytest.mark.parametrize("change", [c for c in CHANGES if c is not with_bias])
def test_changed(name, change):
    block = build(name)
    change(block)
    check(fused_resnet.fuse(block), inputs(0))


def first_fixed(block):
    next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def last_fixed(block):
    [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1].eval()


def last_weights_fixed(block):
    [m for m in block.modules() if isinstance(m, nn.Conv2d)][-1].requires_grad_(False)


@over_blocks
@pytest.mark.parametrize("change", [first_fixed, last_fixed, last_weights_fixed, only_norms])
def test_where_the_input_needs_no_gradient(name, change):
    block = build(name)
    change(block)
    check(fused_resnet.fuse(block), inputs(0), need_x=False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("change", [None, fixed_statistics], ids=["batch", "fixed"])
def test_norms_in_float32_beside_half(dtype, change):
    block = build("bottleneck-strided").to(dtype)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    if change is not None:
        change(block)
    check(fused_resnet.fuse(block), inputs(0, dtype, batch=13))


def test_weights_inside_one_buffer():
    """As optimizers and FSDP lay them out: each begins somewhere."""
    block = fused_resnet.fuse(build("bottleneck-projection"))
    flat = torch.cat([p.detach().flatten() for p in block.parameters()])
    start = 0
    for p in block.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    check(block, inputs(0))


@pytest.mark.parametrize("shape", [(1, 24, 1, 1), (2, 7, 5, 5)])
def test_what_raises_is_left_to_torch(shape):
    """One value per channel, other channels: as op by op."""
    block = fused_resnet.fuse(build("bottleneck"))
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with pytest.raises((ValueError, RuntimeError)) as ours:
        block(x)
    with op_by_op(), pytest.raises(type(ours.value)) as theirs:
        block(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("left", ["lean", "bias", "contiguous", "native", "counting"])
def test_what_goes_op_by_op(left):
    block, x = build("bottleneck"), inputs(0)
    memory, engine, watching = "auto", "vendor", contextlib.nullcontext()
    if left == "lean":
        memory = "lean"
    elif left == "bias":
        with_bias(block)
    elif left == "contiguous":
        x = x.contiguous()
    elif left == "native":
        engine = "native"
    else:
        watching = FlopCounterMode(display=False)
    with fused_resnet.use_engine(engine), watching:
        check(fused_resnet.fuse(block, memory=memory), x, whole=False)
    if left == "counting":
        assert watching.get_total_flops() > 0


def test_running_statistics_are_declared_as_written():
    schema = torch.ops.fused_resnet.chain_forward.default._schema
    assert [a.name for a in schema.arguments if a.is_write] == ["running"]


@over_blocks
@pytest.mark.parametrize("change", [None, fixed_statistics], ids=["batch", "fixed"])
def test_fakes(name, change):
    """Types, shapes and strides of what the ops return."""
    block = build(name)
    if change is not None:
        change(block)
    found = {}

    def noting(key):
        real = getattr(whole_chain, key)

        def call(*args):
            found[key] = args, real(*args)
            return found[key][1]

        return mock.patch.object(whole_chain, key, call)

    with noting("forward"), noting("backward"):
        results(fused_resnet.fuse(block), inputs(0), torch.bfloat16)
    for key, (args, real) in found.items():
        with FakeTensorMode() as mode, torch.no_grad():
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, args)
            given = getattr(whole_chain, key)(*fakes)
        for ours, theirs in zip(tree_leaves(given), tree_leaves(real), strict=True):
            assert (ours is None) == (theirs is None), key
            if ours is not None:
                assert (ours.dtype, ours.shape, ours.stride()) == (
                    theirs.dtype, theirs.shape, theirs.stride(),
                ), key  # fmt: skip
