"""Encodes a request's raw ids as item numbers and checks the limits of the serving contract; it runs in Triton."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import (
    CANDIDATE_TITLE,
    CANDIDATES,
    EXCLUDE,
    HISTORY,
    HISTORY_TITLE,
    MAX_CANDIDATES,
    MAX_HISTORY,
    MAX_ID_BYTES,
    MAX_TITLE_BYTES,
    TOP_K,
)
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.titles import LONGEST_TITLE, one_line

VOCABULARY_FILE = "vocabulary.json"


@dataclass(frozen=True)
class EncodedRequest:
    """One user's request, in item numbers."""

    history: NDArray[np.int32]
    """Items in the retriever's vocabulary, oldest first, with repetitions."""
    excluded: NDArray[np.int32]
    """Items that must not be returned, in ascending order."""
    given: NDArray[np.int32]
    """The caller's candidates without repetitions and excluded items; empty if candidates are to be retrieved. One that
    only its title describes has a negative number of its own."""
    retrieve: bool
    """Whether candidates are to be retrieved."""
    limit: int
    """Maximum number of items to return; 0 for all."""
    unknown: int
    """Number of entries of the history that are skipped: without a title, and outside the retriever's vocabulary."""
    history_texts: Sequence[str] = ()
    """Titles that the prompt lists as the history, oldest first; empty if they are those of ``history``."""
    given_ids: Sequence[bytes] = ()
    """Raw ids of ``given``; empty if the caller gave no titles of candidates."""
    given_texts: Sequence[str] = ()
    """The caller's titles of ``given``, "" where it is the catalogue's; as many as ``given_ids``."""


class _History(NamedTuple):
    """History of a request."""

    known: list[int]
    """Items in the retriever's vocabulary."""
    texts: list[str]
    """See :attr:`EncodedRequest.history_texts`."""
    unknown: int


class _Given(NamedTuple):
    """The caller's candidates; the fields are those of :class:`EncodedRequest`."""

    items: list[int]
    ids: Sequence[bytes] = ()
    texts: Sequence[str] = ()


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
        self._hidden_ids: frozenset[bytes] = frozenset()
        """Raw ids of hidden items that are not in the catalogue, and could be candidates by a title."""

    @classmethod
    def load(cls, folder: Path, catalogue: Catalogue) -> "FeatureEncoder":
        """Return the encoder for the catalogue and the retriever's vocabulary of an exported folder."""
        path = folder / VOCABULARY_FILE
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        most, titles = stored.get("candidates", MAX_CANDIDATES), stored.get("titles", False)
        return cls(catalogue, stored.get("items"), most, titles=titles)

    @property
    def catalogue(self) -> Catalogue:
        """Catalogue in which raw ids are looked up."""
        return self._catalogue

    def count_known(self, history: Sequence[bytes]) -> int:
        """Return the number of entries of a history that are items in the retriever's vocabulary."""
        return len(self._read_history(history, ()).known)

    def with_items(self, added: Sequence[tuple[bytes, str]], hidden: Iterable[bytes]) -> "FeatureEncoder":
        """Return an encoder that knows further items, and excludes others from every answer.

        Args:
            added: raw id and title of each further item, see :meth:`preprocessing.catalogue.Catalogue.with_added`.
            hidden: raw ids, also of items that are not in the catalogue.
        """
        catalogue = self._catalogue.with_added(added)
        vocabulary = len(catalogue) if self._titles else self._vocabulary
        encoder = FeatureEncoder(catalogue, vocabulary, self._most, titles=self._titles)
        numbers = {raw: catalogue.number(raw) for raw in hidden}
        encoder.hidden = frozenset(item for item in numbers.values() if item is not None)
        encoder._hidden_ids = frozenset(raw for raw, item in numbers.items() if item is None)
        encoder._hidden = np.array(sorted(encoder.hidden), np.int32)
        return encoder

    def encode(
        self,
        history: Sequence[bytes],
        exclude: Sequence[bytes] = (),
        candidates: Sequence[bytes] | None = None,
        top_k: int | None = None,
        history_titles: Sequence[bytes] | None = None,
        candidate_titles: Sequence[bytes] | None = None,
    ) -> EncodedRequest:
        """Check one request, and return it encoded.

        Unknown ids in HISTORY are skipped and counted; in EXCLUDE they are ignored. Hidden items are excluded too. Only
        as many candidates as the ranker orders may remain after repetitions and excluded items are removed.

        A title replaces the catalogue's in the prompt, and lets an unknown id be in a history or a candidate; an empty
        one changes nothing. Titles without ids are texts: a candidate's id is then its place.

        Args:
            history: raw ids, oldest first.
            exclude: raw ids that must not be returned.
            candidates: raw ids to rank; None to retrieve candidates, unless they are given by their titles.
            top_k: maximum number of items to return; None for all.
            history_titles: title of each id in the history, or without ids the history itself.
            candidate_titles: title of each candidate, or without ids the candidates themselves.

        Raises:
            InputError: a limit is exceeded, an id or a title is not UTF-8, a candidate is unknown, or there are not as
                many titles as ids; the message names the tensor.
        """
        for name, ids in ((HISTORY.name, history), (EXCLUDE.name, exclude), (CANDIDATES.name, candidates or ())):
            check_ids(name, ids)
        past_titles = read_titles(HISTORY.name, history, HISTORY_TITLE.name, history_titles)
        titles = read_titles(CANDIDATES.name, candidates or (), CANDIDATE_TITLE.name, candidate_titles)
        if top_k is not None and not 1 <= top_k <= self._most:
            raise InputError(f"{TOP_K.name} is {top_k}: ask for 1 to {self._most}, or leave it out for all")
        past = self._read_history(history, past_titles)
        excluded = {item for raw in exclude if (item := self._catalogue.number(raw))}
        if titles and not candidates:
            given = self._given_texts(titles)
        elif any(titles):
            given = self._given_titled(candidates or (), titles, self._hidden_ids.union(exclude))
        else:
            given = _Given(self._given(candidates or (), excluded))
        return EncodedRequest(
            history=np.array(past.known, np.int32),
            excluded=np.array(sorted(excluded | self.hidden), np.int32) if excluded else self._hidden,
            given=np.array(given.items, np.int32),
            retrieve=candidates is None and candidate_titles is None,
            limit=top_k or 0,
            unknown=past.unknown,
            history_texts=past.texts,
            given_ids=given.ids,
            given_texts=given.texts,
        )

    def _read_history(self, history: Sequence[bytes], titles: Sequence[str]) -> _History:
        """Return a history of ids with or without titles, or of titles alone."""
        last, count = self._vocabulary, max(len(history), len(titles))
        items = self._catalogue.numbers(history)
        known = [item for item in items if item is not None and item <= last]
        if not any(titles):
            return _History(known, [], count - len(known))
        texts = list(titles)
        for place, item in enumerate(items):
            if not texts[place] and item is not None and item <= last:
                texts[place] = self._catalogue.title(item)
        read = [text for text in texts if text]
        return _History(known, read, count - len(read))

    def _given_texts(self, titles: Sequence[str]) -> _Given:
        """Return candidates that have titles only; the place of each, from 0, is its id."""
        if "" in titles:
            raise InputError(
                f"{CANDIDATE_TITLE.name}[{titles.index('')}] is blank: give words that describe the candidate, or also"
                f" {CANDIDATES.name} with its id"
            )
        self._check_number(CANDIDATE_TITLE.name, len(titles))
        places = range(len(titles))
        return _Given([-1 - place for place in places], [str(place).encode() for place in places], titles)

    def _given_titled(self, candidates: Sequence[bytes], titles: Sequence[str], excluded: frozenset[bytes]) -> _Given:
        """Return candidates of which some have titles, without repetitions and excluded ones.

        Args:
            candidates: raw ids.
            titles: one for each, "" where it is the catalogue's.
            excluded: raw ids.
        """
        chosen: dict[bytes, tuple[int, str]] = {}
        for raw, title in zip(candidates, titles, strict=True):
            item = self._catalogue.number(raw)
            if item is None and not title:
                raise self._unknown(raw)
            if raw not in excluded and item not in self.hidden and raw not in chosen:
                chosen[raw] = (-1 - len(chosen) if item is None else item, title)
        self._check_number(CANDIDATES.name, len(chosen))
        return _Given([item for item, _ in chosen.values()], list(chosen), [title for _, title in chosen.values()])

    def _given(self, candidates: Sequence[bytes], excluded: set[int]) -> list[int]:
        items: dict[int, None] = {}
        for raw in candidates:
            item = self._catalogue.number(raw)
            if item is None:
                raise self._unknown(raw)
            if item not in excluded and item not in self.hidden:
                items[item] = None
        self._check_number(CANDIDATES.name, len(items))
        return list(items)

    def _unknown(self, raw: bytes) -> InputError:
        return InputError(
            f"{CANDIDATES.name} holds {raw.decode()!r}, which is not in the catalogue"
            f" ({len(self._catalogue):,} items); ids are compared as strings, exactly as in the raw file"
        )

    def _check_number(self, name: str, candidates: int) -> None:
        if candidates > self._most:
            raise InputError(f"{name} holds {candidates} items: the ranker orders at most {self._most}")


def read_titles(ids_name: str, ids: Sequence[bytes], name: str, titles: Sequence[bytes] | None) -> list[str]:
    """Check titles, and return each on one line of at most :data:`preprocessing.titles.LONGEST_TITLE` characters.

    They are not parsed in any other way: what looks like HTML, or like a part of a prompt, stays as it is.

    Args:
        ids_name: tensor of the ids.
        ids: may be empty; then the titles stand alone.
        name: tensor of the titles.
        titles: one for each id; None if there are none.

    Raises:
        InputError: they exceed a limit or are not as many as the ids; the message names the tensor.
    """
    if titles is None:
        return []
    if len(titles) > MAX_HISTORY:
        raise InputError(f"{name} holds {len(titles):,} titles: send at most {MAX_HISTORY:,}")
    if len(ids) not in (0, len(titles)):
        raise InputError(
            f"{ids_name} holds {len(ids):,} ids and {name} {len(titles):,} titles: give one title for each id, which"
            " may be empty, or no ids"
        )
    read = []
    for place, raw in enumerate(titles):
        if len(raw) > MAX_TITLE_BYTES or not is_utf8(raw):
            raise InputError(
                f"{name}[{place}] has {len(raw):,} bytes: give a title of at most {MAX_TITLE_BYTES:,} bytes of UTF-8"
            )
        read.append(one_line(raw.decode())[:LONGEST_TITLE].rstrip())
    return read


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
