"""What commands print with: tables and progress for people, JSON for programs."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPED_WIDTH = 200  # columns where no terminal says how many there are
COLORS = {
    "chosen": "green",
    "passed": "green",
    "ran": "green",
    "takes": "cyan",
    "emulated": "cyan",
    "compiled": "blue",
    "refuses": "yellow",
    "refused": "yellow",
    "failed": "red",
    "no kernel": "dim",
    "no record": "dim",
}


def console(stderr: bool = False) -> "Console":
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else PIPED_WIDTH, highlight=False)


def colored(word: str) -> str:
    return f"[{COLORS[word]}]{word}[/]" if word in COLORS else word


def show_json(value: Any) -> None:
    """Strict JSON: what is not a finite number becomes null."""
    print(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[tuple["Progress", Any]]:
    """A bar on stderr while the block runs; invisible where stderr is no terminal.  Yields it and its task."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    screen = console(stderr=True)
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        yield bar, bar.add_task(what, total=total)
