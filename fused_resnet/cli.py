"""The command line program: ``fused-resnet``, also ``python -m fused_resnet``."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo, engines, facts, serving
from .command import CommandError


def parser() -> argparse.ArgumentParser:
    """What the program takes."""
    result = argparse.ArgumentParser(
        prog="fused-resnet", description="Fused conv + BatchNorm + ReLU for ResNets in PyTorch."
    )
    result.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    told = commands.add_parser(
        "info", help="versions, engines and why not, instruction set, GPU, build"
    )
    told.set_defaults(run=run_info)
    serving.add_commands(commands)
    shown = commands.add_parser(
        "demo",
        help="run a ResNet fused on photographs, check it against torchvision, time it",
        description="Fuses and freezes a network, compares its outputs with torchvision's on "
        "photographs, and times both beside torch.compile. Writes results.json and chart.png. Exit "
        "status 1: something failed, an error outside the rule included.",
    )
    demo.add_arguments(shown)
    shown.set_defaults(run=demo.run)
    return result


def run_info(args: argparse.Namespace) -> int:
    """Run ``info``."""
    print(facts.info())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program: 0 done, 1 failed, 2 wrong usage."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (CommandError, engines.EngineError) as error:
        print(f"fused-resnet: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fused-resnet: interrupted", file=sys.stderr)
        return 130
