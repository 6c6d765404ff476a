"""The whole way on MovieLens-100K, from raw events to a recommendation served by Triton."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.contract import RETRIEVAL_ENSEMBLE, STEPS
from client.recommender import Recommendation, RecommenderClient
from client.server import LocalServer
from export.evaluation import check_exported_from
from export.repository import Export, export, step_artifact
from llamarec.options import from_preset
from llamarec.tables import console, messages, print_table
from models.ranker.options import PRESETS as RANKER_PRESETS
from models.ranker.options import RankerTraining
from models.ranker.training import train_ranker
from models.retriever.candidates import CandidateTable
from models.retriever.options import PRESETS as RETRIEVER_PRESETS
from models.retriever.options import RetrieverTraining
from models.retriever.training import train_retriever
from preprocessing.artifacts import MANIFEST
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess

BASE = "smollm2-135m-instruct"
SHOWN = 10
"""History items and recommendations that are printed."""


def demo(artifacts: Path, repository: Path, preset: str, user: str | None) -> None:
    """Runs every stage that is not finished, then serves one test user and prints what came back.

    Args:
        artifacts: the data set's artifacts.
        repository: the model repository to fill and serve.
        preset: of both trainings.
        user: raw id of the test user; by default the first one whose next item is among the retriever's top 20,
            which only a ranker can move.

    Raises:
        InputError: there is no such preset or user.
    """
    run_stages(artifacts, repository, preset)
    data = load_data(artifacts)
    place = _choose(data, artifacts, user)
    history = [data.catalogue.raw(int(item)).decode() for item in (*data.training[place], data.validation[place])]
    with _stage("serve: tritonserver"), LocalServer(repository) as server, RecommenderClient(server.url) as client:
        retrieved = client.recommend(history, model=RETRIEVAL_ENSEMBLE)
        ranked = client.recommend(history)
    _print_history(data, data.users[place], history)
    _print_list(data, "what the retriever alone answers", retrieved, place)
    _print_list(data, "what LlamaRec answers: the same 20, ranked by the language model", ranked, place)
    _print_landing(data, retrieved, ranked, place)


def demo_page(artifacts: Path, repository: Path, preset: str, port: int) -> None:
    """Serves the page over whatever is exported, of any data set; runs the stages first where nothing is.

    Args:
        artifacts: as in :func:`demo`, as ``repository`` and ``preset``.
        repository: see there.
        preset: see there.
        port: of the page, on the loopback interface.

    Raises:
        InputError: the port is taken, or the repository was exported from other data than ``artifacts``.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise InputError("the page needs fastapi and uvicorn: `pip install 'llamarec[ui]'`")
    from llamarec.ui import Showroom, show

    if not (step_artifact(repository, STEPS[-1]) / MANIFEST).is_file():
        run_stages(artifacts, repository, preset)
    data = load_data(artifacts)
    check_exported_from(repository, data)
    with LocalServer(repository) as server:
        messages.print(f"[bold]http://127.0.0.1:{port}[/]   (Ctrl+C ends it)")
        show(Showroom.open(server.url, repository, data), port)


def run_stages(artifacts: Path, repository: Path, preset: str) -> None:
    """Every stage on MovieLens-100K that is not finished, up to an exported repository.

    Raises:
        InputError: there is no such preset.
    """
    retriever_options = from_preset(RetrieverTraining, RETRIEVER_PRESETS, preset)
    ranker_options = from_preset(RankerTraining, RANKER_PRESETS, preset)
    with _stage("preprocess: NVTabular workflows on MovieLens-100K"):
        statistics = preprocess(Preprocessing(dataset="movielens-100k"), artifacts)
    print_table("", list(statistics.row()), [list(statistics.row().values())])
    with _stage("train-retriever: LRURec"):
        retriever = train_retriever(retriever_options, artifacts)
    test = retriever["test"]
    console.print(f"  test Recall@10 {test['Recall@10']:.4f}, Recall@20 {test['Recall@20']:.4f}")
    with _stage(f"train-ranker: QLoRA on {BASE}"):
        train_ranker(ranker_options, artifacts, BASE)
    with _stage(f"export: {repository}"):
        export(Export(), artifacts, repository)


@contextmanager
def _stage(name: str) -> Iterator[None]:
    messages.print(f"[bold]{name}")
    started = time.perf_counter()
    yield
    messages.print(f"  [dim]{time.perf_counter() - started:.1f} s")


def _choose(data: Data, artifacts: Path, user: str | None) -> int:
    if user is not None:
        if user not in data.users:
            raise InputError(f"user {user!r} is not in {data.name}: give a raw user id that survived preprocessing")
        return data.users.index(user)
    table = CandidateTable.read(artifacts / "retriever" / "candidates-test.parquet")
    return next((place for place, rank in enumerate(table.ranks) if 1 <= rank <= len(table.candidates[place].items)), 0)


def _title(data: Data, item_id: str) -> str:
    item = data.catalogue.number(item_id.encode())
    return data.catalogue.title(item) if item else ""


def _print_history(data: Data, user: str, history: list[str]) -> None:
    rows = [[item_id, _title(data, item_id)] for item_id in history[-SHOWN:]]
    print_table(f"user {user}: the last {len(rows)} of {len(history)} items, oldest first", ["item", "title"], rows)


def _print_list(data: Data, title: str, answer: list[Recommendation], place: int) -> None:
    truth = data.catalogue.raw(int(data.test[place])).decode()
    rows = [
        [rank, r.item_id, _title(data, r.item_id), r.score, r.retriever_rank, "<- next" if r.item_id == truth else ""]
        for rank, r in enumerate(answer, start=1)
    ]
    print_table(title, ["", "item", "title", "score", "retriever rank", ""], rows)


def _print_landing(data: Data, retrieved: list[Recommendation], ranked: list[Recommendation], place: int) -> None:
    truth = data.catalogue.raw(int(data.test[place])).decode()
    before, after = (
        next((rank for rank, r in enumerate(answer, start=1) if r.item_id == truth), None)
        for answer in (retrieved, ranked)
    )
    landed = (
        f"landed at place {after}; the retriever had it at {before}" if after else "is not among the retriever's top 20"
    )
    console.print(f"The item this user really chose next, {_title(data, truth)}, {landed}.")
