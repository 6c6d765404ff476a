"""Policies of requests and of a release on the real tritonserver: the answers equal the offline ones, bit for bit."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipeline import copied

from export.repository import Export, export
from llamarec.commands.evaluate import ask_server
from llamarec_client import Policy, Recommendation, RecommenderClient, Request
from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import InvalidRequest
from preprocessing.artifacts import MANIFEST, read_manifest
from preprocessing.preprocess import Preprocessing, preprocess
from serving.batch.recommend_all import RecommendAll, recommend_all
from serving.batch.users import ArtifactUsers
from serving.evaluation import evaluate
from serving.layout import exported_release
from serving.offline import ExportedSteps, RetrievalSteps
from serving.policy import Policy as ReleasePolicy
from serving.server.local import LocalServer

HISTORY = ["50", "181", "no such item", "172", "174"]


def answers(client: RecommenderClient, history: list[str], policy: dict | None) -> dict[str, list[Recommendation]]:
    """Return the answers of both ensembles."""
    given = None if policy is None else Policy(**policy)
    return {model: client.recommend(history, policy=given, model=model) for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE)}


class Offline:
    """The exported functions of a repository, called one after another in this process."""

    def __init__(self, repository: Path) -> None:
        self.steps, self.retrieval = ExportedSteps.load(repository), RetrievalSteps.load(repository)

    def answers(self, history: list[str], policy: dict | None) -> dict[str, list[Recommendation]]:
        """Return the answers of both ensembles."""
        rows = {
            ENSEMBLE: self.steps.recommend(history, policy=policy),
            RETRIEVAL_ENSEMBLE: self.retrieval.recommend(history, policy=policy),
        }
        return {model: [Recommendation(*row) for row in found] for model, found in rows.items()}


def ids(answer: list[Recommendation]) -> list[str]:
    return [row.item_id for row in answer]


def test_boosts_and_repeats_are_served(repository, server):
    """Items have no groups here. An empty policy changes no bit; the others are those of the offline functions."""
    offline = Offline(repository)
    with RecommenderClient(server.url) as client:
        plain = answers(client, HISTORY, None)
        assert answers(client, HISTORY, {}) == plain
        assert not set(HISTORY) & set(ids(plain[ENSEMBLE]))
        last = ids(plain[RETRIEVAL_ENSEMBLE])[-1]
        policies = (None, {"boosts": {last: 1e9}}, {"repeats": "all"}, {"repeats": 2, "boosts": {"172": 1e9}})
        for policy in policies:
            assert answers(client, HISTORY, policy) == offline.answers(HISTORY, policy)
        boosted = answers(client, HISTORY, {"boosts": {last: 1e9}})
        assert [answer[0].item_id for answer in boosted.values()] == [last, last]
        # The last two entries are 172 and 174: a boost does not bring back what they mask.
        assert not {"172", "174"} & set(ids(answers(client, HISTORY, policies[-1])[ENSEMBLE]))
        many = client.recommend_many([Request(HISTORY), Request(HISTORY, policy=Policy(repeats="all"))] * 8)
        assert [ids(answer) for answer in many[::2]] == [ids(plain[ENSEMBLE])] * 8
        with pytest.raises(InvalidRequest, match="features: POLICY: max_per_group needs groups, and the items have no"):
            client.recommend(HISTORY, policy=Policy(max_per_group=1))


@pytest.fixture(scope="module")
def grouped(artifacts, tmp_path_factory) -> Path:
    """Return the artifacts with a genre of each film, and the same models."""
    folder = tmp_path_factory.mktemp("grouped") / "movielens-100k"
    preprocess(Preprocessing(dataset="movielens-100k", group_column="genres"), folder)
    copied(artifacts, folder, "retriever", "ranker")
    for stage in ("retriever", "ranker"):
        content = json.loads((folder / stage / MANIFEST).read_text())
        content["inputs"]["data"] = read_manifest(folder / "data", "data", "").fingerprint
        (folder / stage / MANIFEST).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def grouped_repository(grouped, tmp_path_factory) -> Path:
    """Return a repository whose items have groups, without a policy of its own."""
    folder = tmp_path_factory.mktemp("policies")
    export(Export(threads=1), grouped, folder)
    return folder


@pytest.fixture(scope="module")
def grouped_offline(grouped_repository) -> Offline:
    return Offline(grouped_repository)


@pytest.fixture(scope="module")
def client(grouped_repository) -> Iterator[RecommenderClient]:
    with LocalServer(grouped_repository) as server, RecommenderClient(server.url) as client:
        yield client


@pytest.mark.thorough
@pytest.mark.parametrize(
    "policy",
    [
        None,
        {"max_per_group": 2},
        {"only_groups": ["Film-Noir", "Western"]},
        {"never_groups": ["Action", "Drama"]},
        {"max_per_group": 3, "never_groups": ["Comedy"], "boosts": {"1": 5.0, "100": 0.1}, "repeats": 1},
    ],
    ids=str,
)
def test_groups_are_served(grouped_offline, client, policy):
    """Served and offline answers are equal; the groups are those of the catalogue, and only a rare one shortens."""
    catalogue = grouped_offline.retrieval.catalogue
    group_of = [None, *catalogue.groups.values()]
    for history in (HISTORY, []):
        found = answers(client, history, policy)
        assert found == grouped_offline.answers(history, policy)
        for answer in found.values():
            names = Counter(group_of[catalogue.number(row.item_id.encode()) or 0] for row in answer)
            rules = policy or {}
            assert not set(rules.get("never_groups", ())) & set(names)
            assert set(names) <= set(rules.get("only_groups", {*group_of}))
            assert max(count for name, count in names.items() if name) <= rules.get("max_per_group", 20)
            assert len(answer) == 20


@pytest.mark.thorough
def test_a_release_has_a_policy_of_its_own(grouped, grouped_repository, grouped_offline, tmp_path):
    """It applies to requests without one, to evaluation and to `recommend-all`; its export id is another.

    A request's field takes the place of the release's, and null ends it.
    """
    policy = ReleasePolicy(max_per_group=2, never_groups=("Drama",), boosts={"1": 2.0}, repeats=3)
    export(Export(threads=1, policy=policy), grouped, tmp_path / "own")
    assert exported_release(tmp_path / "own") != exported_release(grouped_repository)
    own = Offline(tmp_path / "own")
    with LocalServer(tmp_path / "own") as server, RecommenderClient(server.url) as client:
        fields = policy.given()
        plain = grouped_offline.answers(HISTORY, fields)
        assert answers(client, HISTORY, None) == plain == own.answers(HISTORY, None)
        off = dict.fromkeys(fields)
        assert answers(client, HISTORY, off) == grouped_offline.answers(HISTORY, None)
        changed = {"max_per_group": 1}
        assert answers(client, HISTORY, changed) == grouped_offline.answers(HISTORY, {**fields, **changed})
        chosen = own.steps.recommend(HISTORY, candidates=["50", "1"])
        assert client.recommend(HISTORY, candidates=["50", "1"]) == [Recommendation(*row) for row in chosen]
        assert chosen != (grouped_offline.steps.recommend(HISTORY, candidates=["50", "1"])), "item 1 is boosted"
        result = evaluate(grouped, tmp_path / "own", ask_server(server.url), oracle_users=5)
        assert result["served"]["identical"] == result["served"]["users"] == 943
        users = list(ArtifactUsers(grouped))[:20]
        requests = [Request(row.history, top_k=20) for row in users]
        served = client.recommend_many(requests, model=RETRIEVAL_ENSEMBLE, timeout=60)
    recommend_all(RecommendAll(stage="retrieval"), tmp_path / "own", ArtifactUsers(grouped), tmp_path / "all")
    (partition,) = (tmp_path / "all").glob("recommendations/*")
    assert pq.read_table(partition)["items"].to_pylist()[:20] == [ids(answer) for answer in served]
