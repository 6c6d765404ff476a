"""Encoding titles by their words: the words of many scripts, scikit-learn's values, and files that need no pickle."""

import json
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from models.titles.fit_words import fit_words
from models.titles.words import WordEncoder, terms, unit_rows
from preprocessing.errors import InputError

TITLES = [
    "The Red Fox",
    "the red fox and the owl",
    "An Owl, a Fox & a Hen",
    "Hen and Owl",
    "Red Red Hen",
    "千与千寻",
    "千寻",
    "",
    "Nothing Else Like It",
]
UNSEEN = ["red owl", "a fox, red as the fox", "千与", "unknown words alone", "", "RED FOX red fox"]


def dense(rows, words):
    """Return sparse rows as an array [titles, words]."""
    return csr_array((rows.values, rows.columns, rows.offsets), shape=(len(rows.offsets) - 1, words)).toarray()


# --- the words of a title


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story 2", ["toy", "story", "2", "toy story", "story 2"]),
        (
            "  The  (TOY) story: the toy! ",
            ["the", "toy", "story", "the", "toy", "the toy", "toy story", "story the", "the toy"],
        ),
        ("Film", ["film"]),
        ("", []),
        ("!? -- ...", []),
        ("Amélie", ["amélie"]),
        ("Привет, мир", ["привет", "мир", "привет мир"]),
        ("기생충 영화", ["기생충", "영화", "기생충 영화"]),
        ("ＡＢＣ ﬁlm", ["abc", "film", "abc film"]),  # full-width letters and a ligature
        ("राम।", ["राम"]),  # the danda ends a sentence
        ("كِتَاب", ["كِتَاب"]),  # Arabic with vowel signs
    ],
)
def test_words_and_pairs_by_hand(title, expected):
    """Words in lower case without punctuation, and pairs of adjacent ones, in scripts that separate words."""
    assert list(terms(title)) == expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("千与千寻", ["千", "与", "千", "寻", "千与", "与千", "千寻"]),
        ("となりのトトロ", [*"となりのトトロ", "とな", "なり", "りの", "のト", "トト", "トロ"]),
        ("สวัสดี", [*"สวัสดี", "สว", "วั", "ัส", "สด", "ดี"]),
        ("山", ["山"]),
        ("「山」・【川】", ["山", "川"]),  # punctuation separates characters
        ("𠮷野家", [*"𠮷野家", "𠮷野", "野家"]),  # the first character needs 4 bytes in UTF-8
    ],
)
def test_scripts_without_spaces_give_characters_and_their_pairs(title, expected):
    """Chinese, Japanese and Thai: by hand."""
    assert Counter(terms(title)) == Counter(expected)


def test_scripts_in_one_title_are_split_from_each_other():
    """By hand: Latin words next to Chinese characters are words, and make no pair with a character."""
    assert Counter(terms("Spirited Away 千寻 2001")) == Counter(
        ["spirited", "away", "2001", "spirited away", "away 2001", "千", "寻", "千寻"]
    )
    assert Counter(terms("iPhone手机")) == Counter(["iphone", "手", "机", "手机"])


@pytest.mark.parametrize("title", ["Amélie", "Señor Über", "ガラスの城", "Éà ç"])
def test_decomposed_characters_are_the_same_words(title):
    """Some systems and web pages write é as e and an accent of its own (Unicode's form NFD)."""
    decomposed = unicodedata.normalize("NFD", title)
    assert decomposed != title
    assert list(terms(decomposed)) == list(terms(title))


@pytest.mark.parametrize(
    "word",
    ["हिन्दी", "কাগজ", "தமிழ்", "ʻāina̱"],
    ids=["Hindi", "Bengali", "Tamil", "a combining mark without a composed form"],
)
def test_a_word_keeps_its_vowel_signs(word):
    """Python's word characters leave out vowel signs and combining marks, at which the word would be cut."""
    assert list(terms(f"{word} 2")) == [unicodedata.normalize("NFKC", word).lower(), "2", f"{word} 2"]


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_any_text_has_terms_without_capitals(title):
    """No text fails; case does not matter to words, and terms are neither empty nor of more than two words."""
    found = list(terms(title))
    assert all(found)
    assert all(len(term.split(" ")) <= 2 for term in found)
    assert list(terms(unicodedata.normalize("NFKC", title))) == found


# --- the vectors of titles

some_words = st.sampled_from(["red", "fox", "owl", "hen", "the", "千寻", "Ünder", "é", "2"])
some_titles = st.lists(st.lists(some_words, max_size=6).map(" ".join), max_size=8)


@settings(max_examples=60, deadline=None)
@given(some_titles, some_titles)
@example(TITLES, UNSEEN)
def test_rows_equal_scikit_learns(titles, others):
    """The reference is scikit-learn's TfidfVectorizer, on the titles that it was fitted to and on others.

    It counts in double precision, so the values agree within the rounding of 32 bits.
    """
    vectorizer = TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=2)
    fitted = [*titles, "red", "red"]  # so that there is a word in two titles
    expected = vectorizer.fit_transform(fitted).toarray()
    encoder = fit_words(fitted)
    assert list(encoder.vocabulary) == vectorizer.get_feature_names_out().tolist()
    rows = encoder.rows(fitted)
    np.testing.assert_allclose(dense(rows, len(encoder.vocabulary)), expected, atol=1e-6)
    unseen = dense(encoder.rows(others), len(encoder.vocabulary))
    assert unseen.shape == (len(others), len(encoder.vocabulary))
    if others:
        np.testing.assert_allclose(unseen, vectorizer.transform(others).toarray(), atol=1e-6)
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        assert (np.diff(rows.columns[start:end]) > 0).all()
    assert (rows.offsets.dtype, rows.columns.dtype, rows.values.dtype) == (np.int64, np.int32, np.float32)


@pytest.mark.parametrize("dimensions", [1, 3, 256])
def test_vectors_equal_scikit_learns(dimensions):
    """The reference is TruncatedSVD of scikit-learn's TF-IDF, normalised to length 1, on fitted and on other titles.

    Titles without a known word have a vector of zeros. With 256, there are as many dimensions as titles less one.
    """
    vectorizer = TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=2)
    weights = vectorizer.fit_transform(TITLES)
    count = min(dimensions, len(TITLES) - 1)
    svd = TruncatedSVD(count, random_state=0).fit(weights)
    encoder = fit_words(TITLES, dimensions)
    for titles in (TITLES, UNSEEN):
        found = encoder.vectors(encoder.rows(titles))
        assert (found.shape, found.dtype) == ((len(titles), count), np.float32)
        expected = svd.transform(vectorizer.transform(titles))
        # A title that the kept dimensions do not describe has a vector of rounding errors, of any direction.
        described = np.linalg.norm(expected, axis=1) > 1e-3
        np.testing.assert_allclose(found[described], normalize(expected)[described], atol=1e-4)
    without = encoder.vectors(encoder.rows(["", "unknown words alone"]))
    assert not without.any()


def test_a_title_is_encoded_alone_as_among_others():
    """A new item's vector does not depend on which items are encoded with it, to the last bit."""
    encoder = fit_words(TITLES)
    together = encoder.vectors(encoder.rows([*TITLES, *UNSEEN]))
    for title, expected in zip([*TITLES, *UNSEEN], together, strict=True):
        np.testing.assert_array_equal(encoder.vectors(encoder.rows([title]))[0], expected)


def test_unit_rows_by_hand():
    """(3, 4) has length 5; a row of zeros stays as it is, without a warning."""
    found = unit_rows(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)


# --- files


def forbid_pickle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing may be unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)


def test_what_is_saved_loads_to_the_same(tmp_path: Path, monkeypatch):
    """The loaded encoder gives the same rows and vectors to the last bit, and reads JSON and safetensors alone."""
    encoder = fit_words(TITLES, 3)
    encoder.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"words.json", "words.safetensors"}
    assert json.loads((tmp_path / "words.json").read_text(encoding="utf-8")) == list(encoder.vocabulary)
    forbid_pickle(monkeypatch)
    loaded = WordEncoder.load(tmp_path)
    for titles in (TITLES, UNSEEN):
        rows, again = encoder.rows(titles), loaded.rows(titles)
        for one, other in zip(rows, again, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(encoder.vectors(rows), loaded.vectors(again))


@pytest.mark.parametrize("titles", [["", ""], ["One"], TITLES], ids=["no words", "one title", "no projection"])
def test_an_encoder_without_vectors_can_be_stored(tmp_path: Path, titles):
    """Without a word in two titles, or without a projection, arrays of size 0 are written and read back."""
    encoder = fit_words(titles, dimensions=0)
    encoder.save(tmp_path)
    loaded = WordEncoder.load(tmp_path)
    assert list(loaded.vocabulary) == list(encoder.vocabulary)
    assert loaded.vectors(loaded.rows(["One", "fox"])).shape == (2, 0)


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path):
    """The error names the command that writes one."""
    with pytest.raises(InputError, match="holds no encoder of words: run `llamarec train-retriever` again"):
        WordEncoder.load(tmp_path)


def test_a_new_title_is_encoded_without_scikit_learn(tmp_path: Path):
    """A machine that serves has neither scikit-learn nor SciPy, and needs neither to encode a title."""
    fit_words(TITLES, 3).save(tmp_path)
    program = """
import sys
from pathlib import Path
for name in ("sklearn", "scipy", "torch", "pandas"):
    sys.modules[name] = None
from models.titles.words import WordEncoder
encoder = WordEncoder.load(Path(sys.argv[1]))
print(encoder.vectors(encoder.rows(["red fox"])).shape)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "(1, 3)"
