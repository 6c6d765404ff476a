"""The log of answers: what is logged and what is not, files that are whole, and an answer that never waits."""

import json
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarec_client.contract import ENSEMBLE, ITEM_ID, RETRIEVAL_ENSEMBLE, RETRIEVER_RANK, SCORE
from preprocessing.artifacts import new_artifact
from preprocessing.errors import InputError
from serving.contract import PROBE, STEP_SPECS, USER
from serving.layout import KIND
from serving.steps.answers import DATASET_KEY, SCHEMA, AnswerLog, answered_ensemble, is_sampled, open_log

RESPONSE = ["ITEM_ID", "SCORE", "RETRIEVER_RANK"]
ANSWER = {ITEM_ID: [b"50", "né".encode()], SCORE: [0.75, 0.25], RETRIEVER_RANK: [2, 0]}
ANN = {USER: np.array([b"ann"], dtype=object)}


@pytest.fixture
def counted() -> list[tuple[int, str | None]]:
    return []


@pytest.fixture
def open_one(tmp_path, counted) -> Iterator[Callable[..., AnswerLog]]:
    """Opens a log of the ranker in the test's folder; its thread has ended after the test."""
    opened: list[AnswerLog] = []

    def open_one(step: str = "ranker", folder: Path = tmp_path / "log", **options: Any) -> AnswerLog:
        opened.append(AnswerLog(folder, step, "r1", "ml", lambda *given: counted.append(given), **options))
        return opened[-1]

    yield open_one
    for log in opened:
        log.close()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_row_has_what_was_shown_to_whom(open_one, tmp_path, counted):
    """Written by hand: every column, its type, and the data set in the file's metadata, in the folder's only file."""
    log = open_one()
    before = time.time()
    log.add("id-1", RESPONSE, ANN, ANSWER, "Overloaded")
    log.close()
    (row,) = rows(tmp_path / "log")
    assert before - 0.001 <= row.pop("time").timestamp() <= time.time()
    assert row == {
        "request": "id-1",
        "user": "ann",
        "release": "r1",
        "ensemble": "llamarec",
        "items": ["50", "né"],
        "scores": [0.75, 0.25],
        "retriever_ranks": [2, 0],
        "degraded": "Overloaded",
    }
    (path,) = (tmp_path / "log").iterdir()
    assert pq.read_schema(path).metadata[DATASET_KEY] == b"ml"
    assert pq.read_schema(path).remove_metadata() == SCHEMA
    assert counted == [(1, None)]


@pytest.mark.parametrize("user", [{}, {USER: []}, {USER: [b""]}, {USER: [b"\xff"]}, {USER: [b"u" * 513]}])
def test_a_user_whose_events_no_store_can_have_is_none(open_one, tmp_path, user):
    """Absent, as from a repository of an earlier version, or not an id: the answer is logged without a user."""
    log = open_one()
    log.add("id", RESPONSE, {spec: np.array(ids, dtype=object) for spec, ids in user.items()}, ANSWER, None)
    log.close()
    assert [(row["user"], row["degraded"]) for row in rows(tmp_path / "log")] == [(None, None)]


def test_what_is_logged_does_not_change_with_the_answer(open_one, tmp_path):
    """Triton uses an answer's memory again while its row waits."""
    log, scores = open_one(), np.array([0.75, 0.25], dtype=np.float32)
    log.add("id", RESPONSE, ANN, {**ANSWER, SCORE: scores}, None)
    scores[:] = 0
    log.close()
    assert rows(tmp_path / "log")[0]["scores"] == [0.75, 0.25]


def test_probes_are_not_logged(open_one, tmp_path, counted):
    """They ask for no user; without an answer there is neither a file nor a folder."""
    log = open_one()
    log.add(PROBE, RESPONSE, {}, ANSWER, None)
    log.close()
    assert counted == []
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("step", "wanted", "ensemble"),
    [
        ("ranker", RESPONSE, ENSEMBLE),
        ("ranker", ["ITEM_ID"], ENSEMBLE),
        ("retriever", RESPONSE, RETRIEVAL_ENSEMBLE),
        ("retriever", ["SCORE"], RETRIEVAL_ENSEMBLE),
        ("retriever", ["CANDIDATE_ITEM", "CANDIDATE_ID", "CANDIDATE_SCORE", "CANDIDATE_RANK"], None),
        ("retriever", [spec.name for spec in STEP_SPECS["retriever"].outputs], None),
    ],
)
def test_the_outputs_asked_for_tell_the_ensemble(step, wanted, ensemble):
    """The generated configurations: `llamarec` maps the retriever's four tensors for the ranker, `llamarec_retrieval`
    its three of the answer. All seven are asked for by nobody but a caller of the step itself.
    """
    assert answered_ensemble(step, wanted) == ensemble


def test_candidates_for_the_ranker_are_no_answer(open_one, tmp_path):
    """The retriever's step works for both ensembles, and logs the answers of one."""
    log = open_one("retriever")
    log.add("full", ["CANDIDATE_ITEM", "CANDIDATE_ID"], ANN, ANSWER, None)
    log.add("fallback", RESPONSE, ANN, ANSWER, "StepDied")
    log.close()
    assert [(row["request"], row["ensemble"]) for row in rows(tmp_path / "log")] == [("fallback", "llamarec_retrieval")]


# --- the sample


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_sample_holds_a_smaller_one(request_id, one, other):
    """The id alone decides, so every process decides alike; shares of 0 and 1 are none and all."""
    small, large = sorted((one, other))
    assert is_sampled(request_id, large) or not is_sampled(request_id, small)
    assert is_sampled(request_id, one) == is_sampled(request_id, one)
    assert is_sampled(request_id, 1)
    assert not is_sampled(request_id, 0)


@pytest.mark.parametrize("named", [True, False])
def test_the_sample_has_its_share(named):
    """A quarter of 4,000 ids, or of requests without one, is logged, within 5 standard deviations of 0.0068."""
    chosen = sum(is_sampled(f"request {place}" if named else "", 0.25) for place in range(4000))
    assert chosen / 4000 == pytest.approx(0.25, abs=0.034)


def test_only_sampled_answers_are_in_the_file(open_one, tmp_path):
    ids = [f"id {place}" for place in range(200)]
    log = open_one(share=0.5)
    for request_id in ids:
        log.add(request_id, RESPONSE, ANN, ANSWER, None)
    log.close()
    assert [row["request"] for row in rows(tmp_path / "log")] == [one for one in ids if is_sampled(one, 0.5)]


# --- files


def test_a_full_queue_drops_and_counts(open_one, tmp_path, counted, monkeypatch):
    """The thread sleeps: of 7 answers, 5 fit, and the calls do not wait for room."""
    monkeypatch.setattr("serving.steps.answers.DRAIN_SECONDS", 60.0)
    log = open_one(waiting=5)
    began = time.monotonic()
    for place in range(7):
        log.add(str(place), RESPONSE, ANN, ANSWER, None)
    assert time.monotonic() - began < 1
    assert counted == [(1, "full")] * 2
    log.close()
    assert [row["request"] for row in rows(tmp_path / "log")] == ["0", "1", "2", "3", "4"]
    assert counted[2:] == [(5, None)]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_files_are_closed_by_their_age(open_one, tmp_path, counted, monkeypatch):
    """A file appears while the process runs, and the next answers get one of their own."""
    monkeypatch.setattr("serving.steps.answers.DRAIN_SECONDS", 0.01)
    log = open_one(file_seconds=0.05)
    for number in (1, 2):
        log.add(str(number), RESPONSE, ANN, ANSWER, None)
        wait_for(lambda number=number: len(counted) == number)
    log.close()
    assert len(list((tmp_path / "log").iterdir())) == 2
    assert counted == [(1, None), (1, None)]


def test_files_are_closed_by_their_size(open_one, tmp_path, counted):
    """One answer of two items has over 50 bytes, so that each chunk of 100 fills a file of 5,000; none waits longer."""
    log = open_one(file_bytes=5000)
    for place in range(250):
        log.add(f"{place:03}", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert sum(number for number, _ in counted) == 250
    assert len(list((tmp_path / "log").iterdir())) == len(counted) >= 3
    assert sorted(row["request"] for row in rows(tmp_path / "log")) == [f"{place:03}" for place in range(250)]


def test_no_half_file_is_seen(open_one, tmp_path, monkeypatch):
    """While a file is written, its folder has no name that a reader takes; then the whole file is there at once."""
    log, seen = open_one(), []
    write = pq.write_table

    def watched(table: Any, path: Path, **options: Any) -> None:
        write(table, path, **options)
        seen.append((path.name.startswith("."), list((tmp_path / "log").glob("*.parquet"))))

    monkeypatch.setattr("serving.steps.answers.pq", types.SimpleNamespace(write_table=watched))
    log.add("id", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert seen == [(True, [])]
    assert len(rows(tmp_path / "log")) == 1


def test_a_disk_that_fails_costs_answers_of_the_log_only(open_one, tmp_path, counted, capsys):
    """A file is in the folder's place: the loss is counted and says why. When it is gone, the next answers are kept."""
    (tmp_path / "log").write_text("")
    log = open_one(file_bytes=0)
    log.add("lost", RESPONSE, ANN, ANSWER, None)
    wait_for(lambda: bool(counted))
    assert counted == [(1, "disk")]
    (tmp_path / "log").unlink()
    log.add("kept", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert counted == [(1, "disk"), (1, None)]
    assert [row["request"] for row in rows(tmp_path / "log")] == ["kept"]
    line = json.loads(capsys.readouterr().err)
    assert (line["step"], line["event"]) == ("ranker", "answers lost")
    assert str(tmp_path / "log") in line["message"]


def test_an_id_that_is_no_text_does_not_end_the_log(open_one, tmp_path, counted, capsys, monkeypatch):
    """No step gives one. It is lost with what is converted together with it, and the next answers are kept."""
    monkeypatch.setattr("serving.steps.answers.DRAIN_SECONDS", 0.01)
    log = open_one()
    log.add("lost", RESPONSE, ANN, {**ANSWER, ITEM_ID: [b"\xff", b"50"]}, None)
    wait_for(lambda: bool(counted))
    log.add("kept", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert counted == [(1, "invalid"), (1, None)]
    assert [row["request"] for row in rows(tmp_path / "log")] == ["kept"]
    assert json.loads(capsys.readouterr().err)["event"] == "answers lost"


# --- what the environment names


def artifact(folder: Path) -> Path:
    with new_artifact(folder, KIND, options={}, inputs={}, facts={"release": "0123", "dataset": "ml"}) as partial:
        (partial / "file").write_text("content")
    return folder


@pytest.mark.parametrize("step", ["retriever", "ranker"])
def test_the_environment_opens_the_log(tmp_path, monkeypatch, counted, step):
    monkeypatch.setenv("LLAMAREC_ANSWERS", str(tmp_path / "log"))
    monkeypatch.setenv("LLAMAREC_ANSWERS_SAMPLE", "0")
    log = open_log(step, artifact(tmp_path / "artifact"), "r1", lambda *given: counted.append(given))
    log.add("id", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert counted == []
    monkeypatch.delenv("LLAMAREC_ANSWERS_SAMPLE")
    log = open_log(step, tmp_path / "artifact", "r1", lambda *given: counted.append(given))
    log.add("id", RESPONSE, ANN, ANSWER, None)
    log.close()
    assert counted == [(1, None)]


def test_other_steps_and_servers_have_no_log(tmp_path, monkeypatch):
    """Nothing is read or opened."""
    monkeypatch.delenv("LLAMAREC_ANSWERS", raising=False)
    assert open_log("ranker", tmp_path, "r1", lambda *given: None) is None
    monkeypatch.setenv("LLAMAREC_ANSWERS", str(tmp_path))
    for step in ("features", "prompt_builder"):
        assert open_log(step, tmp_path, "r1", lambda *given: None) is None


@pytest.mark.parametrize("share", ["5%", "-0.1", "1.01", "nan"])
def test_a_share_that_is_none_is_refused(tmp_path, monkeypatch, share):
    monkeypatch.setenv("LLAMAREC_ANSWERS", str(tmp_path))
    monkeypatch.setenv("LLAMAREC_ANSWERS_SAMPLE", share)
    with pytest.raises(InputError, match=r"LLAMAREC_ANSWERS_SAMPLE is .*: give a share of the answers from 0 to 1"):
        open_log("ranker", tmp_path, "r1", lambda *given: None)
