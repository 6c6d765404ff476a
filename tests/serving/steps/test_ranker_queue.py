"""Both ends of the queue before the ranker, without a server; tests/serving/under_load tests it in the server."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serving.contract import PROBE, QUEUED
from serving.steps.ranker_queue import (
    PREFIX,
    Admission,
    FullError,
    GivenUpError,
    LateError,
    RankerTurn,
    now,
    queue_folder,
)

OTHER_RANKER = """
import sys, time
from pathlib import Path
from serving.steps.ranker_queue import RankerTurn
turn = RankerTurn(Path(sys.argv[1]), 60)
print("ready", flush=True)
time.sleep(600)
"""


def asking(request_id="", cancelled=False, timeout=0):
    """Return a stand-in for Triton's request; the timeout is in microseconds."""
    return SimpleNamespace(request_id=lambda: request_id, is_cancelled=lambda: cancelled, timeout=lambda: timeout)


def queued(stamp):
    return {QUEUED: np.array([stamp])}


def crowd(admission, tries=10):
    """Return how many of ``tries`` consecutive requests are admitted."""
    admitted = 0
    for _ in range(tries):
        try:
            admission.admit(asking(), {})
            admitted += 1
        except FullError:
            pass
    return admitted


def test_as_many_as_may_wait_are_let_in_until_one_is_taken(tmp_path):
    """With three places the fourth request is refused; a request that the ranker takes frees its own place and those
    of all earlier ones.
    """
    turn, admission = RankerTurn(tmp_path, 60), Admission(tmp_path, 3, 60)
    admission.admit(asking(), {})
    admission.admit(asking(), {})
    second = now()
    assert crowd(admission) == 1
    turn.admit(asking(), queued(second))
    assert crowd(admission) == 2
    turn.admit(asking(), queued(now()))
    assert crowd(admission) == 3


def test_a_place_is_free_again_when_the_wait_is_over(tmp_path):
    """A request that never reaches the ranker occupies its place no longer than the maximum wait."""
    _turn, admission = RankerTurn(tmp_path, 0.2), Admission(tmp_path, 2, 0.2)
    assert crowd(admission) == 2
    time.sleep(0.25)
    assert crowd(admission) == 2


def test_a_probe_takes_no_place(tmp_path):
    """Health probes are always admitted and take no place, because a busy step must not look dead."""
    _turn, admission = RankerTurn(tmp_path, 60), Admission(tmp_path, 1, 60)
    for _ in range(3):
        admission.admit(asking(PROBE), {})
    assert crowd(admission) == 1
    admission.admit(asking(PROBE), {})


def test_nobody_is_refused_while_a_ranker_is_dead(tmp_path):
    """While a ranker is dead every request is admitted, so that its error reports the dead step and not a full queue.

    The requests that waited for the dead process occupy no place.
    """
    admission = Admission(tmp_path, 2, 60)
    assert crowd(admission) == 10, "none has loaded"
    with subprocess.Popen([sys.executable, "-c", OTHER_RANKER, str(tmp_path)], stdout=subprocess.PIPE) as ranker:
        assert ranker.stdout.readline() == b"ready\n"
        crowd(admission)
        assert crowd(admission) == 0
        ranker.send_signal(signal.SIGKILL)
        ranker.wait()
    assert crowd(admission) == 10
    _revived = RankerTurn(tmp_path, 60)
    assert crowd(admission) == 2
    assert len(list(tmp_path.iterdir())) == 1, "the dead one's file is gone"


def test_the_last_that_any_ranker_took_counts(tmp_path):
    """With two ranker processes, the latest request that either of them took frees the places up to it."""
    with subprocess.Popen([sys.executable, "-c", OTHER_RANKER, str(tmp_path)], stdout=subprocess.PIPE) as ranker:
        assert ranker.stdout.readline() == b"ready\n"
        turn, admission = RankerTurn(tmp_path, 60), Admission(tmp_path, 4, 60)
        assert crowd(admission) == 4
        turn.admit(asking(), queued(now()))
        assert crowd(admission) == 4
        ranker.kill()


@pytest.mark.parametrize(
    ("request_", "waited", "error"),
    [
        (asking(), 1.0, None),
        (asking(), 3.0, LateError),
        (asking(timeout=500_000), 1.0, LateError),
        (asking(timeout=500_000), 0.1, None),
        (asking(cancelled=True), 0.05, GivenUpError),
        (asking(cancelled=True), 0.0, None),
    ],
)
def test_no_pass_for_whom_nobody_waits(tmp_path, request_, waited, error):
    """A request is refused after the queue's 2 s, after the caller's timeout of 0.5 s, or if it was cancelled; one that
    did not wait is not asked whether it was.
    """
    turn = RankerTurn(tmp_path, 2)
    stamp = queued(now() - int(waited * 1e6))
    if error is None:
        turn.admit(request_, stamp)
    else:
        with pytest.raises(error):
            turn.admit(request_, stamp)


def test_a_request_without_a_stamp_has_not_waited(tmp_path):
    """A probe that the supervisor sends to the ranker alone has the time stamp 0, and is not refused as late."""
    RankerTurn(tmp_path, 2).admit(asking(PROBE), queued(0))


def test_what_a_killed_server_left_is_removed(tmp_path, monkeypatch):
    """A step of the next server removes the folder of a server that no longer runs, and keeps that of a running one.

    It leaves other folders alone: ``llamarec-9zyp5qpb``, the folder of a link that leads to a repository, was taken for
    the folder of process 9, and the server did not start.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    link = tmp_path / "llamarec-9zyp5qpb" / "repository"
    link.parent.mkdir()
    link.symlink_to(Path.cwd())
    dead, living = tmp_path / f"{PREFIX}{ended.pid}_r1", tmp_path / f"{PREFIX}{os.getpid()}"
    for folder in (dead, living):
        folder.mkdir()
        (folder / str(ended.pid)).write_bytes(bytes(8))
    queue_folder("_r2")
    assert {path.name for path in tmp_path.iterdir()} == {living.name, f"{PREFIX}{os.getppid()}_r2", link.parent.name}
    assert link.exists()


def test_nothing_is_left_when_both_end(tmp_path):
    """The folder is removed when both ends close, even with the file of a ranker process that died earlier."""
    folder = tmp_path / "line"
    folder.mkdir()
    (folder / "1234567").write_bytes(bytes(8))
    turn, admission = RankerTurn(folder, 2), Admission(folder, 1, 2)
    admission.close()
    turn.close()
    assert not folder.exists()
