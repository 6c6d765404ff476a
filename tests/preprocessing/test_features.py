"""Encoding a request's raw ids as item numbers: the limits of the contract, on 30 items of which 25 are trained."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarec_client.contract import MAX_CANDIDATES, MAX_HISTORY, MAX_ID_BYTES
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder, save_vocabulary

TRAINED, TITLED = 25, 30


def raw(item: int) -> bytes:
    """Return the id of an item number, which is not a digit string, so that a mix-up of the two shows."""
    return f"tt{item:04}".encode()


ITEMS = range(1, TITLED + 1)
CATALOGUE = Catalogue([raw(item) for item in ITEMS], [f"Film {item}" for item in ITEMS], [1] * TRAINED)
ENCODER = FeatureEncoder(CATALOGUE)


def test_history_keeps_order_and_repetitions_and_counts_the_rest():
    """By hand: neither an unknown id nor an item without an embedding (26) is part of the history."""
    encoded = ENCODER.encode([raw(3), b"never seen", raw(1), raw(26), raw(3)])
    assert encoded.history.tolist() == [3, 1, 3]
    assert encoded.history.dtype == np.int32
    assert encoded.unknown == 2


def test_the_exports_vocabulary_may_hold_untrained_items(tmp_path: Path):
    """By hand: a retriever that knows 28 items by their titles reads 26 and 28 in a history, and 29 is unknown."""
    save_vocabulary(tmp_path, 28)
    encoded = FeatureEncoder.load(tmp_path, CATALOGUE).encode([raw(3), raw(26), raw(29), raw(28), b"never seen"])
    assert encoded.history.tolist() == [3, 26, 28]
    assert encoded.unknown == 2


def test_without_a_vocabulary_the_trained_items_are_known(tmp_path: Path):
    """Exports of earlier versions have no such file, and their retrievers know no other items."""
    encoded = FeatureEncoder.load(tmp_path, CATALOGUE).encode([raw(25), raw(26)])
    assert (encoded.history.tolist(), encoded.unknown) == ([25], 1)


@pytest.mark.parametrize("vocabulary", [0, 1, TRAINED, TITLED])
def test_the_vocabulary_limits_the_history_alone(vocabulary):
    """Excluded items and the caller's candidates may be any of the catalogue, whatever the retriever knows."""
    everything = [raw(item) for item in ITEMS]
    encoder = FeatureEncoder(CATALOGUE, vocabulary)
    encoded = encoder.encode(everything, exclude=everything[-3:], candidates=everything[:1] + everything[-2:])
    assert encoded.history.tolist() == list(range(1, vocabulary + 1))
    assert encoded.unknown == TITLED - vocabulary
    assert encoded.excluded.tolist() == [28, 29, 30]
    assert encoder.encode([], candidates=[raw(30)]).given.tolist() == [30]


def test_only_history_is_needed():
    """The other inputs are optional; their defaults retrieve, return all candidates and exclude nothing."""
    encoded = ENCODER.encode([])
    assert (encoded.retrieve, encoded.limit, encoded.unknown) == (True, 0, 0)
    for array in (encoded.history, encoded.excluded, encoded.given):
        assert array.dtype == np.int32
        assert array.shape == (0,)


def test_exclude_ignores_unknown_ids():
    """EXCLUDE may name any id, even one that the catalogue dropped long ago; each item counts once."""
    assert ENCODER.encode([], exclude=[b"never seen", raw(9), raw(27), raw(9)]).excluded.tolist() == [9, 27]


def test_candidates_are_taken_once_in_order_without_the_excluded():
    """By hand: EXCLUDE applies to CANDIDATES, the history does not; an item with only a title (28) is allowed."""
    encoded = ENCODER.encode([raw(2)], exclude=[raw(5)], candidates=[raw(28), raw(5), raw(2), raw(28), raw(1)], top_k=2)
    assert encoded.given.tolist() == [28, 2, 1]
    assert not encoded.retrieve
    assert encoded.limit == 2


def test_no_candidates_differs_from_none_given():
    """An empty CANDIDATES means that there is nothing to rank, not that the retriever chooses."""
    assert not ENCODER.encode([raw(1)], candidates=[]).retrieve


def test_candidates_are_counted_after_repetitions_and_exclude():
    """22 ids, of which one is repeated and one excluded, are 20 candidates, which is allowed."""
    candidates = [raw(item) for item in range(1, 22)] + [raw(1)]
    assert len(ENCODER.encode([], exclude=[raw(21)], candidates=candidates).given) == MAX_CANDIDATES


def test_the_exported_ranker_sets_the_number_of_candidates(tmp_path: Path):
    """With a ranker that orders 24 items, 24 of 25 candidates and a TOP_K of 24 pass, and 25 of either do not."""
    save_vocabulary(tmp_path, TRAINED, 24)
    encoder = FeatureEncoder.load(tmp_path, CATALOGUE)
    candidates = [raw(item) for item in range(1, 26)]
    assert len(encoder.encode([], exclude=candidates[:1], candidates=candidates, top_k=24).given) == 24
    with pytest.raises(InputError, match="CANDIDATES holds 25 items: the ranker orders at most 24"):
        encoder.encode([], candidates=candidates)
    with pytest.raises(InputError, match="TOP_K is 25: ask for 1 to 24"):
        encoder.encode([], top_k=25)


@pytest.mark.parametrize(
    ("request_", "tensor", "part"),
    [
        ({"history": [raw(1)] * (MAX_HISTORY + 1)}, "HISTORY", "10,001"),
        ({"history": [], "exclude": [raw(1)] * (MAX_HISTORY + 1)}, "EXCLUDE", "10,001"),
        ({"history": [], "candidates": [raw(1)] * (MAX_HISTORY + 1)}, "CANDIDATES", "10,001"),
        ({"history": [raw(1), b"x" * (MAX_ID_BYTES + 1)]}, "HISTORY[1]", "513"),
        ({"history": [b"\xff\xfe"]}, "HISTORY[0]", "UTF-8"),
        ({"history": [], "exclude": [raw(1), b"\xc3"]}, "EXCLUDE[1]", "UTF-8"),
        ({"history": [], "candidates": [b"\xc3("]}, "CANDIDATES[0]", "UTF-8"),
        ({"history": [], "candidates": [b"tt0111161"]}, "CANDIDATES", "'tt0111161', which is not in the catalogue (30"),
        ({"history": [], "candidates": [raw(item) for item in range(1, 22)]}, "CANDIDATES", "at most 20"),
        ({"history": [], "top_k": 0}, "TOP_K", "1 to 20"),
        ({"history": [], "top_k": -3}, "TOP_K", "1 to 20"),
        ({"history": [], "top_k": 21}, "TOP_K", "1 to 20"),
    ],
)
def test_beyond_a_limit_the_error_names_the_tensor(request_, tensor, part):
    """The error is one sentence with the tensor's name and the limit of the contract."""
    with pytest.raises(InputError) as error:
        ENCODER.encode(**request_)
    assert str(error.value).startswith(tensor)
    assert part in str(error.value)


def test_at_a_limit_nothing_is_refused():
    """10,000 ids, 512 bytes, 20 candidates and a TOP_K of 20 are still allowed."""
    longest = "é" * (MAX_ID_BYTES // 2)
    candidates = [raw(item) for item in range(1, 21)]
    encoded = ENCODER.encode([raw(1)] * (MAX_HISTORY - 1) + [longest.encode()], candidates=candidates, top_k=20)
    assert (len(encoded.history), encoded.unknown, len(encoded.given)) == (MAX_HISTORY - 1, 1, 20)


ids = st.one_of(st.integers(1, TITLED).map(raw), st.text(max_size=5).map(str.encode))


@given(
    history=st.lists(ids, max_size=40),
    exclude=st.lists(ids, max_size=10),
    candidates=st.none() | st.lists(st.integers(1, TITLED).map(raw), max_size=MAX_CANDIDATES),
)
def test_nothing_appears_that_was_not_given(history, exclude, candidates):
    """Every number stands for an id of its own input, each history id counts once, and no excluded one remains."""
    encoded = ENCODER.encode(history, exclude, candidates)
    assert len(encoded.history) + encoded.unknown == len(history)
    assert {raw(item) for item in encoded.history} <= set(history)
    assert {raw(item) for item in encoded.excluded} <= set(exclude)
    assert {raw(item) for item in encoded.given} == set(candidates or ()) - set(exclude)
    assert len(set(encoded.given.tolist())) == len(encoded.given)
    assert all(1 <= item <= TRAINED for item in encoded.history)


def test_added_items_are_known_to_a_retriever_that_reads_titles(tmp_path: Path):
    """By hand: the 31st and 32nd are in the history and may be candidates; without titles only the latter."""
    added = [(b"new", "New"), (b"newer", "Newer")]
    for titles, history in ((True, [3, 32]), (False, [3])):
        save_vocabulary(tmp_path, TITLED, titles=titles)
        encoder = FeatureEncoder.load(tmp_path, CATALOGUE).with_items(added, ())
        encoded = encoder.encode([raw(3), b"newer"], candidates=[b"new", raw(2)])
        assert (encoded.history.tolist(), encoded.given.tolist()) == (history, [31, 2])


def test_hidden_items_are_excluded_from_every_answer():
    """By hand: with the request's own exclusions, in ascending order; also from the caller's candidates, but not from
    the history. An id that nobody knows may be hidden, and is hidden once it is added.
    """
    hidden = {raw(7), raw(2), b"new"}
    encoder = ENCODER.with_items([], hidden)
    encoded = encoder.encode([raw(7), raw(1)], exclude=[raw(5), raw(7)], candidates=[raw(2), raw(3)])
    assert encoded.excluded.tolist() == [2, 5, 7]
    assert (encoded.history.tolist(), encoded.given.tolist()) == ([7, 1], [3])
    assert encoder.with_items([(b"new", "New")], hidden).encode([]).excluded.tolist() == [2, 7, 31]
    assert encoder.with_items([], ()).encode([]).excluded.tolist() == []
