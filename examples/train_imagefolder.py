"""Train a ResNet, fused, on a folder of images: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg.

    python examples/train_imagefolder.py PATH --model resnet50 --epochs 90 --amp

The recipe and the options are those of torchvision's reference script; ``fused_resnet.fuse`` is
the one line that differs (``--no-fuse`` leaves it out). After every epoch the whole state goes to
OUTPUT_DIR/checkpoint.pth. Ctrl-C or SIGTERM end the run after the step it is in, kill -9 or a power
cut at once; either way the same command with ``--resume auto`` goes on after the last whole epoch,
and with the same number of workers and threads ends, on a CPU, with the very same bits.

The last training batch is dropped if it is smaller than the others. ``fused-resnet demo --weights
OUTPUT_DIR/checkpoint.pth`` runs what was trained.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resumable
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

import fused_resnet
from fused_resnet.command import CommandError, positive, require

#: Options a checkpoint must agree in. More epochs may be asked for later.
RECIPE = (
    *("model", "size", "batch_size", "lr", "momentum", "weight_decay", "norm_weight_decay"),
    *("label_smoothing", "lr_scheduler", "lr_warmup_epochs", "amp", "model_ema"),
    *("model_ema_decay", "seed"),
)
WARMUP_START = 0.01  # of the learning rate, as in torchvision's recipe


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="with the folders train and val")
    add("--model", default="resnet50", choices=fused_resnet.models.__all__, metavar="NAME",
        help=f"one of {', '.join(fused_resnet.models.__all__)} (default: resnet50)")  # fmt: skip
    add("--size", type=positive, default=224, metavar="PIXELS", help="of crops (default: 224)")
    add("--epochs", type=positive, default=90)
    add("--batch-size", type=positive, default=32)
    add("--lr", type=float, default=0.1)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--norm-weight-decay", type=float, help="of BatchNorm (default: as --weight-decay)")
    add("--label-smoothing", type=float, default=0.0)
    add("--lr-scheduler", default="cosine", choices=["cosine", "constant"])
    add("--lr-warmup-epochs", type=count, default=0, help="linear, before the scheduler's")
    add("--amp", action="store_true", help="bfloat16 on a CPU, float16 with scaling on CUDA")
    add("--model-ema", action="store_true", help="also keep a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9999, help="per step (default: 0.9999)")
    add("--resume", metavar="FILE|auto", help="auto: OUTPUT_DIR/checkpoint.pth, if there is one")
    add("--output-dir", type=Path, default=Path("fused-resnet-training"), metavar="FOLDER")
    add("--workers", type=count, default=4, help="processes that load images (default: 4)")
    add("--seed", type=int, default=0)
    add("--no-fuse", action="store_true", help="train torchvision's model as it is")
    cuda = torch.cuda.is_available()
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    add("--threads", type=positive, help="of torch (default: torch's own choice)")
    args = parser.parse_args()
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: torch.cuda.is_available() is False")
    return args


def datasets(path: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """The training and the validation images, with torchvision's usual augmentation."""
    end = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    val = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *end])
    found = []
    for name, transform in (("train", train), ("val", val)):
        try:
            found.append(ImageFolder(path / name, transform))
        except OSError as error:  # ImageFolder's words for "no classes", "no images of a class"
            reason = error.strerror or str(error)
            raise CommandError(f"{path / name}: {' '.join(reason.split())}") from error
    if found[0].classes != found[1].classes:
        odd = sorted(set(found[0].classes) ^ set(found[1].classes))
        raise CommandError(
            f"{path / 'val'}: must have the classes of {path / 'train'}, but {len(odd)} are in "
            f"only one of them: {', '.join(odd[:5])}"
        )
    return found[0], found[1]


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD; BatchNorm's parameters may have a weight decay of their own."""
    groups: Any = model.parameters()
    if args.norm_weight_decay is not None:
        norm, other = split_normalization_params(model)
        decays = (args.norm_weight_decay, args.weight_decay)
        groups = [
            {"params": p, "weight_decay": d} for p, d in zip((norm, other), decays, strict=True)
        ]
    return torch.optim.SGD(
        groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


def schedule(args: argparse.Namespace) -> Callable[[int], float]:
    """The factor of the learning rate, from the number of the epoch alone: a run that is resumed
    needs no other state, and may be resumed with more epochs."""

    def factor(epoch: int) -> float:
        warmup = args.lr_warmup_epochs
        if epoch < warmup:
            return WARMUP_START + (1 - WARMUP_START) * epoch / warmup
        if args.lr_scheduler == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / max(args.epochs - warmup, 1))

    return factor


def main(stop: resumable.Stop) -> int:
    args = arguments()
    require("examples", "rich")
    if args.threads:
        torch.set_num_threads(args.threads)
    train_set, val_set = datasets(args.path, args.size)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output-dir {args.output_dir}: {error.strerror}") from error
    checkpoint = args.output_dir / "checkpoint.pth"
    source = resumable.find(args.resume, checkpoint)

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    draws = torch.Generator().manual_seed(args.seed)
    common = {"num_workers": args.workers, "worker_init_fn": resumable.ignore_signals,
              "pin_memory": args.device == "cuda"}  # fmt: skip
    # Workers are started anew every epoch, so that what they draw depends on `draws` alone.
    train_loader = DataLoader(
        train_set, args.batch_size, shuffle=True, generator=draws,
        drop_last=len(train_set) > args.batch_size, **common,
    )  # fmt: skip
    val_loader = DataLoader(val_set, args.batch_size, **common)

    model = torchvision.models.get_model(args.model, num_classes=len(train_set.classes))
    model = model.to(args.device, memory_format=torch.channels_last)
    if not args.no_fuse:
        fused_resnet.fuse(model)
    ema = None
    if args.model_ema:
        average = get_ema_multi_avg_fn(args.model_ema_decay)
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    optimizer = optimizer_for(model, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp and args.device == "cuda")
    parts: dict[str, resumable.Part] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if ema is not None:
        parts["ema"] = ema
    parts["random"] = resumable.RandomState(draws)
    recipe = {name: getattr(args, name) for name in RECIPE} | {"classes": train_set.classes}
    start = 0
    if source is not None:
        start = resumable.restore(source, parts, recipe)
        print(f"resumed from {source}: {start} epochs done", flush=True)
    scheduler = LambdaLR(optimizer, schedule(args), last_epoch=start - 1)

    with stop.explained(checkpoint):
        for epoch in range(start, args.epochs):
            began = time.perf_counter()
            rate = scheduler.get_last_lr()[0]
            loss = train_epoch(model, ema, train_loader, optimizer, scaler, args, stop, epoch)
            scheduler.step()
            if not math.isfinite(loss):  # before it is saved over a state that is sound
                raise CommandError(f"epoch {epoch + 1}: the loss is {loss}; try a smaller --lr")
            scores = f"val {evaluate(model, val_loader, args, stop):.2%}"
            if ema is not None:
                scores += f", averaged {evaluate(ema, val_loader, args, stop):.2%}"
            resumable.save(checkpoint, epoch + 1, parts, recipe)
            print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, {scores}, lr {rate:.4g}, "
                  f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
    print(f"{max(start, args.epochs)} epochs done, {checkpoint}")
    return 0


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = torch.bfloat16 if args.device == "cpu" else torch.float16
    return torch.autocast(args.device, dtype, enabled=args.amp)


def to_device(images: Tensor, args: argparse.Namespace) -> Tensor:
    return images.to(args.device, non_blocking=True, memory_format=torch.channels_last)


def train_epoch(
    model: nn.Module,
    ema: AveragedModel | None,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    stop: resumable.Stop,
    epoch: int,
) -> float:
    """One pass over the images; the mean loss."""
    from rich.progress import track

    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    model.train()
    total = torch.zeros((), device=args.device)
    title, hidden = f"epoch {epoch + 1}/{args.epochs}", not sys.stdout.isatty()
    for images, labels in track(loader, title, transient=True, disable=hidden):
        with autocast(args):
            loss = criterion(model(to_device(images, args)), labels.to(args.device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.update_parameters(model)
        total += loss.detach()
        stop.check()
    return total.item() / len(loader)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, args: argparse.Namespace, stop: resumable.Stop
) -> float:
    """The share of images whose class is found."""
    model.eval()
    right = 0
    for images, labels in loader:
        with autocast(args):
            found = model(to_device(images, args)).argmax(1)
        right += int((found == labels.to(args.device)).sum())
        stop.check()
    return right / len(loader.dataset)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(resumable.guarded(main))
