"""Items nearest to an item, by raw ids: from the retriever's exported files, and from the store's items."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from llamarec_client.contract import ITEM, MAX_SIMILAR, SIMILAR_ITEMS, TOP_K
from models.signals.neighbours import EQUAL, NeighbourSearch, TitleIndex, Weights
from models.signals.signals import Signals
from models.sparse import SparseRows
from models.titles.words import VOCABULARY_FILE, WordEncoder
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from preprocessing.features import check_ids
from stores.store import Listing

TEXT_ARM = "titles"
"""Folder of the retriever's text arm, in which the encoder of titles is."""


class SimilarItem(NamedTuple):
    """One item like another."""

    item: bytes
    """Raw id."""
    score: float
    """Weighted sum of the two signals."""
    transitions: float
    """See :class:`models.signals.neighbours.Neighbours`."""
    titles: float
    """See :class:`models.signals.neighbours.Neighbours`."""


@dataclass(frozen=True)
class SimilarItems:
    """Finds the items nearest to an item of a catalogue."""

    catalogue: Catalogue
    search: NeighbourSearch | None
    """None if the export has neither transitions nor words of titles."""
    encoder: WordEncoder | None = None
    """Encodes the titles of added items; None if the retriever cannot read a new title."""
    hidden: frozenset[int] = frozenset()
    """Items that are never returned."""
    _rows: dict[str, SparseRows] = field(default_factory=dict, repr=False)
    """What the titles of added items were encoded as: one item more costs little beside thousands of earlier ones."""

    @classmethod
    def load(cls, folder: Path) -> "SimilarItems":
        """Open the retriever's exported files, except its graph and vectors.

        Without signals, the titles are encoded here if there is an encoder, and both signals have weight 1.
        """
        catalogue, signals, arm = Catalogue.load(folder / ITEMS_FILE), Signals.load(folder), folder / TEXT_ARM
        encoder = WordEncoder.load(arm, dense=False) if (arm / VOCABULARY_FILE).is_file() else None
        search = None
        if signals is not None:
            titles = TitleIndex.of(signals.statistics.likeness.rows)
            search = NeighbourSearch(signals.statistics.transitions.edges, titles, Weights.of(signals.weights))
        elif encoder is not None:
            texts = ["", *(catalogue.title(item) for item in range(1, len(catalogue) + 1))]  # none of the padding
            search = NeighbourSearch(None, TitleIndex.of(encoder.rows(texts)), Weights(EQUAL, EQUAL))
        return cls(catalogue, search, encoder)

    def with_items(self, listing: Listing) -> "SimilarItems":
        """Return what also finds the items that are added while a server runs, by their titles, and no hidden ones."""
        catalogue = self.catalogue.with_added(listing.added)
        hidden = frozenset(item for raw in listing.hidden if (item := catalogue.number(raw)))
        search, titles = self.search, catalogue.titles_after(len(self.catalogue))
        if search is not None and self.encoder is not None and titles:
            search = search.with_added(self._encoded(title or "" for title in titles), len(self.catalogue) + 1)
        return replace(self, catalogue=catalogue, search=search, hidden=hidden)

    def __call__(self, item: bytes, top_k: int | None = None) -> list[SimilarItem]:
        """Return the nearest items, best first; fewer than ``top_k`` if no more are like it in any way.

        Args:
            item: raw id of the item, which may be hidden.
            top_k: maximum number of items; None for the default.

        Raises:
            InputError: the item is not in the catalogue, the number is out of range, or the export knows nothing of
                which items are alike; the message names the tensor.
        """
        check_ids(ITEM.name, [item])
        if top_k is not None and not 1 <= top_k <= MAX_SIMILAR:
            raise InputError(f"{TOP_K.name} is {top_k}: ask for 1 to {MAX_SIMILAR:,}")
        number = self.catalogue.number(item)
        if number is None:
            raise InputError(
                f"{ITEM.name} is {item.decode()!r}, which is not in the catalogue ({len(self.catalogue):,} items); ids"
                " are compared as strings, exactly as in the raw file"
            )
        if self.search is None:
            raise InputError(
                "the exported retriever has neither transitions nor words of titles, by which items are alike: run"
                " `llamarec train-retriever --signals` and export again"
            )
        found = self.search(number, top_k or SIMILAR_ITEMS, self.hidden)
        columns = (column.tolist() for column in found[1:])
        return list(map(SimilarItem, map(self.catalogue.raw, found.items.tolist()), *columns))

    def _encoded(self, titles: Iterable[str]) -> SparseRows:
        """Return the TF-IDF weights of titles [titles, words]."""
        assert self.encoder is not None
        wanted = list(titles)
        for title in dict.fromkeys(wanted):
            if title not in self._rows:
                self._rows[title] = self.encoder.rows([title])
        return SparseRows.of([self._rows[title] for title in wanted])
