"""The ensembles on the real tritonserver: their answers, which equal the offline ones, and their refusals."""

import asyncio
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import BRIEF_RANKER, BRIEF_RETRIEVER, a_direction, weighed
from tiny import tiny_base
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from export.config import Serving
from export.repository import Export, export
from llamarec.commands.evaluate import ask_server
from llamarec_client.contract import ENSEMBLE, MAX_CANDIDATES, MAX_HISTORY, MAX_ID_BYTES, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import InvalidRequest
from llamarec_client.messages import Request
from llamarec_client.recommender import AsyncRecommenderClient, Recommendation, RecommenderClient
from models.ranker.base import EMBEDDED
from models.ranker.options import RankerTraining
from models.ranker.training import train_ranker
from models.retriever.training import train_retriever
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.evaluation import evaluate
from serving.offline import ExportedSteps
from serving.server.local import LocalServer

OTHERS = ("sasrec", "bert4rec", "narm", "index")


@pytest.fixture(scope="module")
def steps(repository):
    return ExportedSteps.load(repository)


@pytest.fixture(scope="module")
def recommender(server):
    with RecommenderClient(server.url) as client:
        yield client


def offline(steps: ExportedSteps, history, **options) -> list[Recommendation]:
    """Return the answer of the exported functions, called one after another in this process."""
    return [Recommendation(*row) for row in steps.recommend(history, **options)]


def known_ids(steps) -> list[str]:
    return [steps.catalogue.raw(item).decode() for item in range(1, steps.catalogue.trained + 1)]


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="empty"),
        pytest.param(["50"], id="single item"),
        pytest.param(["50", "50", "181", "50"], id="duplicated items"),
        pytest.param(["no such item", "50", "ünknown", ""], id="unknown ids"),
        pytest.param(["nothing", "known"], id="unknown ids only"),
    ],
)
def test_served_equals_offline(steps, recommender, history):
    """Ids, ranks and scores equal, bit for bit, those of the offline functions on the same exported files."""
    answer = recommender.recommend(history)
    assert answer == offline(steps, history)
    assert len(answer) == MAX_CANDIDATES
    assert not {r.item_id for r in answer} & set(history)
    assert sum(r.score for r in answer) == pytest.approx(1, abs=1e-5)


def test_a_history_of_a_thousand_items(steps, recommender):
    """With 1,000 of the 1,349 items masked, the answer has 20 distinct other items, the same as offline."""
    history = known_ids(steps)[:1000]
    answer = recommender.recommend(history)
    assert answer == offline(steps, history)
    assert len({r.item_id for r in answer} - set(history)) == MAX_CANDIDATES


def test_the_catalogue_runs_short(steps, recommender):
    """If all but three items are in the history, the answer has those three only."""
    ids = known_ids(steps)
    answer = recommender.recommend(ids[3:])
    assert {r.item_id for r in answer} == set(ids[:3])
    assert answer == offline(steps, ids[3:])


def test_nothing_left_to_recommend(steps, recommender):
    """If every item is in the history, the answer is empty and not an error."""
    assert recommender.recommend(known_ids(steps)) == []


def test_the_retrieval_ensemble_keeps_the_retrievers_order(recommender):
    """The retrieval ensemble has the same contract: the ranks are 1 to 20, and the scores decrease and sum to 1."""
    answer = recommender.recommend(["50", "181"], model=RETRIEVAL_ENSEMBLE)
    assert [r.retriever_rank for r in answer] == list(range(1, MAX_CANDIDATES + 1))
    assert [r.score for r in answer] == sorted((r.score for r in answer), reverse=True)
    assert sum(r.score for r in answer) == pytest.approx(1, abs=1e-5)
    assert {r.item_id for r in answer} == {r.item_id for r in recommender.recommend(["50", "181"])}


def test_top_k_cuts_the_same_list(recommender):
    """TOP_K 3 returns the head of the full answer with unchanged scores, since they sum to 1 before the cut."""
    assert recommender.recommend(["50"], top_k=3) == recommender.recommend(["50"])[:3]


def test_top_k_beyond_what_is_left_returns_what_is_left(recommender):
    """A TOP_K of 20 with two candidates returns both and is not an error."""
    answer = recommender.recommend(["50"], candidates=["181", "121"], top_k=MAX_CANDIDATES)
    assert {r.item_id for r in answer} == {"181", "121"}


def test_no_model_sees_the_user_id(recommender):
    """USER_ID only serves logs: a request with it gets the same answer, bit for bit, as one without it."""
    assert recommender.recommend(["50"], user_id="ünknown 17") == recommender.recommend(["50"])


def test_excluded_items_make_room_for_others(recommender):
    """EXCLUDE applies before the top 20 are chosen, so the answer still has 20 items."""
    excluded = [r.item_id for r in recommender.recommend(["50"])][:5]
    answer = recommender.recommend(["50"], exclude=excluded)
    assert len(answer) == MAX_CANDIDATES
    assert not {r.item_id for r in answer} & set(excluded)


def test_given_candidates_are_ranked_and_the_history_does_not_mask_them(steps, recommender):
    """Each of the caller's candidates is returned once, even if it is in the history, unless EXCLUDE contains it."""
    options = {"candidates": ["181", "50", "181", "100", "121"], "exclude": ["100"]}
    answer = recommender.recommend(["50"], **options)
    assert answer == offline(steps, ["50"], **options)
    assert {r.item_id for r in answer} == {"181", "50", "121"}
    assert {r.retriever_rank for r in answer} == {1, 2, 3}


def test_a_candidate_without_an_embedding_is_ranked_by_its_title(steps, recommender):
    """An item that has a title but failed the 5-core filter has retriever rank 0, and gets a score from the ranker."""
    unknown = steps.catalogue.raw(steps.catalogue.trained + 1).decode()
    answer = recommender.recommend(["50"], candidates=[unknown, "181"])
    assert answer == offline(steps, ["50"], candidates=[unknown, "181"])
    assert {r.item_id: r.retriever_rank for r in answer} == {unknown: 0, "181": 1}
    assert all(r.score > 0 for r in answer)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"history": [], "top_k": MAX_CANDIDATES + 1}, "TOP_K"),
        ({"history": ["x"] * (MAX_HISTORY + 1)}, "HISTORY"),
        ({"history": ["x" * (MAX_ID_BYTES + 1)]}, "HISTORY"),
        ({"history": [], "exclude": ["x" * (MAX_ID_BYTES + 1)]}, "EXCLUDE"),
        ({"history": [], "candidates": ["no such item"]}, "CANDIDATES"),
        ({"history": [], "candidates": [str(item) for item in range(1, 22)]}, "CANDIDATES"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_by_name(recommender, request_, named):
    """The error is INVALID_ARGUMENT, and its text starts with the step and names the tensor (docs/contract.md)."""
    with pytest.raises(InvalidRequest, match=rf"features: .*{named}"):
        recommender.recommend(**request_)


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_below_1_is_refused_by_name(server, top_k):
    """The client refuses it before it is sent, so it is sent in the plain protocol."""
    tensor = grpc.InferInput("TOP_K", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[top_k]], np.int32))
    with grpc.InferenceServerClient(server.url) as client, pytest.raises(InferenceServerException) as refused:
        client.infer(ENSEMBLE, [*Request(["50"]).inputs(), tensor])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert re.search("features: .*TOP_K", refused.value.message())


def test_concurrent_requests_answer_as_single_ones(server, steps):
    """32 concurrent histories of different lengths share batches, and each answer equals the offline one."""
    ids = known_ids(steps)
    histories = [ids[start : start + 3 * start] for start in range(32)]

    async def ask():
        async with AsyncRecommenderClient(server.url) as client:
            return await asyncio.gather(*map(client.recommend, histories))

    assert asyncio.run(ask()) == [offline(steps, history) for history in histories]


def random_request(draw: np.random.Generator, ids: list[str]) -> dict[str, Any]:
    """Return the options of a request: any history, and in turn exclusions, candidates, titles and a limit."""
    some = [str(raw) for raw in draw.choice(ids, draw.integers(0, 40))]
    options: dict[str, Any] = {"history": some}
    if draw.random() < 0.5:
        options["exclude"] = [str(raw) for raw in draw.choice(ids, draw.integers(0, 9))]
    if draw.random() < 0.5:
        some = [str(raw) for raw in draw.choice(ids, draw.integers(1, 20), replace=False)]
        options["candidates"] = some
        if draw.random() < 0.5:
            options["candidate_titles"] = [f"Title {raw}" if draw.random() < 0.5 else "" for raw in some]
    if draw.random() < 0.5:
        options["top_k"] = int(draw.integers(1, 20))
    return options


def test_random_company_changes_no_answer(server, steps):
    """96 requests of all kinds at once, every sixth of which is refused: each gets its offline answer, bit for bit."""
    draw = np.random.default_rng(30)
    given = [random_request(draw, known_ids(steps)) for _ in range(96)]
    for refused in given[::6]:
        refused["candidates"] = ["no such item"]
        refused.pop("candidate_titles", None)

    async def ask():
        async with AsyncRecommenderClient(server.url) as client:
            asked = [client.recommend(**options) for options in given]
            return await asyncio.gather(*asked, return_exceptions=True)

    for place, (options, answer) in enumerate(zip(given, asyncio.run(ask()), strict=True)):
        if place % 6 == 0:
            assert isinstance(answer, InvalidRequest)
        else:
            assert answer == offline(steps, **options)


def test_an_exported_prompt_builder_encodes_no_title(steps, monkeypatch):
    """The export stores the tokens of every title, so a prompt with a title not used before needs no tokenizer."""
    monkeypatch.setattr(steps.prompts, "_short_title", None)
    last = len(steps.catalogue)
    assert steps.prompts.build([last], [last - 1, last])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_request_within_the_limits_equals_offline(steps, recommender, data):
    """The served answer equals the offline one for random histories, exclusions, candidates and TOP_K."""
    some_ids = st.lists(st.sampled_from(known_ids(steps)) | st.text(max_size=8), max_size=30)
    options = {"exclude": data.draw(some_ids)}
    if data.draw(st.booleans()):
        options["candidates"] = data.draw(st.lists(st.sampled_from(known_ids(steps)), max_size=20))
    if data.draw(st.booleans()):
        options["top_k"] = data.draw(st.integers(1, MAX_CANDIDATES))
    history = data.draw(some_ids)
    assert recommender.recommend(history, **options) == offline(steps, history, **options)


@pytest.fixture(scope="module")
def other_architectures(artifacts, tmp_path_factory):
    """Export the baselines, and LRURec with its index, into one repository, with the name as the models' suffix."""
    repository = tmp_path_factory.mktemp("architectures")
    for name in OTHERS:
        folder = tmp_path_factory.mktemp(name) / "movielens-100k"
        shutil.copytree(artifacts / "data", folder / "data")
        model = "lrurec" if name == "index" else name
        train_retriever(replace(BRIEF_RETRIEVER, model=model), folder)
        with weighed(0.5):
            train_ranker(BRIEF_RANKER, folder, str(tiny_base(tmp_path_factory.mktemp("tiny"))))
        export(Export(threads=1, index=name == "index"), folder, repository, suffix=f"_{name}")
    return repository


@pytest.mark.slow
def test_every_architecture_is_served(other_architectures):
    """SASRec, BERT4Rec, NARM and LRURec with its index, all on one server, each answer as their exported files do."""
    with LocalServer(other_architectures) as server, RecommenderClient(server.url) as recommender:
        for name in OTHERS:
            steps = ExportedSteps.load(other_architectures, f"_{name}")
            for history in ([], ["50"], ["no such item", "50", "181"], known_ids(steps)[:70]):
                assert recommender.recommend(history, model=f"{ENSEMBLE}_{name}") == offline(steps, history)
                alone = recommender.recommend(history, model=f"{RETRIEVAL_ENSEMBLE}_{name}")
                assert [row.retriever_rank for row in alone] == list(range(1, MAX_CANDIDATES + 1))


def test_evaluation_finds_every_served_list_identical(artifacts, repository, server):
    """`llamarec evaluate` finds the served list of each of the 943 users identical to the offline recomputation."""
    result = evaluate(artifacts, repository, ask_server(server.url), oracle_users=20)
    assert result["served"]["identical"] == result["served"]["users"] == 943
    assert result["served"]["oracle_users"] == 20
    if ExportedSteps.load(repository).ranker.runtime.dtype == "float32":  # then the oracle computes the same numbers
        assert result["served"]["equal_to_oracle"] == 1


@pytest.fixture(scope="module")
def independent(artifacts, tmp_path_factory):
    """Return artifacts with a ranker of independent lines."""
    folder = tmp_path_factory.mktemp("independent") / "movielens-100k"
    for stage in ("data", "retriever"):
        shutil.copytree(artifacts / stage, folder / stage)
    with weighed(0.5), a_direction(64):
        brief = replace(BRIEF_RANKER, read="independent-lines")
        train_ranker(brief, folder, str(tiny_base(tmp_path_factory.mktemp("tiny"))))
    return folder


@pytest.mark.thorough
def test_independent_lines_are_served_in_any_number(independent, tmp_path):
    """With 50 retrieved candidates, up to 200 given ones and kept histories, answers equal the offline ones.

    They do so one at a time, 16 at a time, and when a history is asked for again; the 201st candidate is refused.
    """
    export(Export(threads=1, retrieve=50, serving=Serving(prefix_cache=1)), independent, tmp_path)
    steps = ExportedSteps.load(tmp_path)
    ids = known_ids(steps)
    histories = [ids[start : start + 3] for start in range(0, 48, 3)]

    async def ask(url, **options):
        async with AsyncRecommenderClient(url) as client:
            return await asyncio.gather(*(client.recommend(history, **options) for history in histories))

    with LocalServer(tmp_path) as server, RecommenderClient(server.url) as recommender:
        one_by_one = [recommender.recommend(history) for history in histories]
        assert one_by_one == [offline(steps, history) for history in histories]
        assert {len(answer) for answer in one_by_one} == {50}
        assert asyncio.run(ask(server.url)) == one_by_one
        answers = asyncio.run(ask(server.url, candidates=ids[:200], top_k=200))
        assert answers == [offline(steps, history, candidates=ids[:200]) for history in histories]
        with pytest.raises(InvalidRequest, match="features: CANDIDATES holds 201 items: the ranker orders at most 200"):
            recommender.recommend([], candidates=ids[:201])


@pytest.mark.thorough
def test_what_a_ranker_of_independent_lines_cannot_do_is_refused_at_the_export(artifacts, independent, tmp_path):
    """More candidates than the ranker orders, a cache that holds no history, and a cache for letters."""
    with pytest.raises(
        InputError, match="retrieve is 201, but this ranker orders 1 to 200 candidates: give --retrieve"
    ):
        export(Export(threads=1, retrieve=201), independent, tmp_path)
    with pytest.raises(InputError, match="retrieve is 21, but this ranker orders 1 to 20 candidates"):
        export(Export(threads=1, retrieve=21), artifacts, tmp_path)
    with pytest.raises(InputError, match="a prefix cache is for rankers that read independent lines"):
        export(Export(threads=1, serving=Serving(prefix_cache=1)), artifacts, tmp_path)


@pytest.mark.parametrize(
    ("read", "depth"),
    [
        pytest.param("lines", 12, id="lines of the default depth", marks=pytest.mark.thorough),
        pytest.param("independent-lines", 6, id="independent lines", marks=pytest.mark.thorough),
        pytest.param("letters", None, id="letters of all layers", marks=pytest.mark.slow),
    ],
)
def test_real_users_on_the_pretrained_base(tmp_path, artifacts, read, depth):
    """SmolLM2, tuned on four prompts and merged, ranks with fusion weight 0 on the real server.

    Each list equals the offline one and differs from the retriever's, for six users.
    """
    folder = tmp_path / "movielens-100k"
    for stage in ("data", "retriever"):
        shutil.copytree(artifacts / stage, folder / stage)
    brief = RankerTraining(
        max_prompts=4, batch_size=4, validation_users=2, validate_every=1, full_validation=False, max_history=5
    )
    with weighed(0.0), a_direction(576):
        train_ranker(replace(brief, read=read, depth=depth), folder, EMBEDDED)
    export(Export(), folder, tmp_path / "repository")
    steps, data = ExportedSteps.load(tmp_path / "repository"), load_data(folder)
    moved = 0
    with LocalServer(tmp_path / "repository") as server, RecommenderClient(server.url) as recommender:
        for user in range(6):
            history = data.raw_history(user)
            answer = recommender.recommend(history)
            assert answer == offline(steps, history)
            moved += [row.retriever_rank for row in answer] != list(range(1, 21))
    assert moved == 6
