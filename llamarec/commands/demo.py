"""`llamarec demo`: every stage on MovieLens-100K, from raw events to a recommendation served by Triton."""

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.commands.train_ranker import print_worth
from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Repository, from_preset
from llamarec.tables import console, messages, print_table
from preprocessing.errors import InputError

if TYPE_CHECKING:  # the stages import torch and NVTabular: not for `--help`
    from llamarec_client import Recommendation
    from preprocessing.data import Data

PAGE_STORE = "page.sqlite"
"""File beside the artifacts, which the page records in by default."""
SHOWN = 10
"""Number of history items that are printed."""


def demo(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    preset: Annotated[str, typer.Option(help="`demo` (minutes on two cores) or `paper`, for both trainings.")] = "demo",
    user: Annotated[str | None, typer.Option(help="Raw id of the test user to recommend to.")] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="Serve a web page over the exported repository, of any data set.")
    ] = False,
    ui_port: Annotated[int, typer.Option(help="Port of the page, on the loopback interface.")] = 7860,
    store: Annotated[
        str | None,
        typer.Option(
            help="Address of the store in which the page records what is chosen, added and hidden."
            " Default: a file beside the artifacts.",
            envvar="LLAMAREC_STORE",
        ),
    ] = None,
) -> None:
    """Run every stage on MovieLens-100K, ending with a recommendation served by Triton."""
    if ui:
        show_page(artifacts, repository, preset, ui_port, store or f"sqlite:///{artifacts.resolve() / PAGE_STORE}")
    else:
        recommend_to_one(artifacts, repository, preset, user)


def recommend_to_one(artifacts: Path, repository: Path, preset: str, user: str | None) -> None:
    """Run every stage that is not finished, then serve one test user and print the answer.

    Args:
        artifacts: the data set's artifacts.
        repository: the model repository to fill and serve.
        preset: of both trainings.
        user: raw id of the test user; by default the first one whose next item is among the retriever's top 20, since
            only those can a ranker move.

    Raises:
        InputError: there is no such preset or user.
    """
    from llamarec_client import RecommenderClient
    from llamarec_client.contract import RETRIEVAL_ENSEMBLE
    from preprocessing.data import load_data
    from serving.server.local import LocalServer

    run_stages(artifacts, repository, preset)
    data = load_data(artifacts)
    place = _choose(data, artifacts, user)
    history = data.raw_history(place)
    with _stage("serve: tritonserver"), LocalServer(repository) as server, RecommenderClient(server.url) as client:
        retrieved = client.recommend(history, model=RETRIEVAL_ENSEMBLE)
        ranked = client.recommend(history)
    _print_history(data, data.users[place], history)
    _print_list(data, "what the retriever alone answers", retrieved, place)
    _print_list(data, "what LlamaRec answers: the same 20, ranked by the language model", ranked, place)
    _print_landing(data, retrieved, ranked, place)


def show_page(artifacts: Path, repository: Path, preset: str, port: int, store: str) -> None:
    """Serve the page over whatever is exported, of any data set; run the stages first where nothing is.

    Args:
        artifacts: the data set's artifacts.
        repository: the model repository to serve.
        preset: of both trainings, where they are run.
        port: of the page, on the loopback interface.
        store: address of the store in which the page records what is chosen, added and hidden.

    Raises:
        InputError: the port is taken, or the repository was exported from other data than ``artifacts``.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise InputError("the page needs fastapi and uvicorn: `pip install 'llamarec[ui]'`")
    from llamarec.page.app import DemoPage, show
    from preprocessing.artifacts import MANIFEST
    from preprocessing.data import load_data
    from serving.contract import STEPS, STORE_VARIABLE
    from serving.evaluation import check_exported_from
    from serving.layout import step_artifact
    from serving.server.local import LocalServer

    if not (step_artifact(repository, STEPS[-1]) / MANIFEST).is_file():
        run_stages(artifacts, repository, preset)
    data = load_data(artifacts)
    check_exported_from(repository, data)
    os.environ[STORE_VARIABLE] = store  # of the server
    with LocalServer(repository) as server:
        messages.print(f"[bold]http://127.0.0.1:{port}[/]   (Ctrl+C ends it)")
        show(DemoPage.open(server.url, repository, data, store), port)


def run_stages(artifacts: Path, repository: Path, preset: str) -> None:
    """Run every stage on MovieLens-100K that is not finished, up to an exported repository.

    Raises:
        InputError: there is no such preset.
    """
    from export.repository import Export, export
    from models.ranker.base import EMBEDDED
    from models.ranker.options import PRESETS as RANKER_PRESETS
    from models.ranker.options import RankerTraining
    from models.ranker.training import train_ranker
    from models.retriever.options import PRESETS as RETRIEVER_PRESETS
    from models.retriever.options import RetrieverTraining
    from models.retriever.training import train_retriever
    from preprocessing.preprocess import Preprocessing, preprocess

    retriever_options = from_preset(RetrieverTraining, RETRIEVER_PRESETS, preset, {})
    ranker_options = from_preset(RankerTraining, RANKER_PRESETS, preset, {})
    with _stage("preprocess: NVTabular workflows on MovieLens-100K"):
        statistics = preprocess(Preprocessing(dataset="movielens-100k"), artifacts)
    print_table("", list(statistics.row()), [list(statistics.row().values())])
    with _stage("train-retriever: LRURec"):
        train_retriever(retriever_options, artifacts)
    _print_retrieval(artifacts, retriever_options.model)
    with _stage(f"train-ranker: QLoRA on {EMBEDDED}"):
        metrics = train_ranker(ranker_options, artifacts, EMBEDDED)
    print_worth(metrics)
    with _stage(f"export: {repository}"):
        export(Export(), artifacts, repository)


def _print_retrieval(artifacts: Path, model: str) -> None:
    """Print the retriever's test metrics, alone and reordered by the signals, with the interval of the difference."""
    from models.intervals import interval
    from models.metrics import gains, ndcg, recall
    from models.retriever.candidates import CandidateTable

    table = CandidateTable.read(artifacts / "retriever" / "candidates-test.parquet")
    rows: list[list[object]] = []
    for label, ranks in ((f"{model} alone", table.model_ranks), ("reordered by the signals", table.ranks)):
        gained = interval(gains(ranks, 10) - gains(table.model_ranks, 10)) if rows else ""
        rows.append([label, recall(ranks, 10), recall(ranks, 20), ndcg(ranks, 10), gained])
    header = ["", "Recall@10", "Recall@20", "NDCG@10", "difference of NDCG@10, 95 %"]
    print_table(f"{len(table.users)} test users, all items ranked", header, rows)


@contextmanager
def _stage(name: str) -> Iterator[None]:
    messages.print(f"[bold]{name}")
    started = time.perf_counter()
    yield
    messages.print(f"  [dim]{time.perf_counter() - started:.1f} s")


def _choose(data: "Data", artifacts: Path, user: str | None) -> int:
    from models.retriever.candidates import CandidateTable

    if user is not None:
        if user not in data.users:
            raise InputError(f"user {user!r} is not in {data.name}: give a raw user id that survived preprocessing")
        return data.users.index(user)
    table = CandidateTable.read(artifacts / "retriever" / "candidates-test.parquet")
    return next((place for place, rank in enumerate(table.ranks) if 1 <= rank <= len(table.candidates[place].items)), 0)


def _print_history(data: "Data", user: str, history: list[str]) -> None:
    rows = [[item_id, data.catalogue.title_of(item_id)] for item_id in history[-SHOWN:]]
    print_table(f"user {user}: the last {len(rows)} of {len(history)} items, oldest first", ["item", "title"], rows)


def _true_item(data: "Data", place: int) -> str:
    return data.catalogue.raw(int(data.test[place])).decode()


def _print_list(data: "Data", title: str, answer: "list[Recommendation]", place: int) -> None:
    truth, title_of = _true_item(data, place), data.catalogue.title_of
    rows = [
        [rank, r.item_id, title_of(r.item_id), r.score, r.retriever_rank, "<- next" if r.item_id == truth else ""]
        for rank, r in enumerate(answer, start=1)
    ]
    print_table(title, ["", "item", "title", "score", "retriever rank", ""], rows)


def _print_landing(data: "Data", retrieved: "list[Recommendation]", ranked: "list[Recommendation]", place: int) -> None:
    truth = _true_item(data, place)
    before, after = (
        next((rank for rank, r in enumerate(answer, start=1) if r.item_id == truth), None)
        for answer in (retrieved, ranked)
    )
    landed = (
        f"landed at place {after}; the retriever had it at {before}" if after else "is not among the retriever's top 20"
    )
    console.print(f"The item this user really chose next, {data.catalogue.title_of(truth)}, {landed}.")
