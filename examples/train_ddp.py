"""Train on several processes, fused: DistributedDataParallel over gloo (CPU) or NCCL (CUDA).

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 8 examples/train_ddp.py --sync-bn

``fuse`` comes before ``DistributedDataParallel``; so does conversion to SyncBatchNorm, and before
both. Every process must make the same number of steps, or the others wait for its gradients for
ever: ``DistributedSampler(drop_last=True)`` gives each the same number of images, and
``DataLoader(drop_last=True)`` leaves out the batch at the end that is smaller than the others
(BatchNorm refuses one that is a single image). What is left out changes from epoch to epoch. In
evaluation nothing is dropped and nothing counted twice: each process takes every n-th image, and
counts are added up.

After every epoch process 0 writes OUTPUT_DIR/checkpoint.pth; ``--resume auto`` goes on from it.
Signals stop all processes after the same step.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import resumable
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from train_digits import digits, network

import fused_resnet
from fused_resnet.command import CommandError, positive, require


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--data", default="digits", choices=["digits", "synthetic"],
        help="scikit-learn's digits, or noise of their size (default: digits)")  # fmt: skip
    add("--epochs", type=positive, default=10)
    add("--batch-size", type=positive, default=32, help="of each process (default: 32)")
    add("--lr", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes")
    add("--resume", metavar="FILE|auto", help="auto: OUTPUT_DIR/checkpoint.pth, if there is one")
    add("--output-dir", type=Path, default=Path("fused-resnet-ddp"), metavar="FOLDER")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=positive, default=1, help="of each process (default: 1)")
    return parser.parse_args()


def synthetic() -> tuple[TensorDataset, TensorDataset]:
    """Noise; the class is where its brightest column is, so that there is something to learn."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(600, 1, 8, 8, generator=draws)
    data = TensorDataset(images, images.sum((1, 2)).argmax(1))
    return TensorDataset(*data[:500]), TensorDataset(*data[500:])


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    stop: resumable.Stop,
) -> float:
    """One pass over the images; the mean loss of all processes."""
    model.train()
    total = torch.zeros((), device=device)
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        check_together(stop, device)
    dist.all_reduce(total)
    return total.item() / len(loader) / dist.get_world_size()


def accuracy(model: nn.Module, data: TensorDataset, args: argparse.Namespace) -> float:
    """The share of ``data`` whose class is found, by all processes together."""
    share = Subset(data, range(dist.get_rank(), len(data), dist.get_world_size()))
    right = torch.zeros((), device=args.device)
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(share, args.batch_size):
            found = model(images.to(args.device)).argmax(1)
            right += (found == labels.to(args.device)).sum()
    dist.all_reduce(right)
    return right.item() / len(data)


def check_together(stop: resumable.Stop, device: torch.device) -> None:
    """Stop all processes if one was told to: alone, it would leave the others waiting."""
    number = torch.tensor(stop.number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:  # not stop.number: what came meanwhile the others learn after the next step
        raise resumable.StoppedError(int(number))


def differing(model: nn.Module) -> int:
    """How many parameters are not the same, bit for bit, in all processes."""
    bits = parameters_to_vector(model.parameters()).detach().view(torch.int32)
    low, high = bits.clone(), bits.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return int((low != high).sum())


def main(stop: resumable.Stop) -> int:
    args = arguments()
    if args.data == "digits":
        require("examples", "sklearn")
    torch.set_num_threads(args.threads)
    rank, device = dist.get_rank(), torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    data, held_out = digits() if args.data == "digits" else synthetic()
    least = args.batch_size * dist.get_world_size()
    if len(data) < least:
        raise CommandError(
            f"--batch-size {args.batch_size} of {dist.get_world_size()} processes needs {least} "
            f"training images, got {len(data)}"
        )
    checkpoint = args.output_dir / "checkpoint.pth"
    source = resumable.find(args.resume, checkpoint)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output-dir {args.output_dir}: {error.strerror}") from error

    model: nn.Module = network(args.seed).to(device)
    if args.sync_bn:
        model = fused_resnet.SyncBatchNorm.convert_sync_batchnorm(model)
    fused_resnet.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    parts: dict[str, resumable.Part] = {"model": model, "optimizer": optimizer}
    recipe = {name: getattr(args, name) for name in ("data", "batch_size", "lr", "seed", "sync_bn")}
    recipe["processes"] = dist.get_world_size()
    start = 0 if source is None else resumable.restore(source, parts, recipe)
    if source is not None:
        say(f"resumed from {source}: {start} epochs done")
    parallel = DistributedDataParallel(model)

    # Shuffles by seed and epoch alone: no state of it need be saved.
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        data, seed=args.seed, drop_last=True
    )
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    with stop.explained(checkpoint):
        for epoch in range(start, args.epochs):
            sampler.set_epoch(epoch)
            loss = train_epoch(parallel, loader, optimizer, device, stop)
            if not math.isfinite(loss):  # before it is saved over a state that is sound
                raise CommandError(f"epoch {epoch + 1}: the loss is {loss}; try a smaller --lr")
            right = accuracy(model, held_out, args)
            if rank == 0:
                resumable.save(checkpoint, epoch + 1, parts, recipe)
            say(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, test {right:.2%}")
    if odd := differing(model):
        raise CommandError(f"{odd} parameters differ between the processes")
    say(f"parameters are equal in all {dist.get_world_size()} processes; {checkpoint}")
    return 0


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("train_ddp.py: start it with torchrun --nproc-per-node N examples/train_ddp.py")
    dist.init_process_group()
    status = resumable.guarded(main, quiet=dist.get_rank() != 0)
    if status != 1:  # after an error the others may not be there to say goodbye to
        dist.destroy_process_group()
    sys.exit(status)
