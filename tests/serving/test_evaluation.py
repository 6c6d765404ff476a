"""The paper's tables on five users and 26 items whose every score is given by hand."""

import math
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.ranker.inference.ranker import Ranker
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import Prompt
from models.retriever.inference.onnx_retriever import Graph, OnnxRetriever
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedRetriever
from models.signals.graph import ItemGraph
from models.signals.likeness import TitleLikeness
from models.signals.signals import ItemStatistics, Signals
from models.sparse import SparseRows
from preprocessing.artifacts import new_artifact
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data, Statistics
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from serving.contract import STEPS
from serving.evaluation import ServedList, evaluate
from serving.layout import KIND, step_artifact
from serving.offline import ExportedSteps

ITEMS = "abcdefghijklmnopqrstuvwxyz"
USERS = {
    "anna": ([1, 2], 4),
    "ben": ([3], 2),
    "cleo": ([1], 26),
    "dan": ([2, 5], 5),
    "eve": ([4], 3),
}
"""History and true item of each user; the last item of a history is the one for validation."""
SCORES = {"ben": {1: 0.0, 2: 0.0}}
"""The retriever's logit of item i is -i, but for these: two that tie at the top."""
LOGITS = {"ben": {2: 2.0}, "eve": {3: 1.5}}
"""The language model's logit of any candidate is 0, but for these."""
RANKS = {
    "retriever": [2, 2, 25, 0, 3],
    "ranker_alone": [2, 1, 0, 0, 1],
    "ranker": [2, 1, 0, 0, 2],
}
"""By hand. Retriever: anna's d comes after c; ben's b ties with a and has the larger number; cleo's z is the last of 25
and no candidate, as only 20 are; dan's e is in his own history and so masked; eve's c comes after a and b. The language
model alone: anna's candidates all tie, so that the retriever's order decides; ben's b and eve's c come first. Both with
half the weight each: eve's c has (1.5 - 3) / 2 = -0.75, after a with -0.5 and before b with -1."""


def user_of(history: Sequence[int]) -> str:
    """The user with this history."""
    return next(user for user, (known, _) in USERS.items() if known == [int(item) for item in history])


def score_row(user: str) -> np.ndarray:
    """The retriever's logits [items + 1]."""
    return np.array([SCORES.get(user, {}).get(item, -float(item)) for item in range(len(ITEMS) + 1)], np.float32)


class Session:
    """Stands in for an ONNX session."""

    def run(self, outputs, feeds):
        (padded,) = feeds["items"]
        return [score_row(user_of(padded[padded > 0]))[np.newaxis]]


class Verbalizer:
    """Stands in for the language model: finds the user by the prompt, and remembers whom it was asked for."""

    def __init__(self, logits: dict[str, dict[int, float]], interrupted_after: int | None = None) -> None:
        self.logits_of, self.interrupted_after = logits, interrupted_after
        self.asked: list[str] = []

    def logits(self, scorer, prompt):
        history, candidates = prompt.tokens
        if len(self.asked) == self.interrupted_after:
            raise KeyboardInterrupt
        self.asked.append(user_of(history))
        known = self.logits_of.get(self.asked[-1], {})
        return np.array([known.get(int(item), 0.0) for item in candidates], np.float32)


def data_of(fingerprint: str = "the data's") -> Data:
    """The five users as a preprocessed data set."""
    catalogue = Catalogue([raw.encode() for raw in ITEMS], [raw.upper() for raw in ITEMS], [1] * len(ITEMS))
    return Data(
        name="by hand",
        fingerprint=fingerprint,
        statistics=Statistics("by hand", len(USERS), len(ITEMS), 12),
        catalogue=catalogue,
        users=[*USERS],
        training=[np.array(history[:-1], np.int32) for history, _ in USERS.values()],
        validation=np.array([history[-1] for history, _ in USERS.values()], np.int32),
        test=np.array([truth for _, truth in USERS.values()], np.int32),
    )


def write_export(repository: Path, release: str) -> None:
    """The manifests of an export of that id from the five users' data."""
    for step in STEPS:
        folder, inputs = step_artifact(repository, step), {"data": "the data's"}
        with new_artifact(folder, KIND, options={}, inputs=inputs, facts={"release": release}) as partial:
            (partial / "file").write_text("content")


class World:
    """Artifacts, repository and what is loaded from them; a test may change any of it between two evaluations."""

    def __init__(self, folder: Path) -> None:
        self.artifacts, self.repository = folder / "artifacts", folder / "repository"
        self.data = data_of()
        self.language_model = Verbalizer(LOGITS)
        self.weight = 0.5
        self.stage = RetrievalStage()
        write_export(self.repository, "export1")

    def steps(self, repository: Path) -> ExportedSteps:
        assert repository == self.repository
        prompts = types.SimpleNamespace(build=lambda history, items: Prompt([history, items], []))
        ranker = Ranker(None, self.language_model, self.weight, Runtime(threads=3))
        catalogue = self.data.catalogue
        retriever = OnnxRetriever([Graph(Session(), 50)], self.stage)
        return ExportedSteps(catalogue, FeatureEncoder(catalogue), retriever, prompts, ranker)

    def evaluate(self, **options):
        return evaluate(self.artifacts, self.repository, **options)


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr("serving.evaluation.load_data", lambda artifacts: world.data)
    monkeypatch.setattr("serving.evaluation.ExportedSteps.load", world.steps)
    return world


def stored_ranks(world: World) -> dict[str, list]:
    return pq.read_table(world.artifacts / "evaluation" / "ranks.parquet").to_pydict()


# --- the tables


def test_ranks_of_every_user(world):
    """Ties, a true item that is no candidate and one that is masked: see RANKS. A ranker cannot help the latter two,
    and their place counts as 0 rather than the retriever's.
    """
    world.evaluate()
    assert stored_ranks(world) == {"user": [*USERS], **RANKS}


def test_the_tables_are_means_over_those_ranks(world):
    """By hand: the retriever's ranks 2, 2, 25, 0, 3 of five users, those within 10 being 2, 2, 3; the subset are the
    three users whose true item is a candidate. The ranker's are 2, 1, 2.
    """
    result = world.evaluate()
    assert (result["dataset"], result["release"], result["fusion_weight"]) == ("by hand", "export1", 0.5)
    assert (result["users"], result["subset_users"]) == (5, 3)
    third = 1 / math.log2(3)
    gains = {
        ("retriever", "overall"): ((1 / 2 + 1 / 2 + 1 / 3) / 5, (third + third + 1 / 2) / 5, 3 / 5),
        ("retriever", "subset"): ((1 / 2 + 1 / 2 + 1 / 3) / 3, (third + third + 1 / 2) / 3, 1),
        ("ranker", "overall"): ((1 / 2 + 1 + 1 / 2) / 5, (third + 1 + third) / 5, 3 / 5),
        ("ranker", "subset"): ((1 / 2 + 1 + 1 / 2) / 3, (third + 1 + third) / 3, 1),
        ("ranker_alone", "overall"): ((1 / 2 + 1 + 1) / 5, (third + 1 + 1) / 5, 3 / 5),
        ("ranker_alone", "subset"): ((1 / 2 + 1 + 1) / 3, (third + 1 + 1) / 3, 1),
    }
    for (name, users), (mrr, ndcg, recall) in gains.items():
        measured = result[name][users]
        for k in (5, 10):
            assert measured[f"MRR@{k}"] == pytest.approx(mrr)
            assert measured[f"NDCG@{k}"] == pytest.approx(ndcg)
            assert measured[f"Recall@{k}"] == pytest.approx(recall)
    assert "served" not in result


def test_without_a_server_only_users_that_a_ranker_can_help_are_ranked(world):
    """A pass of the language model takes a second on a processor: none is spent on cleo and dan."""
    world.evaluate()
    assert world.language_model.asked == ["anna", "ben", "eve"]


def test_nobody_in_the_subset_leaves_its_table_empty(world):
    """All five true items beyond the candidates or masked: the means over all users are 0, and there are no others."""
    world.data = data_of()
    world.data.test[:] = [26, 26, 26, 2, 26]
    result = world.evaluate()
    assert result["subset_users"] == 0
    assert result["ranker"] == {"overall": dict.fromkeys(result["ranker"]["overall"], 0.0), "subset": {}}
    assert world.language_model.asked == []


def test_the_rank_of_a_stage_with_signals_counts_all_items(world, oracle):
    """By hand: a pool of the model's best 20, which popularity alone orders, here by descending item number.

    Anna's pool is 3 to 22, of which her 4 is the second to last; so is ben's 2 of 1, 2 and 4 to 21; eve's 3 is the
    third to last of 1 to 3 and 5 to 21. Cleo's 26 is outside her pool, which the model's own order follows: 25th of
    25. The trained stage orders the candidates as the exported one.
    """
    nothing = SparseRows(np.zeros(28, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    popularity = np.arange(27, dtype=np.float32)
    statistics = ItemStatistics(popularity, TitleLikeness(nothing), ItemGraph(nothing), ItemGraph(nothing))
    signals = {"retriever": 0.0, "likeness_mean": 0.0, "likeness_max": 0.0, "likeness_last": 0.0, "transitions": 0.0}
    world.stage = RetrievalStage(Signals(statistics, {**signals, "popularity": 1.0}, pool=20))
    world.weight = 1.0
    served = world.evaluate(ask=lambda histories: [ServedList([], [])] * 5)["served"]
    assert stored_ranks(world)["retriever"] == [19, 19, 25, 0, 18]
    assert stored_ranks(world)["ranker"] == [19, 19, 0, 0, 18]
    assert served["equal_to_oracle"] == 1.0


# --- kept scores


def test_scores_are_used_again(world):
    """The same export: the second evaluation asks the language model nothing, and finds the same."""
    first = world.evaluate()
    world.language_model.asked.clear()
    assert world.evaluate() == first
    assert world.language_model.asked == []


def test_another_weight_needs_no_new_scores(world):
    """What is kept is the language model's part alone: with weight 1 the retriever decides, ranks 2, 2 and 3."""
    world.evaluate()
    world.language_model.asked.clear()
    world.weight = 1.0
    world.evaluate()
    assert stored_ranks(world)["ranker"] == [2, 2, 0, 0, 3]
    assert world.language_model.asked == []


def test_an_export_anew_is_scored_anew(world):
    """Another language model may be in it: scores are kept under the export's id."""
    world.evaluate()
    write_export(world.repository, "export2")
    world.language_model = Verbalizer({"anna": {4: 1.0}})
    assert world.evaluate()["release"] == "export2"
    assert stored_ranks(world)["ranker_alone"] == [1, 2, 0, 0, 3]
    assert world.language_model.asked == ["anna", "ben", "eve"]


def test_an_interrupted_evaluation_goes_on_where_it_was(world, monkeypatch):
    """Saved after every two users here: interrupted at the third, only that one is left, and nothing else differs."""
    monkeypatch.setattr("serving.evaluation.SAVE_EVERY", 2)
    world.language_model.interrupted_after = 2
    with pytest.raises(KeyboardInterrupt):
        world.evaluate()
    world.language_model = Verbalizer(LOGITS)
    world.evaluate()
    assert world.language_model.asked == ["eve"]
    assert stored_ranks(world) == {"user": [*USERS], **RANKS}


# --- a running server


def offline_list(world: World, user: str) -> list[str]:
    """The list that half of each gives: the sum of both logits decides, and ties keep the order of the numbers."""
    history = USERS[user][0]
    candidates = [item for item in range(1, 27) if item not in history][:20]
    logits, scores = LOGITS.get(user, {}), score_row(user)
    best = sorted(candidates, key=lambda item: (-(logits.get(item, 0.0) + float(scores[item])), item))
    return [ITEMS[item - 1] for item in best]


@pytest.fixture
def oracle(world, monkeypatch) -> Verbalizer:
    """Fp32 PyTorch, with the trained retriever's scores equal to the exported one's; a test may change its logits."""
    language_model, loaded = Verbalizer(dict(LOGITS)), []
    language_model.loaded = loaded

    def load(folder: Path, runtime: Runtime) -> Ranker:
        loaded.append((folder, runtime))
        return Ranker(None, language_model, world.weight, runtime)

    def load_trained(folder: Path) -> TrainedRetriever:
        assert folder == world.artifacts / "retriever"
        model = types.SimpleNamespace(scores=lambda histories: (score_row(user_of(history)) for history in histories))
        return TrainedRetriever([model], world.stage)

    monkeypatch.setattr("serving.evaluation.TrainedRetriever.load", load_trained)
    monkeypatch.setattr("serving.evaluation.Ranker.load", load)
    return language_model


def test_identical_and_different_lists_are_counted(world, oracle):
    """The server is asked for each user's raw history, and answers three of the five lists exactly; of the others one
    has two neighbours exchanged, and one ends early. Scores do not matter, since no two machines give the same.
    """
    asked: list[list[str]] = []

    def ask(histories: Sequence[Sequence[str]]) -> Iterable[ServedList]:
        asked.extend([*history] for history in histories)
        for user in USERS:
            items = offline_list(world, user)
            if user == "ben":
                items[4:6] = items[5:3:-1]
            elif user == "dan":
                items.pop()
            yield ServedList(items, [0.0] * len(items))

    served = world.evaluate(ask=ask)["served"]
    assert asked == [["a", "b"], ["c"], ["a"], ["b", "e"], ["d"]]
    assert (served["users"], served["identical"]) == (5, 3)


def served_offline(world: World):
    """A server that answers as it should."""
    return lambda histories: [ServedList(offline_list(world, user), []) for user in USERS]


def test_with_a_server_every_user_is_ranked(world, oracle):
    """All five lists are compared; those whose scores an evaluation without a server kept are not scored again."""
    world.evaluate()
    world.language_model.asked.clear()
    served = world.evaluate(ask=served_offline(world))["served"]
    assert world.language_model.asked == ["cleo", "dan"]
    assert (served["users"], served["identical"]) == (5, 5)
    assert stored_ranks(world) == {"user": [*USERS], **RANKS}


def test_a_user_who_has_seen_everything(world, oracle, monkeypatch):
    """Cleo's history holds the whole catalogue: her list is empty, offline as served, and her true item has no rank."""
    monkeypatch.setitem(USERS, "cleo", ([*range(1, len(ITEMS) + 1)], 26))
    world.data = data_of()
    served = world.evaluate(ask=served_offline(world), oracle_users=0)["served"]
    assert offline_list(world, "cleo") == []
    assert served == {"users": 5, "identical": 5, "equal_to_oracle": 0.0, "oracle_users": 0}
    assert "cleo" not in world.language_model.asked
    assert stored_ranks(world)["retriever"][2] == stored_ranks(world)["ranker"][2] == 0


def test_the_share_of_lists_that_fp32_gives_too(world, oracle):
    """PyTorch in fp32 with the export's own threads, over all five users as only five are there; it sees eve's c as
    far better, so that four of the five lists agree.
    """
    oracle.logits_of["eve"] = {3: 9.0}
    served = world.evaluate(ask=served_offline(world), oracle_users=50)["served"]
    assert served["oracle_users"] == 5
    assert served["equal_to_oracle"] == pytest.approx(4 / 5)
    (loaded,) = oracle.loaded
    assert loaded == (step_artifact(world.repository, "ranker"), Runtime(runtime="torch", dtype="float32", threads=3))


def test_as_many_users_as_wanted_are_compared_with_fp32(world, oracle):
    """Two of five, the same two every time: the choice is seeded."""
    chosen = []
    for _ in range(2):
        oracle.asked.clear()
        served = world.evaluate(ask=served_offline(world), oracle_users=2)["served"]
        assert (served["oracle_users"], served["equal_to_oracle"]) == (2, 1.0)
        chosen.append(list(oracle.asked))
    assert len(set(chosen[0])) == 2
    assert chosen[0] == chosen[1]


# --- what does not belong together


def test_another_data_set_is_refused(world):
    """The repository was exported from other data than are there: items' numbers would mean other items."""
    world.data = data_of("another's")
    with pytest.raises(InputError, match=r"by hand.*`llamarec export`"):
        world.evaluate()
    assert not world.artifacts.exists()


def test_half_an_export_is_refused(world):
    """One of the steps is from another export."""
    folder = step_artifact(world.repository, "ranker")
    with new_artifact(folder, KIND, options={}, inputs={"data": "the data's"}, facts={"release": "export2"}) as partial:
        (partial / "file").write_text("content")
    with pytest.raises(InputError, match="different exports"):
        world.evaluate()
    assert not world.artifacts.exists()
