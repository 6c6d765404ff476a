"""The log of answers on the real tritonserver."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llamarec_client.contract import DEGRADED, ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.messages import Request, requested_outputs
from llamarec_client.recommender import RecommenderClient
from serving.contract import PROBE, STEP_SPECS
from serving.layout import exported_release
from serving.server.local import LocalServer
from serving.steps.answers import is_sampled

pytestmark = pytest.mark.thorough
USERS = 4


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows; every file of the folder is whole."""
    return [row for path in folder.iterdir() for row in pq.read_table(path).to_pylist()]


def serve(repository: Path, folder: Path, ask: Callable[[LocalServer], Any], sample: str = "1") -> Any:
    """Start a server that logs its answers, ask it, and stop it; return what ``ask`` returned."""
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAMAREC_ANSWERS", str(folder))  # of this server only, which reads it when it starts
            patch.setenv("LLAMAREC_ANSWERS_SAMPLE", sample)
            server = opened.enter_context(LocalServer(repository))
        return ask(server)


def test_the_log_has_every_answer_and_changes_none(repository, server, tmp_path):
    """Answers of both ensembles are in the log as they were given, with user, release and ensemble: nothing is lost at
    shutdown. A fallback is marked; a probe is absent; a subset of the outputs is logged whole. The answers are those of
    a server without a log, bit for bit.
    """
    histories = {f"user {place}": [str(place), str(place + 50)] for place in range(1, USERS + 1)}
    requests = [Request(history, user_id=user) for user, history in histories.items()]

    def ask(server: LocalServer) -> dict[str, Any]:
        with RecommenderClient(server.url) as client, grpc.InferenceServerClient(server.url) as raw:
            given = {
                (model, user): answer
                for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE)
                for user, answer in zip(histories, client.recommend_many(requests, model=model), strict=True)
            }
            short = client.recommend(["50"], top_k=3, request_id="nobody")
            inputs, outputs = Request(["50"], user_id="sara").inputs(), requested_outputs()
            marked = {"request_id": "fallback", "parameters": {DEGRADED: "Overloaded"}}
            raw.infer(RETRIEVAL_ENSEMBLE, inputs, outputs=outputs, **marked)
            for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
                raw.infer(model, inputs, outputs=outputs, request_id=PROBE)
                raw.infer(model, inputs, outputs=outputs[:1], request_id=f"subset of {model}")
        return {"given": given, "short": short}

    found = serve(repository, tmp_path / "log", ask)
    rows = read_log(tmp_path / "log")
    log = {row["request"]: row for row in rows}
    assert len(rows) == len(log) == 2 * USERS + 4
    release = exported_release(repository)
    for (model, user), answer in found["given"].items():
        row = log[answer.request_id]
        assert (row["user"], row["ensemble"], row["release"], row["degraded"]) == (user, model, release, None)
        shown = zip(row["items"], row["scores"], row["retriever_ranks"], strict=True)
        assert list(shown) == [(item.item_id, item.score, item.retriever_rank) for item in answer]
    assert log["nobody"]["user"] is None
    assert log["nobody"]["items"] == [item.item_id for item in found["short"]]
    assert len(log["nobody"]["scores"]) == 3
    fallback = log["fallback"]
    assert (fallback["user"], fallback["ensemble"], fallback["degraded"]) == ("sara", RETRIEVAL_ENSEMBLE, "Overloaded")
    for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
        assert log[f"subset of {model}"]["ensemble"] == model
        assert len(log[f"subset of {model}"]["items"]) == len(log[f"subset of {model}"]["scores"]) == 20
    with RecommenderClient(server.url) as plain:
        for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
            answers = plain.recommend_many(requests, model=model)
            assert answers == [found["given"][model, user] for user in histories]


def without_users(repository: Path, folder: Path) -> Path:
    """Return a copy of a repository with the configurations of a version that had no log of answers.

    That version had no packed tensors either: each tensor went from step to step by itself.
    """
    shutil.copytree(repository, folder, copy_function=os.link)
    for path in folder.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        for tensors in (config.input, config.output):
            kept = [tensor for tensor in tensors if tensor.name != "USER" and not tensor.name.endswith("_PACKED")]
            del tensors[:]
            tensors.extend(kept)
        taken: set[str] = set()
        for step in reversed(config.ensemble_scheduling.step):
            specs = STEP_SPECS[step.model_name]
            if any(name.endswith("_PACKED") for name in step.output_map):
                step.output_map.clear()
                step.output_map.update({spec.name: spec.name for spec in specs.outputs if spec.name in taken})
            if any(name.endswith("_PACKED") for name in step.input_map):
                step.input_map.clear()
                step.input_map.update({spec.name: spec.name for spec in specs.inputs if spec.name != "USER"})
            taken |= set(step.input_map)
        path.unlink()  # and not the file that the link shares
        path.write_text(text_format.MessageToString(config))
    return folder


def test_a_repository_of_an_earlier_version_is_logged_without_users(repository, server, tmp_path):
    """It answers as before. The ids of the requests choose the sample, which is the same for both ensembles."""
    ids = [f"request {place}" for place in range(8)]

    def ask(old: LocalServer) -> None:
        with RecommenderClient(old.url) as client, RecommenderClient(server.url) as plain:
            for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
                for request_id in ids:
                    answer = client.recommend(["50"], user_id="ann", model=model, request_id=request_id)
                assert answer == plain.recommend(["50"], model=model)

    serve(without_users(repository, tmp_path / "old"), tmp_path / "log", ask, sample="0.5")
    sampled = sorted(request_id for request_id in ids if is_sampled(request_id, 0.5))
    assert 0 < len(sampled) < len(ids)
    log = read_log(tmp_path / "log")
    assert {row["user"] for row in log} == {None}
    for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
        assert sorted(row["request"] for row in log if row["ensemble"] == model) == sampled
