"""``fused-resnet report``, ``check``, ``tune`` and ``freeze``: a network of yours, before it is
served or trained."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoints, demo, photographs, sources, variants
from .command import CommandError, positive, require
from .convert import Report, fuse, report
from .freeze import Frozen, freeze
from .frozen_file import save_frozen
from .measure import OURS, Pace, Result, measure
from .tune import Choices, tune

#: Correctness alone.
NO_TIME = Pace(seconds=0, least_rounds=0, most_rounds=0)
LEAST, BATCH = 4, 2  #: images that errors are taken over, and how many at once
MOST_CALIBRATED = 512  #: images that a network in 8 bits is calibrated on
#: Of ImageNet's images, on which torchvision's and timm's networks were trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INT8 = "int8"


def add_commands(commands: Any) -> None:
    """``report``, ``check``, ``tune`` and ``freeze``."""
    shown = commands.add_parser(
        "report", help="what of a network can be fused, and why the rest cannot",
        description="Lists every convolution and its BatchNorm: fused, or why not.",
    )  # fmt: skip
    sources.add_arguments(shown)
    shown.add_argument("--strict", action="store_true", help="exit status 1 if a pair is not fused")
    shown.set_defaults(run=run_report)

    checked = commands.add_parser(
        "check", help="compare a network fused and frozen with itself in float64",
        description="Runs a network as it is, fused and frozen on random images, and compares each "
        "with float64. Exit status 1: the error of one of ours is outside the rule, at most "
        "twice eager torch's and at most 1.5 times in the mean.",
    )  # fmt: skip
    _add_run_arguments(checked)
    checked.add_argument("--seed", type=int, default=0, help="of the images (default: 0)")
    checked.set_defaults(run=run_check)

    tuned = commands.add_parser(
        "tune", help="time the ways that parts of a network can go, and keep the fastest",
        description="Fuses a network and times its ways on random images, in channels_last: the "
        "engines, and torch's own modules. What is fastest is kept in the user's cache folder, "
        "where fused_resnet.tune(model, example) finds it.",
    )  # fmt: skip
    _add_run_arguments(tuned)
    _add_batch(tuned)
    tuned.add_argument("--train", action="store_true",
                       help="for training, of half types by autocast")  # fmt: skip
    tuned.set_defaults(run=run_tune)

    frozen = commands.add_parser(
        "freeze", help="write a network as a file for serving",
        description="Freezes a network, writes what fused_resnet.load_frozen(FILE, model) reads.",
    )  # fmt: skip
    _add_run_arguments(frozen, INT8)
    _add_batch(frozen)
    frozen.add_argument("--calibration", type=Path, metavar="FOLDER",
                        help=f"images like those to come, for --dtype {INT8}: the first "
                        f"{MOST_CALIBRATED} by name, normalized as ImageNet's")  # fmt: skip
    frozen.add_argument("--output", type=Path, required=True, metavar="FILE", help="where to")
    frozen.set_defaults(run=run_freeze)


def _add_run_arguments(parser: argparse.ArgumentParser, *more: str) -> None:
    sources.add_arguments(parser)
    parser.add_argument("--input", type=image, default=(3, 224, 224), metavar="CxHxW",
                        help="an image (default: 3x224x224)")  # fmt: skip
    parser.add_argument("--dtype", choices=(*demo.DTYPES, *more), default="fp32",
                        help="default: fp32")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=1, metavar="N",
                        help="images at once to tune for (default: 1)")  # fmt: skip


def image(text: str) -> tuple[int, ...]:
    """Channels, height and width, for argparse."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError(text)
    return tuple(map(int, text.split("x")))


image.__name__ = "image size, like 3x224x224,"


def run_report(args: argparse.Namespace) -> int:
    """Run ``report``; 1 if ``--strict`` is given and a pair is not fused."""
    entries = _fused(args.model, sources.load(args.model, args.weights).model)
    print(entries)
    return 1 if args.strict and entries.unfused else 0


def run_check(args: argparse.Namespace) -> int:
    """Run ``check``; 1 if something of ours is outside the error rule."""
    network, dtype = _on_device(args), demo.DTYPES[args.dtype]
    one = _images(args, 1, args.seed)
    output = _tried(args, lambda: network.model(one))
    if not isinstance(output, Tensor):
        raise CommandError(
            f"check: the network must return one tensor, got {type(output).__name__}"
        )
    # The rule compares means: over a handful of numbers they differ by chance.
    count = max(LEAST, min(demo.MANY, math.ceil(1000 / max(1, output.numel()))))
    x = _images(args, count, args.seed)
    model = network.model
    if network.untrained:
        model = _tried(args, lambda: checkpoints.seeded(model, x, args.seed))
    truth = demo.reference(model, x, lambda part: None)
    ways = [
        *(variants.eager(model, dtype, layout) for layout in variants.LAYOUTS),
        variants.fused(model, dtype),
        variants.frozen(model, dtype, x[:BATCH]),
    ]
    results = _tried(args, lambda: measure(ways, x.split(BATCH), truth, NO_TIME))
    weights = f"seed {args.seed}" if network.untrained else args.weights or "its own"
    print(f"{args.model}, weights: {weights}; {args.dtype} on {args.device}, {count} images")
    print(_fused(args.model, model).summary)
    print(_table(results))
    return 0 if all(r.within for r in results) else 1


def run_tune(args: argparse.Namespace) -> int:
    """Run ``tune``."""
    network, dtype = _on_device(args), demo.DTYPES[args.dtype]
    model, x = network.model, _images(args, args.batch, 0)
    if network.untrained:  # its activations would not be like those of one in use
        model = _tried(args, lambda: checkpoints.seeded(model, x, 0))
    _fused(args.model, model)
    model = model.to(memory_format=torch.channels_last).train(args.train)
    x = x.contiguous(memory_format=torch.channels_last)
    if not args.train:
        model, x = model.to(dtype), x.to(dtype)
    cast = torch.autocast(args.device, dtype, enabled=args.train and dtype != torch.float32)

    def tuned() -> Choices:
        with cast:
            return tune(model, x)

    choices = _tried(args, tuned)
    print(report(model, engines=True))
    print(choices)
    return 0


def run_freeze(args: argparse.Namespace) -> int:
    """Run ``freeze``."""
    require("serve", "safetensors")
    calibration = _calibration(args)
    network, dtype = _on_device(args), demo.DTYPES.get(args.dtype, torch.int8)
    x = _images(args, args.batch, 0)

    def made() -> Frozen:
        return freeze(network.model, example=x, dtype=dtype, calibration=calibration)

    frozen = _tried(args, made)
    try:
        save_frozen(frozen, args.output)
    except OSError as error:
        raise CommandError(f"--output {args.output}: {error.strerror}") from error
    if network.untrained:
        print(f"{args.model} is NOT TRAINED: --weights was not given")
    for name, found in frozen.errors.items():
        print(f"{name:<11}  mean error {found['mean']:.1e}, max {found['max']:.1e}")
        if "top5" in found:
            print(f"{'':<11}  of the five likeliest classes {found['top5']:.1%} as in fp32")
    for layer, why in frozen.unfolded.items():
        print(f"{layer} is not folded: {why}")
    print(_fused(args.model, network.model).summary)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {args.dtype}")
    return 0


def _calibration(args: argparse.Namespace) -> list[Tensor] | None:
    """The images of a folder, cut to what the network reads."""
    if args.dtype != INT8:
        if args.calibration is not None:
            raise CommandError(f"--calibration is for --dtype {INT8}, got --dtype {args.dtype}")
        return None
    channels, height, width = args.input
    if args.calibration is None or channels != 3:
        raise CommandError(
            f"--dtype {INT8} needs --calibration, a folder of images like those to come, and a "
            f"network of 3 channels (--input), got {args.calibration} and {channels}"
        )
    require("demo", "PIL")
    from PIL import ImageOps
    from torchvision.transforms import functional

    def read(image: Any) -> Tensor:
        pixels = functional.pil_to_tensor(ImageOps.fit(image, (width, height))) / 255
        return functional.normalize(pixels, MEAN, DEVIATION)

    loaded = photographs.load(args.calibration, MOST_CALIBRATED, read, "--calibration")
    return list(loaded.pixels.split(BATCH))


def _fused(name: str, model: nn.Module) -> Report:
    try:
        return report(fuse(model))
    except RuntimeError as error:
        raise CommandError(f"--model {name}: {error}") from error


def _on_device(args: argparse.Namespace) -> sources.Network:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no GPU")
    network = sources.load(args.model, args.weights)
    return network._replace(model=network.model.to(args.device))


def _images(args: argparse.Namespace, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *args.input, generator=generator).to(args.device)


def _tried(args: argparse.Namespace, call: Callable[[], Any]) -> Any:
    """What ``call`` returns, without gradients; its error in a line, with what the network read."""
    try:
        with torch.no_grad():
            return call()
    except (RuntimeError, TypeError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        read = "x".join(map(str, args.input))
        raise CommandError(f"{args.model} on images of {read} (--input): {text}") from error


def _table(results: list[Result]) -> str:
    lines = [f"{'':<12}{'mean error':>12}{'max error':>12}"]
    for r in results:
        mean, largest = r.error or (math.nan, math.nan)
        verdict = "" if r.kind != OURS else "within the rule" if r.within else "OUTSIDE THE RULE"
        lines.append(f"{r.variant:<12}{mean:>12.1e}{largest:>12.1e}  {verdict}".rstrip())
    return "\n".join(lines)
