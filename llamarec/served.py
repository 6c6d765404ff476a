"""Questions to a running server that more than one command asks."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from client.recommender import RecommenderClient
from export.evaluation import Ask, ServedList
from preprocessing.catalogue import ITEMS_FILE, Catalogue

IN_FLIGHT = 4
"""Requests at a time: enough that the server's steps overlap."""
PATIENCE = 300.0
"""Seconds to wait for one answer while others are ranked before it."""


def ask_server(url: str) -> Ask:
    """A function that asks the server at ``url`` for the ranked list of each history, some at a time, in order."""

    def ask(histories: Sequence[Sequence[str]]) -> Iterable[ServedList]:
        with RecommenderClient(url) as recommender, ThreadPoolExecutor(IN_FLIGHT) as pool:
            for answer in pool.map(lambda history: recommender.recommend(history, timeout=PATIENCE), histories):
                yield ServedList([r.item_id for r in answer], [r.score for r in answer])

    return ask


def titles(artifacts: Path) -> Callable[[str], str]:
    """Looks up an item's title where the data set's artifacts are at hand; elsewhere titles stay empty."""
    path = artifacts / "data" / ITEMS_FILE
    if not path.is_file():
        return lambda item_id: ""
    catalogue = Catalogue.load(path)

    def title(item_id: str) -> str:
        item = catalogue.number(item_id.encode())
        return "" if item is None else catalogue.title(item)

    return title
