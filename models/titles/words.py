"""Encodes titles by their words: TF-IDF of words and word pairs, and a projection of it to a dense vector.

:mod:`models.titles.fit_words` fits the encoder with scikit-learn. Here NumPy computes the same values, so that a new
title can be encoded wherever the stored files are, without scikit-learn and without unpickling anything.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from models.sparse import SparseRows
from preprocessing.errors import InputError

VOCABULARY_FILE = "words.json"
WEIGHTS_FILE = "words.safetensors"

# Thai, Lao, Burmese and Khmer; then Chinese and Japanese, without their punctuation. Korean puts spaces between words.
UNSPACED = (
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c"
    "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts that do not separate words, as ranges of a regular expression."""
# Vowel signs, accents and joiners are part of a word, although Python's \w does not match them.
SIGNS = (
    "\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u0900-\u0963\u0966-\u0dff\u0f71-\u0fbc\u200c\u200d"
)
PIECE = re.compile(f"(?P<unspaced>[{UNSPACED}]+)|(?:[^\\W{UNSPACED}]|[{SIGNS}])+")


def terms(title: str) -> Iterator[str]:
    """Yield the words of a title and its pairs of adjacent words, in lower case.

    Text in a script without spaces between words gives its characters and its pairs of adjacent characters instead.
    """
    words: list[str] = []
    for piece in PIECE.finditer(unicodedata.normalize("NFKC", title).lower()):
        if piece["unspaced"]:
            yield from piece[0]
            yield from map("".join, pairwise(piece[0]))
        else:
            words.append(piece[0])
    yield from words
    yield from map(" ".join, pairwise(words))


@dataclass(frozen=True)
class WordEncoder:
    """An encoder of titles by their words."""

    vocabulary: Sequence[str]
    """Words and word pairs in the order of the columns."""
    idf: NDArray[np.float32]
    """Inverse document frequency of each of them [words]."""
    components: NDArray[np.float32]
    """Projection to dense vectors [words, dimensions]; no dimensions if only :meth:`rows` is needed."""

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {word: column for column, word in enumerate(self.vocabulary)}

    def rows(self, titles: Iterable[str]) -> SparseRows:
        """Return the TF-IDF weights of titles [titles, words]; each row has length 1, or 0 if no word is known.

        The term frequency is 1 + log(count), as in scikit-learn's ``TfidfVectorizer(sublinear_tf=True)``.
        """
        known, offsets, columns, values = self._columns, [0], [], []
        for title in titles:
            counts = Counter(known[word] for word in terms(title) if word in known)
            row = np.array(sorted(counts), np.int32)
            weights = self.idf[row] * (1 + np.log([counts[column] for column in row.tolist()]))
            columns.append(row)
            values.append(weights / max(float(np.sqrt(weights @ weights)), np.finfo(np.float32).tiny))
            offsets.append(offsets[-1] + len(row))
        return SparseRows(
            np.array(offsets, np.int64),
            np.concatenate([np.empty(0, np.int32), *columns]),
            np.concatenate([np.empty(0, np.float32), *values]).astype(np.float32),
        )

    def vectors(self, rows: SparseRows) -> NDArray[np.float32]:
        """Return the dense vectors [titles, dimensions] of sparse rows; each has length 1, or 0 for an empty row."""
        dense = np.zeros((len(rows.offsets) - 1, self.components.shape[1]), np.float32)
        for row, start, end in zip(dense, rows.offsets[:-1], rows.offsets[1:], strict=True):
            row[:] = rows.values[start:end] @ self.components[rows.columns[start:end]]
        return unit_rows(dense)

    def save(self, folder: Path) -> None:
        """Write the encoder into an existing folder."""
        (folder / VOCABULARY_FILE).write_text(json.dumps(list(self.vocabulary), ensure_ascii=False), encoding="utf-8")
        save_file({"idf": self.idf, "components": np.ascontiguousarray(self.components)}, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: Path, *, dense: bool = True) -> "WordEncoder":
        """Return the encoder in a folder.

        Args:
            folder: the folder.
            dense: whether :meth:`vectors` is needed, whose projection is most of the encoder's memory.

        Raises:
            InputError: the folder has none.
        """
        if not (folder / VOCABULARY_FILE).is_file():
            raise InputError(f"{folder} holds no encoder of words: run `llamarec train-retriever` again")
        vocabulary = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, "numpy") as weights:
            idf = weights.get_tensor("idf")
            components = weights.get_tensor("components") if dense else np.zeros((len(idf), 0), np.float32)
        return cls(vocabulary, idf, components)


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors [rows, dimensions] scaled to length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled
