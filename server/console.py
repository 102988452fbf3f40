"""Where commands say what they are doing: stderr, so that answers and JSON on stdout can be redirected."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

stderr = Console(stderr=True)


def progress_bar(label: str, *, transient: bool = False) -> Progress:
    """A bar whose label may refer to fields of its task, as in `{task.description}`."""
    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # Redirected, a bar is only noise.
    return Progress(*columns, console=stderr, transient=transient, disable=not stderr.is_terminal)
