"""Encodes a request's raw ids as item numbers and checks the limits of the serving contract; it runs in Triton."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import CANDIDATES, EXCLUDE, HISTORY, MAX_CANDIDATES, MAX_HISTORY, MAX_ID_BYTES, TOP_K
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError

VOCABULARY_FILE = "vocabulary.json"


@dataclass(frozen=True)
class EncodedRequest:
    """One user's request, in item numbers."""

    history: NDArray[np.int32]
    """Items in the retriever's vocabulary, oldest first, with repetitions."""
    excluded: NDArray[np.int32]
    """Items that must not be returned, in ascending order."""
    given: NDArray[np.int32]
    """The caller's candidates without repetitions and excluded items; empty if candidates are to be retrieved."""
    retrieve: bool
    """Whether candidates are to be retrieved."""
    limit: int
    """Maximum number of items to return; 0 for all."""
    unknown: int
    """Number of ids in the history outside the retriever's vocabulary."""


def save_vocabulary(folder: Path, items: int, candidates: int = MAX_CANDIDATES, *, titles: bool = False) -> None:
    """Write what :meth:`FeatureEncoder.load` reads.

    Args:
        folder: an existing folder.
        items: number of items that the retriever knows.
        candidates: maximum number of candidates that the ranker orders.
        titles: whether the retriever knows an item that is added later by its title.
    """
    limits = {"items": items, "candidates": candidates, "titles": titles}
    (folder / VOCABULARY_FILE).write_text(json.dumps(limits) + "\n", encoding="utf-8")


class FeatureEncoder:
    """Encoder of requests that looks up raw ids in a catalogue. Ids are compared as bytes, exactly as in the raw file.

    Args:
        catalogue: catalogue of the data set that the models were trained on.
        vocabulary: number of items that the retriever knows; by default those that were trained.
        most: maximum number of candidates.
        titles: whether the retriever knows an item that is added later by its title.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: int | None = None,
        most: int = MAX_CANDIDATES,
        *,
        titles: bool = False,
    ) -> None:
        self._catalogue = catalogue
        self._most = most
        self._vocabulary = catalogue.trained if vocabulary is None else vocabulary
        self._titles = titles
        self.hidden: frozenset[int] = frozenset()
        """Items that are excluded from every answer."""
        self._hidden: NDArray[np.int32] = np.empty(0, np.int32)

    @classmethod
    def load(cls, folder: Path, catalogue: Catalogue) -> "FeatureEncoder":
        """Return the encoder for the catalogue and the retriever's vocabulary of an exported folder."""
        path = folder / VOCABULARY_FILE
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        most, titles = stored.get("candidates", MAX_CANDIDATES), stored.get("titles", False)
        return cls(catalogue, stored.get("items"), most, titles=titles)

    def with_items(self, added: Sequence[tuple[bytes, str]], hidden: Iterable[bytes]) -> "FeatureEncoder":
        """Return an encoder that knows further items, and excludes others from every answer.

        Args:
            added: raw id and title of each further item, see :meth:`preprocessing.catalogue.Catalogue.with_added`.
            hidden: raw ids, also of items that are not in the catalogue.
        """
        catalogue = self._catalogue.with_added(added)
        vocabulary = len(catalogue) if self._titles else self._vocabulary
        encoder = FeatureEncoder(catalogue, vocabulary, self._most, titles=self._titles)
        encoder.hidden = frozenset(item for raw in hidden if (item := catalogue.number(raw)))
        encoder._hidden = np.array(sorted(encoder.hidden), np.int32)
        return encoder

    def encode(
        self,
        history: Sequence[bytes],
        exclude: Sequence[bytes] = (),
        candidates: Sequence[bytes] | None = None,
        top_k: int | None = None,
    ) -> EncodedRequest:
        """Check one request, and return it encoded.

        Unknown ids in HISTORY are skipped and counted; in EXCLUDE they are ignored. Hidden items are excluded too. Only
        as many candidates as the ranker orders may remain after repetitions and excluded items are removed.

        Args:
            history: raw ids, oldest first.
            exclude: raw ids that must not be returned.
            candidates: raw ids to rank; None to retrieve candidates.
            top_k: maximum number of items to return; None for all.

        Raises:
            InputError: a limit is exceeded, an id is not UTF-8, or a candidate is unknown; the message names the
                tensor.
        """
        for name, ids in ((HISTORY.name, history), (EXCLUDE.name, exclude), (CANDIDATES.name, candidates or ())):
            check_ids(name, ids)
        if top_k is not None and not 1 <= top_k <= self._most:
            raise InputError(f"{TOP_K.name} is {top_k}: ask for 1 to {self._most}, or leave it out for all")
        last = self._vocabulary
        known = [item for item in map(self._catalogue.number, history) if item is not None and item <= last]
        excluded = {item for raw in exclude if (item := self._catalogue.number(raw))}
        return EncodedRequest(
            history=np.array(known, np.int32),
            excluded=np.union1d(self._hidden, np.array(list(excluded), np.int32)),
            given=np.array(self._given(candidates or (), excluded), np.int32),
            retrieve=candidates is None,
            limit=top_k or 0,
            unknown=len(history) - len(known),
        )

    def _given(self, candidates: Sequence[bytes], excluded: set[int]) -> list[int]:
        items: dict[int, None] = {}
        for raw in candidates:
            item = self._catalogue.number(raw)
            if item is None:
                raise InputError(
                    f"{CANDIDATES.name} holds {raw.decode()!r}, which is not in the catalogue"
                    f" ({len(self._catalogue):,} items); ids are compared as strings, exactly as in the raw file"
                )
            if item not in excluded and item not in self.hidden:
                items[item] = None
        if len(items) > self._most:
            raise InputError(f"{CANDIDATES.name} holds {len(items)} items: the ranker orders at most {self._most}")
        return list(items)


def check_ids(name: str, ids: Sequence[bytes]) -> None:
    """Check the number, the length and the encoding of the ids in a tensor.

    Raises:
        InputError: they exceed a limit; the message names the tensor.
    """
    if len(ids) > MAX_HISTORY:
        raise InputError(f"{name} holds {len(ids):,} ids: send at most the {MAX_HISTORY:,} most recent ones")
    # All ids are checked together first: checking them one by one would take longer than the look-up.
    if max(map(len, ids), default=0) > MAX_ID_BYTES:
        place, raw = next((place, raw) for place, raw in enumerate(ids) if len(raw) > MAX_ID_BYTES)
        raise InputError(f"{name}[{place}] has {len(raw)} bytes: an item id has at most {MAX_ID_BYTES}")
    try:
        b"\n".join(ids).decode()  # a line break is never part of another character, so it cannot complete one
    except UnicodeDecodeError:
        place, raw = next((place, raw) for place, raw in enumerate(ids) if not is_utf8(raw))
        raise InputError(f"{name}[{place}] is {raw!r}, not UTF-8: send ids as they stand in the raw file") from None


def is_utf8(raw: bytes) -> bool:
    """Return whether bytes are text in UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
