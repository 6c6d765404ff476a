"""A server whose steps only echo, with the project's own contract and Triton code, for tests of protocol and faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.config import DEFAULTS, Serving, write_configs
from export.repository import write_store_models
from serving.server.local import LocalServer

# An item's raw id is one character and its number that character's code point, so that any text can be sent around.
ECHO_STEPS = {
    "features": """
    def answer(self, request):
        history, excluded, given = (
            [raw.decode() for raw in request.get(spec, [])] for spec in (HISTORY, EXCLUDE, CANDIDATES)
        )
        if "bad" in history:
            raise InputError("HISTORY holds 'bad'")
        return {
            HISTORY: request[HISTORY],
            # A TypeError for any other id that is not one character.
            HISTORY_ITEM: [ord(raw) for raw in history if raw != "?"],
            EXCLUDED_ITEM: [ord(raw) for raw in excluded],
            GIVEN_ITEM: [ord(raw) for raw in given],
            RETRIEVE: [CANDIDATES not in request],
            LIMIT: request.get(TOP_K, [0]),
            USER: request.get(USER_ID, []),
            GIVEN_ID: request.get(CANDIDATES, []) if CANDIDATE_TITLE in request else [],
            GIVEN_TEXT: request.get(CANDIDATE_TITLE, []),
            HISTORY_TEXT: request.get(HISTORY_TITLE, []),
            RULES: [],
        }

    def facts(self, request, answer, parameters):
        return FeaturesStep.facts(self, request, answer, parameters)
""",
    "retriever": """
    def answer(self, request):
        chosen = request[HISTORY_ITEM] if request[RETRIEVE][0] else request[GIVEN_ITEM]
        items = [item for item in chosen.tolist() if item not in request[EXCLUDED_ITEM]]
        if ord("~") in items:
            time.sleep(1)
        ids = [chr(item).encode() for item in items]
        scores, ranks = [-float(place) for place in range(len(items))], range(1, len(items) + 1)
        limit = int(request[LIMIT][0]) or None
        return {
            CANDIDATE_ITEM: items, CANDIDATE_ID: ids, CANDIDATE_SCORE: scores, CANDIDATE_RANK: list(ranks),
            CANDIDATE_TEXT: request.get(GIVEN_TEXT, []),
            CANDIDATE_BOOST: [],
            ITEM_ID: ids[:limit], SCORE: scores[:limit], RETRIEVER_RANK: list(ranks[:limit]),
        }
""",
    "prompt_builder": """
    def answer(self, request):
        return {TOKEN: request[CANDIDATE_ITEM], LINE_END: [], PREFIX: [0], QUEUED: [time.monotonic_ns() // 1000]}
""",
    "ranker": """
    def answer(self, request):
        # Backwards, so that it is seen which of the two ensembles answered.
        cut = slice(None, int(request[LIMIT][0]) or None)
        columns = (request[spec][::-1][cut] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))
""",
    "neighbours": """
    def answer(self, request):
        return {ITEM_ID: request[ITEM], SCORE: [3.0], TRANSITIONS: [2.0], TITLES: [1.0]}
""",
}
ADAPTER = """
import time

from llamarec_client.contract import *
from preprocessing.errors import InputError
from serving.contract import *
from serving.steps.features import FeaturesStep
from serving.steps.ranker_queue import open_queue
from serving.steps.telemetry import Telemetry
from serving.steps.worker import Worker


class TritonPythonModel:
    def initialize(self, args):
        self.worker = Worker({step!r}, self, Telemetry({step!r}, "echo"), open_queue({step!r}, args))

    def execute(self, requests):
        return self.worker.execute(requests)

    def finalize(self):
        self.worker.finalize()

    def facts(self, request, answer, parameters):
        return {{}}
"""


def write_echo(repository: Path, **methods: str) -> None:
    """Write the steps' ``model.py`` next to existing configurations; ``methods`` replaces the methods of a step.

    The models that record events and change items are the real ones.
    """
    for step, method in {**ECHO_STEPS, **methods}.items():
        (repository / step / "1" / "model.py").write_text(ADAPTER.format(step=step) + method, encoding="utf-8")
    write_store_models(repository, DEFAULTS)


@pytest.fixture(scope="session")
def echo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model repository with generated configurations and echoing steps."""
    repository = tmp_path_factory.mktemp("echo")
    write_configs(repository, Serving(pass_seconds=0.01, queue_seconds=60))
    write_echo(repository)
    return repository


@pytest.fixture(scope="session")
def echo_server(echo_repository: Path) -> Iterator[LocalServer]:
    """Yield a running server on the echoing repository."""
    with LocalServer(echo_repository) as server:
        yield server
