"""What the op tests do not show of the Triton engine: its raw ops, its launches, its configs."""

import threading

import pytest
import torch
from cases import Source, assert_identical, channels_last, copied, of_tensors, shadow
from models import basic, bottleneck, double, images
from tolerances import judge
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fused_resnet import engines, functional, fuse, use_engine

if (why := engines.unavailable("triton")) is not None:
    pytest.skip(f"no triton engine: {why}", allow_module_level=True)

from fused_resnet.triton_kernels import launch, ops, tiles

RAW = torch.ops.fused_resnet_triton
POOL = ([3, 3], [2, 2], [1, 1], [1, 1])


def arguments(channels: int = 5) -> dict[str, tuple]:
    """Of every op that is not a convolution, by name."""
    source = Source(0, torch.float32)
    grad, x, other = (channels_last(source.normal(2, channels, 6, 7)) for _ in range(3))
    out = torch.relu(other)
    scale, shift, mean, invstd, *sums = (source.uniform(0.5, 1.5, channels) for _ in range(6))
    pooled, argmax = torch.ops.fused_resnet.bn_act_maxpool_train(
        x, scale, shift, *POOL, False, "relu"
    )
    batch = (mean, invstd, *sums, 84.0)
    weight, rows = source.normal(9, channels), source.uniform(0.5, 1.5, 9)
    gram = source.normal(channels, channels).double()
    return {
        "bn_act": (x, scale, shift, other, "relu"),
        "bn_act_": (x, scale, shift, other, "relu"),
        "bn_act_backward": (grad, x, out, scale, shift, *batch, "relu"),
        "bn_act_backward_": (grad, x, None, scale, shift, *batch, "relu"),
        "bn_act_backward_reduce": (grad, x, out, scale, shift, mean, invstd, "relu"),
        "bn_act_maxpool": (x, scale, shift, *POOL, True, "relu"),
        "bn_act_maxpool_backward": (pooled, pooled, argmax, x, scale, *batch, *POOL, "relu"),
        "bn_act_maxpool_backward_reduce": (
            *(pooled, pooled, argmax, x, mean, invstd),
            *(*POOL, "relu"),
        ),
        "bn_act_maxpool_train": (x, scale, shift, *POOL, False, "relu"),
        "bn_finalize": (mean, invstd, 84.0, scale, shift, *sums, 0.1, 1e-5),
        "bn_scale_shift": (mean, invstd, scale, shift, 1e-5),
        "bn_stats": (x,),
        "eltwise_act": ([x, other], "sum", [1.0, -0.5], "relu"),
        "eltwise_act_backward": (grad, [x, other], out, "max", None, "relu"),
        "global_avg_pool": (x,),
        "gram_gradients": (weight, weight + 1, *(rows for _ in range(4)), None, 84.0),
        "gram_moments": (gram, gram[0], mean, 84.0),
        "gram_stats": (weight, weight + 1, gram[0], mean, 84.0),
        "relu_backward_reduce": (grad, out),
    }


ARGUMENTS = arguments()
over_ops = pytest.mark.parametrize("op", ARGUMENTS)


REDUCTIONS = [
    op for op in ARGUMENTS if op in ("bn_stats", "global_avg_pool") or op.endswith("_reduce")
]


def in_float64(t):
    return t if t.dtype == torch.uint8 else t.double()


def run(op: str, *args):
    """Its results, or what it has written."""
    given = copied(list(args))
    result = getattr(RAW, op)(*given)
    return given[0] if result is None else (result, given)


@over_ops
def test_opcheck(op):
    torch.library.opcheck(getattr(RAW, op).default, ARGUMENTS[op])


@over_ops
def test_every_config(op, monkeypatch):
    """Tiles of another size change no map, and of sums only how they are rounded."""
    args = arguments(70)[op]
    expected = run(op, *args)
    native = getattr(torch.ops.fused_resnet, op)
    exact = native(*of_tensors(in_float64, args)) if op in REDUCTIONS else None
    for index in range(len(tiles.CONFIGS)):
        monkeypatch.setattr(launch, "forced_config", index)
        result = run(op, *args)
        if exact is None:
            assert_identical(result, expected)
        else:
            for sums in zip(*map(tree_leaves, (result[0], native(*args), exact)), strict=True):
                judge(*([each] for each in sums))


@over_ops
def test_meta_tensors_are_planned_and_not_run(op):
    """What the benchmark counts and ahead-of-time compilation compiles is what is launched."""
    with launch.recording() as real:
        run(op, *ARGUMENTS[op])
    with launch.recording() as planned:
        ops.IMPLEMENTATIONS[op](*shadow(ARGUMENTS[op]))
    assert [each.kernel for each in planned] == [each.kernel for each in real]
    for ours, theirs in zip(planned, real, strict=True):
        assert (ours.grid, ours.numbers, ours.meta) == (theirs.grid, theirs.numbers, theirs.meta)
        assert ours.bytes() == theirs.bytes() > 0


def test_a_launch_says_what_it_moves():
    x, scale, shift, other, _ = shadow(ARGUMENTS["bn_act"])
    with launch.recording() as launches:
        ops.IMPLEMENTATIONS["bn_act"](x, scale, shift, other, "relu")
        ops.IMPLEMENTATIONS["bn_stats"](x)
    assert [each.finalizes for each in launches] == [False, False, True]
    assert launches[0].bytes() == 4 * (3 * x.numel() + 2 * x.size(1))
    assert launches[1].bytes() == 4 * x.numel() + 2 * 8 * x.size(1)


def test_nothing_is_launched_for_nothing():
    x, vector = torch.empty(0, 5, 3, 4), torch.ones(5)
    with launch.recording() as launches:
        RAW.bn_act(x, vector, vector, None, "relu")
    assert not launches


@over_ops
def test_on_many_threads_at_once(op):
    expected, wrong = run(op, *ARGUMENTS[op]), []

    def work():
        for _ in range(3):
            try:
                assert_identical(run(op, *ARGUMENTS[op]), expected)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def products(source: Source, channels: tuple[int, int]) -> dict[str, tuple]:
    """Arguments with which an op is a plain product of matrices, with and without
    a prologue; of a second tensor, for which there are no descriptors."""
    into, of = channels
    x, grad, y = (source.normal(2, n, 9, 10) for n in (into, of, of))
    weight = source.normal(of, into, 1, 1) / into**0.5
    a, b = (source.batch_norm(into)[name] for name in ("gamma", "beta"))
    c, d, e = (source.batch_norm(of)[name] for name in ("gamma", "beta", "mean"))
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    nothing = [None] * 5
    given = {
        "bn_act_conv_bn_act": (x, a, b, "relu", weight, c, d, y, *geometry, "relu"),
        "bn_act_conv_stats": (x, None, None, "none", weight, *geometry),
        "bn_backward_conv_dgrad": (grad, y, c, d, e, weight, x, *nothing, [9, 10], *geometry),
    }
    return {op: tuple(of_tensors(channels_last, list(args))) for op, args in given.items()}


@pytest.mark.parametrize("channels", [(24, 40), (72, 136), (20, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", products(Source(0, torch.float32), (8, 8)))
def test_products_by_descriptors(op, dtype, channels, monkeypatch):
    """By tiles that a GPU loads by itself, of rows that are a multiple of 16 bytes."""
    monkeypatch.setattr(launch, "forced_config", 3)
    specification = engines.implementation(op, "reference")
    results = []
    for seed in range(3):
        args = products(Source(seed, dtype), channels)[op]
        with launch.recording() as launches:
            found = ops.IMPLEMENTATIONS[op](*args)
        exact = specification(*of_tensors(in_float64, list(args)))
        results.append([tree_leaves(each)[0] for each in (found, specification(*args), exact)])
        fits = all(n * dtype.itemsize % 16 == 0 for n in channels)
        alone = op != "bn_backward_conv_dgrad" and dtype != torch.float64
        assert launches[0].meta["DESCRIPTORS"] == (fits and alone)
    judge(*zip(*results, strict=True))


def test_descriptors_are_of_aligned_addresses(monkeypatch):
    monkeypatch.setattr(launch, "forced_config", 3)
    memory = torch.zeros(2 * 24 * 90 + 1)
    weight = channels_last(torch.ones(40, 24, 1, 1))
    for start in (0, 1):
        x = memory[start:][: 2 * 24 * 90].view(2, 9, 10, 24).permute(0, 3, 1, 2)
        with launch.recording() as launches:
            RAW.conv_bn_act(x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none")
        assert launches[0].meta["DESCRIPTORS"] == (start == 0)


@pytest.mark.parametrize(
    "build", [bottleneck, lambda seed: bottleneck(seed, stride=2), lambda seed: basic(seed, 32)]
)
def test_a_projection_is_a_second_product(build):
    """In inference: of the convolution that ends the block, whose output it would be added to."""
    found = []
    for seed in range(3):
        block, x = build(seed), channels_last(images(seed, 2, 9, channels=24))
        with torch.no_grad(), launch.recording() as launches:
            exact, eager = double(block, x), block(x)
            with use_engine("triton"):
                found.append((fuse(block)(x), eager, exact))
        kernels = [this.kernel.fn.__name__ for this in launches]
        assert kernels.count("conv_gemm") == len(block.chain)
    judge(*zip(*found, strict=True))


@pytest.mark.parametrize("pool", [False, True], ids=["", "maxpool"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm_trains(layout, pool):
    """Forward, gradients and running statistics by the rule, as eager torch's."""
    source = Source(0, torch.float32)
    x = source.normal(3, 20, 9, 8).contiguous(memory_format=layout)
    weight, bias = source.uniform(0.5, 1.5, 20), source.normal(20)

    def trained(dtype, forward):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        running = torch.zeros(20, dtype=dtype), torch.ones(20, dtype=dtype)
        y = forward(leaves[0], *running, *leaves[1:])
        (y * y).sum().backward()
        return [y, *running, *(leaf.grad for leaf in leaves)]

    def ours(*args):
        with use_engine("triton"):
            if pool:
                return functional.batch_norm_act_maxpool(*args, kernel_size=3, stride=2, padding=1)
            return functional.batch_norm_act(*args)

    def eager(*args):
        y = F.batch_norm(*args, training=True).relu()
        return F.max_pool2d(y, 3, 2, 1) if pool else y

    for each in zip(
        trained(torch.float32, ours),
        trained(torch.float32, eager),
        trained(torch.float64, eager),
        strict=True,
    ):
        assert each[0].stride() == each[1].stride()
        judge(*([t] for t in each))
