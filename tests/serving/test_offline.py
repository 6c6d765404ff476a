"""The four steps in one process: the project's own encoder, retriever and ranker over scores that are given by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.ranker.inference.ranker import Ranker
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import Prompt
from models.retriever.inference.onnx_retriever import Graph, OnnxRetriever
from models.retriever.stage import RetrievalStage
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder, save_vocabulary
from serving.offline import ExportedSteps

CATALOGUE = Catalogue([b"a", b"b", b"c", b"d", b"new"], ["A", "B", "C", "D", "New"], [9, 8, 7, 6])
"""Items 1 to 4 have an embedding, item 5 has a title only."""
SCORES = [0.0, 3.0, 2.0, 1.0, 0.0]
"""The retriever's logits, the padding's first: a, b, c, d in this order for every history."""
LOGITS = {1: 0.0, 2: 0.0, 3: np.log(2.0), 4: np.log(3.0), 5: np.log(6.0)}
"""The language model's logits: softmax weights of 1, 1, 2, 3 and 6."""


class Session:
    """Stands in for an ONNX session; remembers the histories."""

    def __init__(self) -> None:
        self.histories: list[list[int]] = []

    def run(self, outputs, feeds):
        assert outputs == ["scores"]
        (padded,) = feeds["items"]
        self.histories.append(padded[padded > 0].tolist())
        return [np.array([SCORES], np.float32)]


class Prompts:
    """The candidates' numbers are the tokens of the prompt, and each is the end of its own line. A text stands for the
    item with this title.
    """

    def __init__(self) -> None:
        self.built: list[tuple[list[int], list[int]]] = []

    def build(self, history, candidates):
        self.built.append(([number(item) for item in history], [number(item) for item in candidates]))
        return Prompt(self.built[-1][1], list(range(len(candidates))))


def number(item: int | str) -> int:
    return [None, "A", "B", "C", "D", "New"].index(item) if isinstance(item, str) else int(item)


class Verbalizer:
    def logits(self, scorer, prompt):
        return np.array([LOGITS[item] for item in prompt.tokens], np.float32)


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def steps(session) -> ExportedSteps:
    """The language model ranks alone: the retriever's weight is 0."""
    ranker = Ranker(None, Verbalizer(), weight=0.0, runtime=Runtime())
    retriever = OnnxRetriever([Graph(session, 10)], RetrievalStage())
    return ExportedSteps(CATALOGUE, FeatureEncoder(CATALOGUE), retriever, Prompts(), ranker)


def rows(*expected: tuple[str, float, int]) -> list[tuple]:
    return [(item, pytest.approx(score), rank) for item, score, rank in expected]


def test_what_is_retrieved_is_ranked_by_the_language_model(steps, session):
    """By hand: b, c, d remain without the history's a, with weights 1, 2, 3 of 6; unknown ids are skipped, repetitions
    kept. The retriever's ranks count from 1 in its own order.
    """
    answer = steps.recommend(["a", "unknown", "a"])
    assert answer == rows(("d", 3 / 6, 3), ("c", 2 / 6, 2), ("b", 1 / 6, 1))
    assert session.histories == [[1, 1]]
    assert steps.prompts.built == [([1, 1], [2, 3, 4])]


def test_an_empty_history_is_answered(steps):
    """All four items that the retriever knows, weights 1, 1, 2, 3 of 7; a and b tie and keep the retriever's order."""
    answer = steps.recommend([])
    assert answer == rows(("d", 3 / 7, 4), ("c", 2 / 7, 3), ("a", 1 / 7, 1), ("b", 1 / 7, 2))
    assert steps.prompts.built == [([], [1, 2, 3, 4])]


def test_excluded_items_are_no_candidates(steps):
    """Neither d, nor what the catalogue does not know: a, b, c with weights 1, 1, 2 of 4."""
    assert steps.recommend([], exclude=["d", "unknown"]) == rows(("c", 0.5, 3), ("a", 0.25, 1), ("b", 0.25, 2))


def test_the_head_of_a_list_keeps_its_scores(steps):
    """TOP_K cuts after ranking: the same first two, whose scores summed to 1 before."""
    assert steps.recommend([], top_k=2) == steps.recommend([])[:2]
    assert steps.recommend([], top_k=20) == steps.recommend([])


def test_the_callers_candidates_are_ranked_as_they_are(steps):
    """The history's own a is among them and stays; b goes, because it is excluded, and c counts once. Weights 1 and 2
    of 3, and the ranks are those among the candidates.
    """
    answer = steps.recommend(["a"], candidates=["c", "a", "b", "c"], exclude=["b"])
    assert answer == rows(("c", 2 / 3, 2), ("a", 1 / 3, 1))


def test_a_candidate_that_the_retriever_does_not_know_is_ranked(steps):
    """Rank 0 says that it has no embedding; the language model knows its title, weight 6 of 6 + 3."""
    answer = steps.recommend([], candidates=["new", "d"])
    assert answer == rows(("new", 6 / 9, 0), ("d", 3 / 9, 1))


def test_texts_are_ranked_by_the_language_model_alone(steps, session):
    """Weights 6 of New, 3 of D and 1 of A and 1 of A again; the places are the ids. The retriever is not asked."""
    answer = steps.recommend(history_titles=["B", "C"], candidate_titles=["A", "New", "A", "D"])
    assert answer == rows(("1", 6 / 11, 0), ("3", 3 / 11, 0), ("0", 1 / 11, 0), ("2", 1 / 11, 0))
    assert steps.prompts.built == [([2, 3], [1, 5, 1, 4])]
    assert session.histories == []


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_one_candidate_that_the_retriever_does_not_know_leaves_all_to_the_language_model(steps, weight):
    """Weights 6 and 3, and 1 for b, whose title says A. Whatever the retriever's weight is, its scores do not count;
    its ranks are those of the candidates that it knows.
    """
    steps = replace(steps, ranker=Ranker(None, Verbalizer(), weight=weight, runtime=Runtime()))
    options = {"candidates": ["x", "d", "b"], "candidate_titles": ["New", "", "A"]}
    assert steps.recommend(["a"], **options) == rows(("x", 6 / 10, 0), ("d", 3 / 10, 2), ("b", 1 / 10, 1))
    assert steps.prompts.built[-1] == ([1], [1, 4, 5])  # the retriever's order, with b first


def test_titles_of_known_candidates_are_fused_as_the_catalogues_are(steps):
    """The retriever's logits are 1 of d and 2 of c, and their titles have weights 6 and 1: half of either counts."""
    steps = replace(steps, ranker=Ranker(None, Verbalizer(), weight=0.5, runtime=Runtime()))
    answer = steps.recommend([], candidates=["d", "c"], candidate_titles=["New", "A"])
    odds = (6 / np.exp(1)) ** 0.5  # of d against c
    assert answer == rows(("d", odds / (1 + odds), 2), ("c", 1 / (1 + odds), 1))


def test_titles_in_the_history_are_read_by_the_language_model(steps, session):
    """The retriever reads and masks a, which the prompt calls C; the unknown id is in the prompt alone."""
    answer = steps.recommend(["a", "nobody"], history_titles=["C", "New"])
    assert [row[0] for row in answer] == ["d", "c", "b"]
    assert steps.prompts.built == [([3, 5], [2, 3, 4])]
    assert session.histories == [[1]]


@pytest.mark.parametrize(
    "options",
    [{"exclude": ["a", "b", "c", "d"]}, {"candidates": []}, {"candidates": ["a"], "exclude": ["a"]}],
    ids=["everything excluded", "no candidates", "every candidate excluded"],
)
def test_nothing_to_rank_costs_no_prompt(steps, options):
    """An empty list, not an error; the server answers the same without asking the language model."""
    assert steps.recommend(["a"], **options) == []
    assert steps.prompts.built == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"candidates": ["unknown"]}, "CANDIDATES"), ({"top_k": 0}, "TOP_K"), ({"top_k": 21}, "TOP_K")],
)
def test_a_request_is_refused_as_the_server_refuses_it(steps, options, named):
    """The contract's limits: the text names the tensor."""
    with pytest.raises(InputError, match=named):
        steps.recommend([], **options)


def test_the_parts_of_the_way_are_there_for_evaluation(steps):
    """Candidates of an encoded request, and the ranker's raw logits in the retriever's order, before any fusion.

    The retriever's logits 3, 1 and 0 become log-probabilities: less the logarithm of e^3 + e + 1.
    """
    request = steps.features.encode([b"b"], [], None, None)
    candidates = steps.candidates(request)
    assert candidates.items.tolist() == [1, 3, 4]
    total = np.log(np.exp(3) + np.exp(1) + 1)
    np.testing.assert_allclose(candidates.scores, [3 - total, 1 - total, -total], rtol=1e-6)
    np.testing.assert_allclose(steps.logits([2], candidates), [0.0, np.log(2.0), np.log(3.0)], rtol=1e-6)


@pytest.mark.parametrize("suffix", ["", "_r1"])
def test_each_step_is_loaded_from_its_own_folder(tmp_path, monkeypatch, suffix):
    """The layout of a model repository: ``<step><suffix>/1/artifact``, the same files that the server's steps open."""
    monkeypatch.setattr("serving.offline.OnnxRetriever.load", lambda folder: ("retriever", folder))
    monkeypatch.setattr("serving.offline.PromptBuilder.load", lambda folder: ("prompt_builder", folder))
    monkeypatch.setattr("serving.offline.Ranker.load", lambda folder: ("ranker", folder))

    def folder(step: str) -> Path:
        return tmp_path / (step + suffix) / "1" / "artifact"

    folder("features").mkdir(parents=True)
    CATALOGUE.write(folder("features") / ITEMS_FILE)
    steps = ExportedSteps.load(tmp_path, suffix)
    loaded = (steps.retriever, steps.prompts, steps.ranker)
    assert loaded == tuple((step, folder(step)) for step in ("retriever", "prompt_builder", "ranker"))
    assert [steps.catalogue.raw(item) for item in range(1, 6)] == [b"a", b"b", b"c", b"d", b"new"]
    assert steps.features.encode([b"d", b"new"]).history.tolist() == [4]
    save_vocabulary(folder("features"), 5)  # of a retriever that knows the fifth item by its title
    assert ExportedSteps.load(tmp_path, suffix).features.encode([b"d", b"new"]).history.tolist() == [4, 5]
