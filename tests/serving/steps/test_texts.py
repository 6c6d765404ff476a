"""The steps on requests with titles, without a server."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamarec_client.contract import (
    CANDIDATE_TITLE,
    CANDIDATES,
    HISTORY,
    HISTORY_TITLE,
    ITEM_ID,
    RETRIEVER_RANK,
    SCORE,
    USER_ID,
)
from models.ranker.prompt import Prompt
from models.retriever.inference.onnx_retriever import Graph, OnnxRetriever
from models.retriever.stage import RetrievalStage
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from serving.contract import (
    CANDIDATE_ID,
    CANDIDATE_ITEM,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    CANDIDATE_TEXT,
    GIVEN_ID,
    GIVEN_ITEM,
    GIVEN_TEXT,
    HISTORY_ITEM,
    HISTORY_TEXT,
    STEP_SPECS,
    USER,
)
from serving.steps.features import FeaturesStep
from serving.steps.prompt_builder import PromptBuilderStep
from serving.steps.retriever import RetrieverStep
from serving.steps.worker import DTYPES, Worker

CATALOGUE = Catalogue([b"a", b"b", b"c"], ["A", "B", "C"], [1, 1, 1])
FEATURES = FeaturesStep.of(FeatureEncoder(CATALOGUE))


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype=object)


class Session:
    """Scores a, b and c with 1, 2 and 3."""

    def run(self, outputs, feeds):
        return [np.array([[0, 1, 2, 3]], np.float32)]


RETRIEVER = RetrieverStep.of(OnnxRetriever([Graph(Session(), 10)], RetrievalStage()), CATALOGUE)


def passed_on(name: str, answer: dict, **more: Any) -> dict:
    """Return an answer as the inputs of the next step."""
    known = {spec: np.asarray(values, DTYPES[spec.data_type]) for spec, values in answer.items()}
    return {spec: known[spec] for spec in STEP_SPECS[name].inputs if spec in known} | more


def retrieved(request: dict) -> dict:
    return RETRIEVER.answer(passed_on("retriever", FEATURES.answer(request)))


def test_titles_reach_the_prompt_in_the_order_of_the_candidates():
    """By hand: the retriever puts c before a and the unknown x last. The prompt lists the texts of c and x, and the
    catalogue's title of a; its history is the two texts.
    """
    request = {
        HISTORY: texts("b", "nobody"),
        HISTORY_TITLE: texts("", "Words"),
        CANDIDATES: texts("x", "a", "c"),
        CANDIDATE_TITLE: texts("Ex", "", "Sea"),
    }
    encoded, answer = FEATURES.answer(request), retrieved(request)
    assert encoded[HISTORY_TEXT] == [b"B", b"Words"]
    assert answer[CANDIDATE_ITEM].tolist() == [3, 1, -1]
    assert answer[CANDIDATE_ID].tolist() == [b"c", b"a", b"x"]
    assert answer[CANDIDATE_TEXT] == [b"Sea", b"", b"Ex"]
    assert answer[CANDIDATE_RANK].tolist() == [1, 2, 0]
    built = []

    class Prompts:
        items = 3

        def build(self, history, candidates):
            built.append((history, candidates))
            return Prompt([1], [0] * len(candidates))

    PromptBuilderStep.of(Prompts()).answer(passed_on("prompt_builder", {**encoded, **answer}))
    assert built == [(["B", "Words"], ["Sea", 1, "Ex"])]


def test_without_a_retriever_score_the_next_step_gets_none():
    """The language model alone orders all of them; `llamarec_retrieval` gives x the last place."""
    answer = retrieved({HISTORY: texts(), CANDIDATES: texts("x", "a"), CANDIDATE_TITLE: texts("Ex", "")})
    assert np.isneginf(answer[CANDIDATE_SCORE]).all()
    assert (answer[ITEM_ID].tolist(), answer[RETRIEVER_RANK].tolist()) == ([b"a", b"x"], [1, 0])
    assert answer[SCORE].tolist() == [1, 0]
    scored = retrieved({HISTORY: texts(), CANDIDATES: texts("c", "a"), CANDIDATE_TITLE: texts("Sea", "")})
    plain = retrieved({HISTORY: texts(), CANDIDATES: texts("c", "a")})
    assert scored[CANDIDATE_SCORE].tolist() == plain[CANDIDATE_SCORE].tolist()
    assert np.isfinite(plain[CANDIDATE_SCORE]).all()
    assert plain[CANDIDATE_TEXT] == []


def test_the_retrieval_ensemble_refuses_candidates_of_which_it_knows_none():
    """It would return them in the caller's order. One that it knows is enough, and the other ensemble takes any."""
    response = [ITEM_ID.name, SCORE.name, RETRIEVER_RANK.name]
    alone = retrieved({HISTORY: texts("a"), CANDIDATE_TITLE: texts("One", "Two")})
    assert alone[CANDIDATE_ID].tolist() == [b"0", b"1"]
    with pytest.raises(InputError, match="CANDIDATE_TITLE describes candidates of which the retriever knows none: ask"):
        RETRIEVER.check(alone, response)
    RETRIEVER.check(alone, [spec.name for spec in STEP_SPECS["retriever"].outputs])
    RETRIEVER.check(
        retrieved({HISTORY: texts(), CANDIDATES: texts("x", "a"), CANDIDATE_TITLE: texts("X", "")}), response
    )
    RETRIEVER.check(retrieved({HISTORY: texts(), CANDIDATES: texts()}), response)


def test_a_worker_refuses_what_its_step_refuses_of_an_ensemble(monkeypatch):
    """The request gets INVALID_ARGUMENT in place of the answer, with the step's name."""
    sent = []
    utils = SimpleNamespace(
        Tensor=lambda name, array: (name, array),
        TritonError=type("TritonError", (), {"INVALID_ARG": 1, "__init__": lambda self, *given: sent.append(given)}),
        InferenceResponse=lambda output_tensors, error=None: error,
        get_input_tensor_by_name=lambda request, name: None,
    )
    monkeypatch.setitem(__import__("sys").modules, "triton_python_backend_utils", utils)

    class Step:
        def answer(self, request):
            return {ITEM_ID: [b"a"], SCORE: [1.0], RETRIEVER_RANK: [1]}

        def check(self, answer, wanted):
            if wanted == ["SCORE"]:
                raise InputError("CANDIDATE_TITLE is not for this")

    def ask(*wanted: str):
        request = SimpleNamespace(requested_output_names=lambda: [*wanted], parameters=lambda: json.dumps({}))
        return Worker("ranker", Step()).execute([request])

    assert ask("SCORE", "ITEM_ID") == [None]
    assert sent == []
    ask("SCORE")
    assert sent == [("ranker: CANDIDATE_TITLE is not for this", 1)]


def test_the_answer_to_texts_without_ids_is_nobodys():
    """The log of answers would take the places for ids of items, and join them to the user's events."""
    user = {HISTORY: texts("a"), USER_ID: texts("ann")}
    assert FEATURES.answer(user)[USER].tolist() == [b"ann"]
    assert FEATURES.answer({**user, CANDIDATES: texts("a"), CANDIDATE_TITLE: texts("A")})[USER].tolist() == [b"ann"]
    assert FEATURES.answer({**user, CANDIDATE_TITLE: texts("A")})[USER] == []


def test_titles_of_a_history_count_as_one_that_is_given():
    """No store is needed: the text is the history, and one of two entries is skipped. The facts count both."""
    request = {HISTORY_TITLE: texts("Words", ""), USER_ID: texts("ann")}
    answer = FEATURES.answer(request)
    assert (list(answer[HISTORY_ITEM]), answer[HISTORY_TEXT]) == ([], [b"Words"])
    assert FEATURES.facts(request, answer, {}) == {"user": "ann", "history": 2, "unknown_items": 1}


def test_a_repository_of_an_earlier_version_has_no_texts():
    """Its configurations do not have these tensors, so the steps neither get nor send them."""
    request = {HISTORY: texts("b"), CANDIDATES: texts("a", "c")}
    encoded = {
        spec: values
        for spec, values in FEATURES.answer(request).items()
        if spec not in (GIVEN_ID, GIVEN_TEXT, HISTORY_TEXT)
    }
    answer = RETRIEVER.answer(passed_on("retriever", encoded))
    assert GIVEN_ITEM in passed_on("retriever", encoded)
    assert answer[ITEM_ID].tolist() == [b"c", b"a"]
    assert answer[CANDIDATE_TEXT] == []
