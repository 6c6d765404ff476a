"""Progress on a terminal and in a file."""

import io
import re
import sys
import types

import pytest

from preprocessing import progress
from preprocessing.progress import progress_bar, track


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the lines go by; the test sets it."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_in_a_file_a_line_now_and_then(capsys, clock):
    """``make demo`` with its output in a file was silent for minutes, because a bar is drawn on terminals only. By
    hand: a line at the start, and then one each time that 20 s have passed, here after every fourth of 12 items.
    """
    for _ in track(range(12), "ranking", 12):
        clock[0] += 5
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert [re.match(r"ranking \d+/12", line)[0] for line in lines] == [f"ranking {n}/12" for n in (0, 4, 8, 12)]


def test_a_new_step_of_a_task_has_a_line_at_once(capsys, clock):
    """The steps of `preprocess` are descriptions of one task; the note, a validation for example, is part of a line."""
    with progress_bar() as bar:
        task = bar.add_task("", total=3, completed=-1, note="")
        for step in ("reading", "filtering", "filtering"):
            bar.update(task, description=step, advance=1, note="Recall@10 0.1" if step == "filtering" else "")
    lines = re.sub(r", \d+ s left", "", capsys.readouterr().err).splitlines()
    assert lines == ["  reading 0/3", "  filtering 1/3  Recall@10 0.1"]


def test_the_remaining_time_and_an_unknown_total(capsys, clock):
    """A download without Content-Length has no total, and the remaining time is not known before some of it is done."""
    with progress_bar() as bar:
        task = bar.add_task("fetching", total=None, note="")
        clock[0] += 30
        bar.update(task, completed=7)
    assert capsys.readouterr().err.splitlines() == ["  fetching 0", "  fetching 7"]


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    """What rich draws: the description and a bar; no plain line."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert list(track(range(3), "ranking", 3)) == [0, 1, 2]
    assert "ranking" in terminal.getvalue()
    assert "━" in terminal.getvalue()
    assert "ranking 0/3" not in terminal.getvalue()
