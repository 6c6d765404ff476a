"""Fixtures of the command line's tests."""

import os
import sys

import pytest

from llamarec.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `llamarec ARGUMENTS` in this process and return exit code, standard output and standard error.

    Environment variables that a command sets for the processes that it starts are removed afterwards.
    """

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["llamarec", *map(str, arguments)])
        before = dict(os.environ)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            os.environ.clear()
            os.environ.update(before)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
