"""A step knows that the next one is dead, without a server; tests/serving/under_load kills steps in the server."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.contract import PROBE
from serving.steps import presence
from serving.steps.presence import DeadError, Presence, open_presence

OTHER_STEP = """
import sys, time
from pathlib import Path
from serving.steps.presence import Presence
kept = Presence(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def look_every_time(monkeypatch):
    monkeypatch.setattr(presence, "LOOK_SECONDS", 0.0)


@contextmanager
def process(folder: Path, step: str):
    """Yield a process of a step, and kill it at the end."""
    with subprocess.Popen([sys.executable, "-c", OTHER_STEP, str(folder), step], stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"ready\n"
        yield started
        started.kill()


def asking(*outputs: str, request_id: str = ""):
    return SimpleNamespace(request_id=lambda: request_id, requested_output_names=lambda: list(outputs))


def test_requests_are_refused_from_the_death_of_the_last_process_on(tmp_path):
    """One of two dead is none: the other one answers. A new process ends the refusals. Probes are let through."""
    own = Presence(tmp_path, "prompt_builder")
    own.check(asking())  # none was loaded yet
    with process(tmp_path, "ranker"):
        with process(tmp_path, "ranker"):
            own.check(asking())
        own.check(asking())
    with pytest.raises(DeadError, match="step ranker is dead: `llamarec serve` restarts it within seconds"):
        own.check(asking())
    own.check(asking(request_id=PROBE))
    with process(tmp_path, "ranker"):
        own.check(asking())


def test_the_retriever_needs_the_next_step_for_one_of_the_ensembles(tmp_path):
    """`llamarec_retrieval`, which asks for no candidates, goes on while the prompt builder is dead."""
    own = Presence(tmp_path, "retriever")
    with process(tmp_path, "prompt_builder"):
        own.check(asking("CANDIDATE_ITEM"))
    with pytest.raises(DeadError, match="step prompt_builder is dead"):
        own.check(asking("CANDIDATE_ITEM", "CANDIDATE_ID"))
    own.check(asking("ITEM_ID", "SCORE", "RETRIEVER_RANK"))


def test_the_last_step_misses_nobody(tmp_path):
    """And a dead step that is not the next one does not matter here."""
    own = Presence(tmp_path, "ranker")
    with process(tmp_path, "features"):
        pass
    own.check(asking())


def test_it_looks_only_now_and_then(tmp_path, monkeypatch):
    """A look costs more than the rest of the check, so that there are ten a second and not one for each request."""
    monkeypatch.setattr(presence, "LOOK_SECONDS", 60.0)
    looked = []
    monkeypatch.setattr(presence, "is_held", lambda path: looked.append(path) or True)
    own = Presence(tmp_path, "features")
    (tmp_path / "retriever.1").write_bytes(b"")
    own._looked = -60.0
    for _ in range(5):
        own.check(asking())
    assert looked == [tmp_path / "retriever.1"]


def test_nothing_is_left_when_all_have_closed(tmp_path):
    """Neither the folder nor a dead process's file."""
    folder = tmp_path / "steps"
    folder.mkdir()
    with process(folder, "ranker"):
        pass
    both = [Presence(folder, step) for step in ("features", "retriever")]
    assert {path.name for path in folder.iterdir()} >= {f"features.{os.getpid()}", f"retriever.{os.getpid()}"}
    for own in both:
        own.close()
    assert not folder.exists()


def test_models_beside_the_ensembles_have_none(tmp_path, monkeypatch):
    """`events` and `items` pass nothing on, and belong to no release; a step's folder is that of its release."""
    monkeypatch.setattr(presence, "queue_folder", lambda suffix: tmp_path / suffix)
    (tmp_path / "_r1").mkdir()
    assert open_presence("events", {"model_name": "events"}) is None
    open_presence("ranker", {"model_name": "ranker_r1"}).close()
