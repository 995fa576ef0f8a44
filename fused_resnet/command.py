"""What the command line programs share."""

import importlib.util


class CommandError(Exception):
    """Something the user can mend; its message is one line and all they see."""


def require(extra: str, *modules: str) -> None:
    """Raise CommandError unless all ``modules`` are installed; it names the extra with them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"{', '.join(missing)} is not installed; pip install fused_resnet[{extra}] brings what "
            f"this needs (in a clone: pip install -e '.[{extra}]' --no-build-isolation)"
        )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


positive.__name__ = "positive number"  # argparse: invalid positive number value: '0'
