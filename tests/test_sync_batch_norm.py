"""BatchNorm over two processes: what each computes, beside one process with both batches."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import build, gradient, inputs
from tolerances import judge
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet
from fused_resnet import training

#: Images of the first and of the second process.
SPLITS = {"even": (3, 3), "uneven": (4, 2), "empty": (6, 0)}
UNITS = ("bottleneck-strided", "bottleneck-wide", "basic-projection", "norm-alone")


def block_of(name: str) -> nn.Module:
    if name == "norm-alone":
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm2d(24), nn.Hardswish(), nn.BatchNorm2d(24))
    return build(name)


def outcome(block: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = block(x)
    out.backward(g)
    buffers = [b for b in block.buffers() if b.is_floating_point()]
    return [out.detach(), x.grad, *buffers, *(p.grad for p in block.parameters())]


def whole(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    block = block_of(name).to(dtype)
    x = inputs(0, dtype, sum(SPLITS["even"]))
    with torch.no_grad():
        g = gradient(copy.deepcopy(block)(x))
    return block, x, g


def part(t: Tensor, split: tuple[int, int], rank: int) -> Tensor:
    return t[: split[0]] if rank == 0 else t[split[0] :]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    chains = []
    forward = training.Chain.forward

    def counted(ctx, plan, *args):
        chains.append(plan.group)
        return forward(ctx, plan, *args)

    training.Chain.forward = staticmethod(counted)
    results = {}
    for name in UNITS:
        for split, sizes in SPLITS.items():
            block, x, g = whole(name)
            block = fused_resnet.fuse(fused_resnet.SyncBatchNorm.convert_sync_batchnorm(block))
            chains.clear()
            results[name, split] = outcome(block, part(x, sizes, rank), part(g, sizes, rank))
            assert chains == ([] if name == "norm-alone" else [dist.group.WORLD])
    block, x, g = whole("bottleneck-strided")
    block = fused_resnet.SyncBatchNorm.convert_sync_batchnorm(fused_resnet.fuse(block))
    wrapped = DistributedDataParallel(block)
    sizes = SPLITS["uneven"]
    results["ddp"] = outcome(wrapped, part(x, sizes, rank), part(g, sizes, rank))
    plain = DistributedDataParallel(fused_resnet.fuse(build("bottleneck-strided")))
    results["ddp-plain"] = outcome(plain, part(x, sizes, rank), part(g, sizes, rank))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found; they meet on this machine alone."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@functools.cache
def alone(name: str, dtype: torch.dtype) -> list[Tensor]:
    with fused_resnet.use_engine("reference"):
        return outcome(*whole(name, dtype))


def joined(a: list[Tensor], b: list[Tensor], buffers: int, share: float = 1.0) -> list[Tensor]:
    """One process's outcome, made of two: images side by side, gradients of parameters added."""
    images = [torch.cat(pair) for pair in zip(a[:2], b[:2], strict=True)]
    for one, other in zip(a[2 : 2 + buffers], b[2 : 2 + buffers], strict=True):
        assert torch.equal(one, other), "running statistics differ between the processes"
    added = [share * (p + q) for p, q in zip(a[2 + buffers :], b[2 + buffers :], strict=True)]
    return [*images, *a[2 : 2 + buffers], *added]


def number_of_buffers(name: str) -> int:
    return sum(b.is_floating_point() for b in block_of(name).buffers())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", UNITS)
def test_two_processes_are_one(name, split, ranks):
    ours = joined(*(r[name, split] for r in ranks), number_of_buffers(name))
    judge(ours, alone(name, torch.float32), alone(name, torch.float64))


def test_under_distributed_data_parallel(ranks):
    """Its gradients are means over the processes, the same in both."""
    name = "bottleneck-strided"
    for a, b in zip(*(r["ddp"][2:] for r in ranks), strict=True):
        assert torch.equal(a, b)
    ours = joined(*(r["ddp"] for r in ranks), number_of_buffers(name))
    judge(ours, alone(name, torch.float32), alone(name, torch.float64))


def test_distributed_data_parallel_without_it(ranks):
    """Each process normalises by its own batch; gradients are means of theirs."""
    name, sizes = "bottleneck-strided", SPLITS["uneven"]
    sides = []
    for dtype in (torch.float32, torch.float64):
        found = []
        for rank in (0, 1):
            block, x, g = whole(name, dtype)
            with fused_resnet.use_engine("reference"):
                found.append(outcome(block, part(x, sizes, rank), part(g, sizes, rank)))
        first = 2 + number_of_buffers(name)
        sides.append([(p + q) / 2 for p, q in zip(*(f[first:] for f in found), strict=True)])
    for r in ranks:
        judge(r["ddp-plain"][first:], *sides)


def test_alone_it_is_batch_norm():
    """Without a process group, and in evaluation."""
    block, x = build("bottleneck"), inputs(0)
    converted = fused_resnet.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert all(type(m) is not nn.BatchNorm2d for m in converted.modules())
    assert list(converted.state_dict()) == list(block.state_dict())
    assert torch.equal(converted(x), block(x))
    assert torch.equal(converted.eval()(x), block.eval()(x))
