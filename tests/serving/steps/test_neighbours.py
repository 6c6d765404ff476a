"""The `neighbours` step without a server: what it loads, answers and refuses, by transitions counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from llamarec_client.contract import ITEM, ITEM_ID, SCORE, TITLES, TOP_K, TRANSITIONS
from models.signals.fitting import count_statistics
from models.signals.signals import SIGNALS, Signals
from models.titles.fit_words import fit_words
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from serving.contract import PROBE
from serving.similar import SimilarItems
from serving.steps.neighbours import NeighboursStep
from stores.store import AddedItem, Listing, StoreError

TITLES_OF = ["Star Wars", "Star Trek", "Fargo", "Wars", "Trek"]
IDS = [b"sw", b"st", b"fa", b"wa", b"tr"]
SEQUENCES = [[1, 3], [1, 3], [1, 2, 3], [4, 1]]
"""After item 1 came 3 three times, twice at distance 1 and once at 2 (counts 1/2), and 2 once; after 2 came 3 once."""


def exported(folder: Path, *, signals: bool = True, encoder: bool = True, weights: tuple[float, float] = (2.0, 0.5)):
    """Write what `llamarec export` writes of these five items for this step, and load it."""
    Catalogue(IDS, TITLES_OF, [3, 1, 3, 1, 1]).write(folder / ITEMS_FILE)
    words = fit_words(TITLES_OF)
    if encoder:
        (folder / "titles").mkdir()
        words.save(folder / "titles")
    if signals:
        sequences = [np.array(sequence, np.int32) for sequence in SEQUENCES]
        statistics = count_statistics(sequences, TITLES_OF, 5, words)
        by = dict.fromkeys(SIGNALS, 0.0) | {"transitions": weights[0], "likeness_max": weights[1], "popularity": 9.0}
        Signals(statistics, {"retriever": 1.0, **by}, 10).save(folder)
    return SimilarItems.load(folder)


def ask(step: NeighboursStep, item: bytes, top_k: int | None = None) -> list[tuple]:
    request = {ITEM: np.array([item], dtype=object)}
    answer = step.answer(request if top_k is None else {**request, TOP_K: np.array([top_k], np.int32)})
    columns = (np.asarray(answer[spec]).tolist() for spec in (ITEM_ID, SCORE, TRANSITIONS, TITLES))
    return list(zip(*columns, strict=True))


class Items:
    """Stands in for a store of items."""

    def __init__(self, listing: Listing | None) -> None:
        self.now = listing

    def listing(self, known=None):
        if self.now is None:
            raise StoreError("the store is down")
        return None if known == self.now.revision else self.now


def test_transitions_by_hand(tmp_path):
    """Twice log(1 + 2.5) for Fargo; Star Trek by log(1 + 1) and the word that it shares; then the title that shares
    one. Words in two titles each: star, wars, trek; with one idf the cosines are 1/2 and 1/sqrt(2).
    """
    step = NeighboursStep.of(exported(tmp_path))
    expected = [
        (b"fa", 2 * np.log(3.5), np.log(3.5), 0),
        (b"st", 2 * np.log(2) + 0.5 * 0.5, np.log(2), 0.5),
        (b"wa", 0.5 / np.sqrt(2), 0, 1 / np.sqrt(2)),
    ]
    assert ask(step, b"sw") == [(item, *map(pytest.approx, signals)) for item, *signals in expected]
    assert [item for item, *_ in ask(step, b"sw", top_k=1)] == [b"fa"]
    assert [item for item, *_ in ask(step, b"fa")] == []
    assert step.facts({ITEM: np.array([b"sw"], dtype=object)}, step.answer({ITEM: [b"sw"]}), {}) == {
        "item": "sw",
        "similar": 3,
    }


def test_without_signals_the_titles_alone_tell(tmp_path):
    """Transitions are 0, and the score is the likeness."""
    step = NeighboursStep.of(exported(tmp_path, signals=False))
    expected = [(b"wa", 1 / np.sqrt(2), 0, 1 / np.sqrt(2)), (b"st", 0.5, 0, 0.5)]
    assert ask(step, b"sw") == [(item, *map(pytest.approx, signals)) for item, *signals in expected]


def test_without_an_encoder_added_items_are_like_nothing(tmp_path):
    """The statistics have the titles of the exported items; a new title cannot be read. It is known, and no error."""
    listing = Listing(1, (AddedItem(b"new", "Star Wars"),), frozenset())
    step = NeighboursStep.of(exported(tmp_path, encoder=False), Items(listing))
    assert [item for item, *_ in ask(step, b"sw")] == [b"fa", b"st", b"wa"]
    assert ask(step, b"new") == []


def test_an_export_that_knows_nothing_says_so(tmp_path):
    step = NeighboursStep.of(exported(tmp_path, signals=False, encoder=False))
    with pytest.raises(InputError, match=r"neither transitions nor words of titles.*: run `llamarec train-retriever"):
        ask(step, b"sw")
    assert ask(step, PROBE.encode()) == [], "its process is healthy"


def test_added_items_are_found_and_hidden_ones_are_not(tmp_path):
    """The added Wars has the title of item 4. An id that the catalogue knows keeps its title; a hidden item may be
    asked about, and one that was hidden is back when it is shown.
    """
    added = (AddedItem(b"fa", "Star Wars"), AddedItem(b"new", "Wars"))
    items = Items(Listing(1, added, frozenset([b"st", b"nobody"])))
    step = NeighboursStep.of(exported(tmp_path), items)
    assert [item for item, *_ in ask(step, b"sw")] == [b"fa", b"wa", b"new"]
    assert ask(step, b"new")[0] == (b"wa", pytest.approx(0.5), 0, pytest.approx(1))
    assert [item for item, *_ in ask(step, b"st")] == [b"fa", b"tr", b"sw"]
    items.now = Listing(2, added, frozenset())
    step.items._asked -= 1
    assert [item for item, *_ in ask(step, b"sw")] == [b"fa", b"st", b"wa", b"new"]


def test_before_the_hidden_items_are_known_only_the_probe_is_answered(tmp_path):
    step = NeighboursStep.of(exported(tmp_path), Items(None))
    assert ask(step, PROBE.encode()) == []
    with pytest.raises(StoreError):
        ask(step, b"sw")


@pytest.mark.parametrize(
    ("item", "top_k", "named"),
    [
        (b"x", None, r"ITEM is 'x', which is not in the catalogue \(5 items\)"),
        (b"", None, "ITEM is ''"),
        (b"x" * 513, None, r"ITEM\[0\] has 513 bytes"),
        (b"\xff", None, r"ITEM\[0\] is .*not UTF-8"),
        (b"sw", 0, "TOP_K is 0: ask for 1 to 1,000"),
        (b"sw", 1001, "TOP_K is 1001"),
    ],
)
def test_a_bad_request_is_refused_with_the_name_of_the_tensor(tmp_path, item, top_k, named):
    with pytest.raises(InputError, match=named):
        ask(NeighboursStep.of(exported(tmp_path)), item, top_k)
