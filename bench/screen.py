"""What a run prints while it measures: with rich a bar and tables, without it lines of text."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from bench import report

#: Tells what happens now, and how much of the whole is done, from 0 to 1.
Tick = Callable[[str, float], None]


class Plain:
    """Without rich: a line for each case, and the tables as Markdown at the end."""

    def __init__(self, cases: int) -> None:
        self.cases = cases
        self.content: dict[str, Any] = {}

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.content.get("results"):
            print(report.markdown(self.content), end="")

    def tick(self, i: int, name: str) -> Tick:
        print(f"[{i + 1}/{self.cases}] {name}", file=sys.stderr, flush=True)
        return lambda what, part: None

    def show(self, rows: list[dict], content: dict[str, Any]) -> None:
        self.content = content

    def line(self, text: str) -> None:
        print(text, flush=True)


class Rich:
    """With rich."""

    def __init__(self, cases: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        console = Console()
        if not console.is_terminal:
            console = Console(width=180)
        columns = (TextColumn("{task.description:<64}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console)
        self.task = self.bar.add_task("", total=cases)

    def __enter__(self) -> "Rich":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.bar.update(self.task, completed=self.bar.tasks[0].total, description="done")
        self.bar.__exit__(*error)

    def tick(self, i: int, name: str) -> Tick:
        def tick(what: str, part: float) -> None:
            self.bar.update(self.task, completed=i + part, description=f"{name}: {what}")

        return tick

    def show(self, rows: list[dict], content: dict[str, Any]) -> None:
        self.bar.console.print(report.terminal(rows))

    def line(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


def screen(cases: int) -> Plain | Rich:
    """The best there is for a run over so many cases."""
    return Plain(cases) if find_spec("rich") is None else Rich(cases)
