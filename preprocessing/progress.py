"""Progress bars with the remaining time, on standard error so that results on standard output stay clean."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def progress_bar(*, transient: bool = False) -> Progress:
    """A bar whose tasks carry a ``note``, the latest result for example.

    Args:
        transient: the bar vanishes at the end.
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
    """Yields ``items`` under a bar that vanishes at the end."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)
