"""Progress with the remaining time, on standard error to keep it out of results on standard output.

On a terminal it is a bar; in a file or a pipe, where a bar cannot be redrawn, a plain line now and then.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LINE_SECONDS = 20.0
"""Minimum time in seconds between two lines about one task."""


class _Lines(Progress):
    """Progress as plain lines: one when a step of the task begins, and then at most one every ``LINE_SECONDS``."""

    def __init__(self) -> None:
        super().__init__(console=Console(stderr=True), disable=True)
        self._said: dict[TaskID, tuple[str, float]] = {}
        """Description and time of each task's last line."""

    def add_task(self, *given: Any, **options: Any) -> TaskID:
        number = super().add_task(*given, **options)
        self._say(self.tasks[-1])
        return number

    def update(self, task_id: TaskID, **changes: Any) -> None:  # type: ignore[override]  # its many options pass through
        super().update(task_id, **changes)
        self._say(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(self._tasks[task_id])

    def _say(self, task: Task) -> None:
        said, at = self._said.get(task.id, ("", 0.0))
        if not task.description or (task.description == said and time.monotonic() - at < LINE_SECONDS):
            return
        self._said[task.id] = task.description, time.monotonic()
        total = "" if task.total is None else f"/{task.total:.0f}"
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        note = f"  {task.fields['note']}" if task.fields["note"] else ""
        sys.stderr.write(f"  {task.description} {task.completed:.0f}{total}{left}{note}\n")
        sys.stderr.flush()


def progress_bar(*, transient: bool = False) -> Progress:
    """Return a progress bar whose tasks show a ``note``, for example the latest result.

    Args:
        transient: whether the bar disappears at the end.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        return _Lines()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=transient,
    )


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield ``items``, with a progress bar that disappears at the end."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)
