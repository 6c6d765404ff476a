"""Steps that only echo, through the project's own contract and glue: for tests of the protocol and of faults."""

from pathlib import Path

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
            # A TypeError for any other id that is not one character.
            HISTORY_ITEM: [ord(raw) for raw in history if raw != "?"],
            EXCLUDED_ITEM: [ord(raw) for raw in excluded],
            GIVEN_ITEM: [ord(raw) for raw in given],
            RETRIEVE: [CANDIDATES not in request],
            LIMIT: request.get(TOP_K, [0]),
        }
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
            ITEM_ID: ids[:limit], SCORE: scores[:limit], RETRIEVER_RANK: list(ranks[:limit]),
        }
""",
    "prompt_builder": """
    def answer(self, request):
        return {TOKEN: request[CANDIDATE_ITEM], LINE_END: [], QUEUED: [time.monotonic_ns() // 1000]}
""",
    "ranker": """
    def answer(self, request):
        # Backwards, so that it is seen which of the two ensembles answered.
        cut = slice(None, int(request[LIMIT][0]) or None)
        columns = (request[spec][::-1][cut] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))
""",
}
ADAPTER = """
import time

from client.contract import *
from export.steps import answer_each, place_in_line
from export.telemetry import Telemetry
from preprocessing.errors import InputError


class TritonPythonModel:
    def initialize(self, args):
        self.telemetry = Telemetry({step!r}, "echo")
        self.line = place_in_line({step!r}, args)

    def execute(self, requests):
        return answer_each({step!r}, self.answer, requests, self.telemetry, self.line)

    def finalize(self):
        self.telemetry.close()
        if self.line:
            self.line.close()
"""


def write_echo(repository: Path, **methods: str) -> None:
    """Writes the steps' ``model.py`` beside configurations that are there; ``methods`` replaces a step's own."""
    for step, method in {**ECHO_STEPS, **methods}.items():
        (repository / step / "1" / "model.py").write_text(ADAPTER.format(step=step) + method, encoding="utf-8")
