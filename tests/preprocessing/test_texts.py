"""Titles in a request: paired with ids or alone, on the catalogue of five items of which four are trained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarec_client.contract import MAX_HISTORY, MAX_TITLE_BYTES
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import EncodedRequest, FeatureEncoder

CATALOGUE = Catalogue([b"a", b"b", b"c", b"d", b"new"], ["A", "B", "C", "D", "New"], [9, 8, 7, 6])
ENCODER = FeatureEncoder(CATALOGUE)


def given_of(encoded: EncodedRequest) -> list[tuple[int, bytes, str]]:
    """Return number, raw id and title of each of the caller's candidates."""
    return list(zip(encoded.given.tolist(), encoded.given_ids, encoded.given_texts, strict=True))


def test_a_title_in_the_history_replaces_the_catalogues_and_lets_an_unknown_id_stay():
    """By hand: the retriever reads a and c. The prompt reads the new title of a, that of the unknown id, that of the
    untrained item, and the catalogue's of c; the second unknown id has no title and is skipped.
    """
    ids, titles = [b"a", b"nobody", b"new", b"other", b"c"], [b"Alpha", b"Words", b"Newest", b"", b""]
    encoded = ENCODER.encode(ids, history_titles=titles)
    assert encoded.history.tolist() == [1, 3]
    assert encoded.history_texts == ["Alpha", "Words", "Newest", "C"]
    assert encoded.unknown == 1
    assert encoded.retrieve


@pytest.mark.parametrize("history", [[], None])
def test_titles_alone_are_a_history(history):
    """By hand: the retriever reads nothing; a blank text is skipped and counted."""
    encoded = ENCODER.encode(history or [], history_titles=[b"One", b" \n ", b"Two"])
    assert (encoded.history.tolist(), encoded.history_texts, encoded.unknown) == ([], ["One", "Two"], 1)


def test_titled_candidates_are_taken_once_without_the_excluded():
    """By hand: the first of equal ids counts, with its title. EXCLUDE also names an id that only has a title. Known ids
    keep their numbers, and each unknown one has a negative number of its own.
    """
    ids = [b"x", b"c", b"x", b"y", b"a", b"z", b"c"]
    titles = [b"The X", b"", b"Again", b"The Y", b"Alpha", b"The Z", b"Late"]
    encoded = ENCODER.encode([], [b"y", b"d"], ids, None, None, titles)
    assert given_of(encoded) == [(-1, b"x", "The X"), (3, b"c", ""), (1, b"a", "Alpha"), (-4, b"z", "The Z")]
    assert not encoded.retrieve
    assert encoded.given.dtype == np.int32


def test_titles_alone_are_candidates_named_by_their_places():
    """By hand: equal texts are two candidates, and EXCLUDE, which names ids, leaves them alone."""
    encoded = ENCODER.encode([], [b"0"], None, None, None, [b"Same", b"Other", b"Same"])
    assert given_of(encoded) == [(-1, b"0", "Same"), (-2, b"1", "Other"), (-3, b"2", "Same")]
    assert not encoded.retrieve
    assert given_of(ENCODER.encode([], candidates=[], candidate_titles=[b"Same"])) == [(-1, b"0", "Same")]


def test_hidden_items_are_no_candidates_by_a_title():
    """Neither one of the catalogue, nor one that only the store has heard of."""
    encoder = ENCODER.with_items([], [b"c", b"x"])
    encoded = encoder.encode([], candidates=[b"x", b"c", b"y"], candidate_titles=[b"X", b"C", b"Y"])
    assert given_of(encoded) == [(-1, b"y", "Y")]


def test_no_titles_differ_from_no_candidates():
    """A CANDIDATE_TITLE of length 0 means that there is nothing to rank, as a CANDIDATES of length 0 does."""
    encoded = ENCODER.encode([b"a"], candidate_titles=[])
    assert (encoded.retrieve, encoded.given.tolist()) == (False, [])


ids = st.lists(st.sampled_from([b"a", b"b", b"d", b"new"]), max_size=8)


@given(history=st.lists(st.sampled_from([b"a", b"new", b"nobody"]), max_size=8), candidates=ids, exclude=ids)
def test_empty_titles_change_nothing(history, candidates, exclude):
    """A request whose titles are all empty or blank is encoded as the one without them."""
    blank = ENCODER.encode(history, exclude, candidates, 3, [b""] * len(history), [b" "] * len(candidates))
    plain = ENCODER.encode(history, exclude, candidates, 3)
    for name in vars(plain):
        assert np.array_equal(getattr(blank, name), getattr(plain, name)), name


def test_a_title_is_one_line_and_otherwise_taken_as_it_is():
    """By hand: runs of white space and control characters are one space, and 1,000 characters remain, as preprocessing
    cuts the catalogue's titles. What looks like HTML or like a null stays.
    """
    titles = ["a\n\t b\x00c\u2028d", "<b>Tom &amp; Jerry</b>", "None", "x" * 1_200]
    encoded = ENCODER.encode([], history_titles=[title.encode() for title in titles])
    assert encoded.history_texts == ["a b c d", "<b>Tom &amp; Jerry</b>", "None", "x" * 1_000]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            {"history": [b"a", b"b"], "history_titles": [b"A"]},
            "HISTORY holds 2 ids and HISTORY_TITLE 1 titles: give one title for each id, which may be empty, or no ids",
        ),
        ({"history": [b"a"], "history_titles": []}, "HISTORY holds 1 ids and HISTORY_TITLE 0 titles"),
        (
            {"candidates": [b"a"], "candidate_titles": [b"A", b"B"]},
            "CANDIDATES holds 1 ids and CANDIDATE_TITLE 2 titles",
        ),
        ({"candidates": [b"a", b"x"], "candidate_titles": [b"A", b""]}, "CANDIDATES holds 'x', which is not in the"),
        ({"candidate_titles": [b"A", b"\n"]}, "CANDIDATE_TITLE[1] is blank: give words that describe the candidate"),
        ({"candidate_titles": [b"A"] * 21}, "CANDIDATE_TITLE holds 21 items: the ranker orders at most 20"),
        (
            {"candidates": [b"%d" % n for n in range(21)], "candidate_titles": [b"A"] * 21},
            "CANDIDATES holds 21 items: the ranker orders at most 20",
        ),
        ({"history_titles": [b"A"] * (MAX_HISTORY + 1)}, "HISTORY_TITLE holds 10,001 titles: send at most 10,000"),
        (
            {"history_titles": [b"A", b"x" * (MAX_TITLE_BYTES + 1)]},
            "HISTORY_TITLE[1] has 4,097 bytes: give a title of at most 4,096 bytes of UTF-8",
        ),
        ({"candidate_titles": [b"\xff"]}, "CANDIDATE_TITLE[0] has 1 bytes: give a title of at most 4,096 bytes of UTF"),
    ],
)
def test_bad_titles_are_refused_by_name(request_, said):
    with pytest.raises(InputError) as error:
        ENCODER.encode(**{"history": [], **request_})
    assert str(error.value).startswith(said)


def test_the_longest_title_is_taken():
    """4,096 bytes of UTF-8, and 20 candidates."""
    longest = "é" * (MAX_TITLE_BYTES // 2)
    encoded = ENCODER.encode([], history_titles=[longest.encode()], candidate_titles=[longest.encode()] * 20)
    assert (len(encoded.history_texts), len(encoded.given)) == (1, 20)
