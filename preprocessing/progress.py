"""Progress bars with the remaining time, on standard error to keep them out of results on standard output."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def progress_bar(*, transient: bool = False) -> Progress:
    """Return a progress bar whose tasks show a ``note``, for example the latest result.

    Args:
        transient: whether the bar disappears at the end.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=transient,
    )


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield ``items``, with a progress bar that disappears at the end."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)
