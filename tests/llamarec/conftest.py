"""Fixtures of the command line's tests."""

import sys

import pytest

from llamarec.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `llamarec ARGUMENTS` in this process and return exit code, standard output and standard error."""

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["llamarec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
