"""The comparison of the framework with another checkout: its messages, its models, and a run against itself."""

import argparse
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import service_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from benchmarks.framework import CHECKOUT, benchmark, main, outputs_of, request_of
from benchmarks.framework_side import write_empty
from serving.contract import STEPS


def test_a_request_is_a_message_of_the_protocol():
    """Written by hand: each text is preceded by its length in four bytes, the smallest first."""
    message = service_pb2.ModelInferRequest.FromString(request_of(["50", "7"]))
    assert (message.model_name, list(message.inputs[0].shape)) == ("llamarec", [1, 2])
    assert list(message.raw_input_contents) == [b"\x02\0\0\x0050\x01\0\0\x007"]


def test_outputs_are_compared_by_name():
    """Two servers may send the same outputs in another order."""
    answers = []
    for names in ("AB", "BA"):
        answer = service_pb2.ModelInferResponse(outputs=[{"name": name} for name in names])
        answer.raw_output_contents.extend(name.encode() for name in names)
        answers.append(outputs_of(answer.SerializeToString()))
    assert answers[0] == answers[1] == {"A": b"A", "B": b"B"}


def test_empty_steps_are_an_ensemble_of_as_many_steps(tmp_path):
    """Each takes what the one before made, from the history to the answer; Triton's own protobuf reads the files."""
    write_empty(tmp_path)
    configs = {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig()) for path in tmp_path.glob("*/config.pbtxt")
    }
    assert set(configs) == {*STEPS, "llamarec"}
    taken = "HISTORY"
    for step in configs["llamarec"].ensemble_scheduling.step:
        assert step.input_map["INPUT"] == taken
        taken = step.output_map["OUTPUT"]
    assert taken == configs["llamarec"].output[0].name
    for step in STEPS:
        compile((tmp_path / step / "1" / "model.py").read_text(), step, "exec")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch, capsys):
    """Before any server starts, with the exit code of a wrong command line."""
    monkeypatch.setattr("sys.argv", ["framework", "--against", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"--against {tmp_path} is no checkout of this project" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_checkout_against_itself(artifacts: Path, repository: Path):
    """Three real servers answer; both sides' answers are equal, as their code is the same."""
    options = argparse.Namespace(users=20, requests=20, rounds=1)
    result = benchmark(artifacts, repository, CHECKOUT, options)
    assert result["answers_equal"] == result["users"] == 20
    for sides in result["in_flight"].values():
        assert set(sides) == {"against", "this", "empty"}
        assert all(0 < row["p50"] <= row["p99"] and row["rate"] > 0 for row in sides.values())
