"""``fused-resnet demo``: a network on photographs, checked against torchvision, and timed."""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn

from . import chart, checkpoints, facts, photographs, variants
from .command import CommandError, positive, require
from .measure import OURS, PEER, Pace, Runner, Variant, likeliest_shared, measure, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: The whole run stays under five minutes on two cores, compilation included.
ENOUGH = 240.0
MANY = 32  #: images, if a network with few outputs is to be judged
PACE = Pace(seconds=15, least_rounds=3, most_rounds=40)
QUICK = Pace(seconds=5, least_rounds=3, most_rounds=40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fused-resnet demo``."""
    add = parser.add_argument
    add("--model", default="resnet50", choices=checkpoints.MODELS, metavar="NAME",
        help=f"one of {', '.join(checkpoints.MODELS)} (default: resnet50)")  # fmt: skip
    add("--images", type=Path, metavar="FOLDER",
        help="photographs to use (default: those inside scikit-image)")  # fmt: skip
    add("--weights", type=Path, metavar="FILE",
        help="a checkpoint, read with weights_only=True (default: torchvision's weights if here or "
        "the network has them, else a seeded network)")  # fmt: skip
    add("--no-download", action="store_true", help="do not ask the network for weights")
    add("--quick", action="store_true",
        help="under a minute: batch 1, fp32, 6 photographs, no torch.compile")  # fmt: skip
    add("--batch", type=positive, nargs="+", metavar="N", help="batch sizes (default: 1 16)")
    add("--dtype", nargs="+", choices=DTYPES, help="default: fp32 bf16")
    add("--photographs", type=positive, metavar="N", help="use at most N (default: 16)")
    add("--size", type=positive, metavar="PIXELS",
        help="crop to PIXELS x PIXELS (default: as torchvision's preprocessing)")  # fmt: skip
    add("--seconds", type=float, metavar="S", help="time each case for about S seconds")
    add("--threads", type=positive, metavar="N", help="default: the number of physical cores")
    add("--seed", type=int, default=0, help="of the seeded network (default: 0)")
    add("--output", type=Path, default=Path("fused-resnet-demo"), metavar="FOLDER",
        help="where results.json and chart.png go (default: fused-resnet-demo)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 if something of ours is outside the error rule."""
    require("demo", "rich", "matplotlib", "numpy", "PIL", *([] if args.images else ["skimage"]))
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    started = time.perf_counter()
    torch.set_num_threads(args.threads or facts.physical_cores())
    output: Path = args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {output}: {error.strerror}") from error

    photos = photographs.load(
        args.images, args.photographs or (6 if args.quick else 16), preprocessing(args)
    )
    model, weights = network(args, photos.pixels, console)
    console.print(
        f"[bold]{args.model}[/], {weights}\n{len(photos.names)} photographs of "
        f"{photos.pixels.shape[2]}x{photos.pixels.shape[3]} from "
        f"{args.images or 'scikit-image'}; {torch.get_num_threads()} threads",
        highlight=False,
    )
    rows = compare(args, model, photos.pixels, console)
    console.print(table(rows))
    console.print(LEGEND, style="dim", highlight=False)
    content = {
        "schema": 1,
        "command": "demo",
        "environment": facts.environment(),
        "model": args.model,
        "weights": weights,
        "photographs": photos.names,
        "size": list(photos.pixels.shape[2:]),
        "results": rows,
    }
    picture = output / "chart.png"
    machine = f"{facts.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    write_json(output / "results.json", content)
    chart.throughput(f"{args.model}, inference", machine, rows, picture)
    console.print(f"results  {output / 'results.json'}\nchart    {picture}", highlight=False)
    failed = [r for r in rows if r["kind"] == OURS and not r["within"]]
    for r in failed:
        console.print(f"[bold red]FAILED[/] {r['case']}: {r['variant']}: {r['why_not']}")
    if not failed:
        console.print(
            f"[bold green]fused and frozen agree with torchvision[/] in every case; "
            f"{time.perf_counter() - started:.0f} s in all",
            highlight=False,
        )
    return 1 if failed else 0


LEGEND = (
    "error: against the same network in float64, relative to its largest output, over all "
    "photographs. top-5: classes shared with float64's five. time: median (quartiles) of a call, "
    "variants in turn. vs eager: over the faster eager, round by round. prepare: from the model "
    "to its first output; compilation, tuning and freeze's own error check are in it."
)


def preprocessing(args: argparse.Namespace) -> Any:
    """torchvision's own for the model's best weights; cropped to another size on demand."""
    transforms = torchvision.models.get_model_weights(args.model).DEFAULT.transforms
    if args.size is None:
        return transforms()
    standard = transforms()
    resize = round(args.size * standard.resize_size[0] / standard.crop_size[0])
    return transforms(crop_size=args.size, resize_size=resize)


def network(args: argparse.Namespace, pixels: Tensor, console: "Console") -> tuple[nn.Module, str]:
    """The model and where its weights come from, in words."""
    if args.weights is not None:
        return checkpoints.from_file(args.model, args.weights), f"weights of {args.weights.name}"
    why = "--no-download was given"
    if not args.no_download:
        console.print(f"looking for torchvision's weights of {args.model}", style="dim")
        try:
            model, name = checkpoints.from_torchvision(args.model)
            return model, f"torchvision's weights {name}"
        except checkpoints.NotThereError as error:
            why = str(error)
    model = checkpoints.seeded(checkpoints.build(args.model), pixels, args.seed)
    return model, (
        f"NOT TRAINED: seeded weights (seed {args.seed}), BatchNorm statistics set by running the "
        f"photographs through it, because {why}"
    )


def cases(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """The batch sizes and dtypes asked for."""
    for batch in args.batch or ([1] if args.quick else [1, 16]):
        for dtype in args.dtype or (["fp32"] if args.quick else ["fp32", "bf16"]):
            yield batch, dtype


def compare(
    args: argparse.Namespace, model: nn.Module, pixels: Tensor, console: "Console"
) -> list[dict[str, Any]]:
    """Measure every case; its results as they go into JSON."""
    started = time.perf_counter()
    rows = []
    with progress(console) as bar:
        task = bar.add_task("float64 reference", total=1.0)
        pixels = enough(pixels, model.fc.out_features)  # type: ignore[union-attr, arg-type]
        truth = reference(model, pixels, lambda part: bar.update(task, completed=part))
        wanted = list(cases(args))
        for i, (batch, dtype) in enumerate(wanted):
            case = f"batch {batch}, {dtype}"
            order = torch.arange(-(-len(pixels) // batch) * batch) % len(pixels)
            inputs, expected = pixels[order].split(batch), truth[order]
            share = (ENOUGH - (time.perf_counter() - started)) / (len(wanted) - i)
            several, pace = plan(args, variants.standard(model, DTYPES[dtype], inputs[0]), share)
            task = bar.add_task(case, total=1.0)

            def tick(what: str, part: float, task: Any = task, case: str = case) -> None:
                bar.update(task, completed=part, description=f"{case}: {what}")

            for result in measure(several, inputs, expected, pace, tick, top5_shared(expected)):
                known = {"case": case, "batch": batch, "dtype": dtype, "images": batch}
                rows.append({**known, **result.as_dict()})
            gc.collect()  # compiled networks hold themselves in cycles
            bar.update(task, completed=1.0, description=case)
    return rows


def plan(
    args: argparse.Namespace, several: list[Variant], share: float
) -> tuple[list[Variant], Pace]:
    """What is run in a case that has ``share`` seconds, and how long it is timed.

    On a slow machine compilation is what takes longest, and is what is left out.
    """
    pace = QUICK if args.quick else PACE
    reason = "left out by --quick" if args.quick else None
    if args.seconds is not None:
        pace = replace(pace, seconds=args.seconds)
    elif not args.quick:
        pace = replace(pace, seconds=max(2.0, min(pace.seconds, share / 3)))
        if share < ENOUGH / 8:
            reason = "left out: the machine is too slow for it within five minutes"

    def refuse() -> Runner:
        raise LeftOutError(reason)

    if reason is not None:
        several = [replace(v, prepare=refuse) if v.kind == PEER else v for v in several]
    return several, pace


class LeftOutError(Exception):
    """A variant is not run; the message says why."""


def enough(pixels: Tensor, classes: int) -> Tensor:
    """The photographs, with shifted copies of them where a network has few outputs.

    The rule compares means: over a handful of numbers they differ by chance.
    """
    copies = -(-min(MANY, -(-1000 // classes)) // len(pixels))
    return torch.cat([pixels.roll(17 * i, -1) for i in range(copies)])


def reference(model: nn.Module, pixels: Tensor, tick: Callable[[float], None]) -> Tensor:
    """The outputs in float64."""
    exact = copy.deepcopy(model).double()
    outputs = []
    with torch.no_grad():
        for i, x in enumerate(pixels.split(1)):
            outputs.append(exact(x.double()))
            tick((i + 1) / len(pixels))
    truth = torch.cat(outputs)
    if not torch.isfinite(truth).all():
        raise CommandError("the network gives NaN or infinity in float64: look at its weights")
    return truth


def top5_shared(truth: Tensor) -> Callable[[Tensor], dict[str, Any]]:
    """A function that tells how many of the five best classes an output shares with ``truth``."""
    count = min(5, truth.shape[1])

    def shared(output: Tensor) -> dict[str, Any]:
        return {"top5_shared": likeliest_shared(output, truth, count)}

    return shared


def progress(console: "Console") -> "Progress":
    """Progress bars."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def table(rows: list[dict[str, Any]]) -> "Table":
    """The results, a section for each case; 80 columns will do."""
    from rich import box
    from rich.table import Table

    result = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("", no_wrap=True)
    titles = (
        "time, ms",
        "images\n/s",
        "vs\neager",
        "prepare",
        "mean\nerror",
        "max\nerror",
        "top-5",
    )
    for title in titles:
        result.add_column(title, justify="right")
    for case, several in groupby(rows, lambda r: r["case"]):
        result.add_row(f"[bold]{case}[/]")
        for r in several:
            style = {OURS: "bold green" if r["within"] else "bold red"}.get(r["kind"], "default")
            result.add_row(f"  [{style}]{r['variant']}[/]", *cells(r))
        result.add_section()
    return result


def cells(r: dict[str, Any]) -> list[str]:
    """A result's figures as text."""
    time_taken, judged = [str(r["why_not"]), "", ""], ["", "", "", ""]
    if r["error"] is not None:
        errors = ["not finite" if e is None else f"{e:.1e}" for e in r["error"].values()]
        judged = [f"{r['prepare_seconds']:.1f} s", *errors, f"{100 * r['top5_shared']:.0f}%"]
    if r["seconds"] is not None:
        median, low, high = (1e3 * r["seconds"][x] for x in ("median", "low", "high"))
        digits = 1 if median < 100 else 0
        spread = f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
        time_taken = [spread, f"{1e3 * r['images'] / median:.1f}", f"{r['speedup']['median']:.2f}x"]
    return [*time_taken, *judged]
