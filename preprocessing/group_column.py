"""Reads the groups of items from the column or field of the raw files that the caller names."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llamarec_client.contract import MAX_ID_BYTES
from preprocessing.errors import InputError
from preprocessing.report import ReadingLog
from preprocessing.times import is_text
from preprocessing.values import NOT_UTF8, Batch, read_ids, read_text

GENRES = "genres"
"""The one group column of MovieLens data sets, whatever its name and format in the files."""
NO_GENRES = ("(no genres listed)", "unknown")
FLAGS = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""Genres of the last columns of MovieLens-100K's ``u.item`` in order (its file ``u.genre``)."""


def check_genres(column: str | None) -> bool:
    """Return whether groups are wanted of a MovieLens data set.

    Raises:
        InputError: another column than its genres is wanted.
    """
    if column not in (None, GENRES):
        raise InputError(f"MovieLens data sets have no group column {column}: they have {GENRES}")
    return column is not None


def first_genre(column: pa.Array, separator: str) -> pa.Array:
    """Return the first of several genres in each text, null where there are none."""
    first = pc.replace_substring_regex(column, pattern=r"\s*[" + separator + r"](.|\n)*$", replacement="")
    return pc.if_else(pc.is_in(first, pa.array(NO_GENRES)), None, first)


def flagged_genre(fields: Sequence[str]) -> str | None:
    """Return the first genre of the fields of a line of ``u.item``; None if it has none."""
    flags = zip(FLAGS, fields[-len(FLAGS) :], strict=True)
    return next((name for name, flag in flags if flag.strip() == "1" and name not in NO_GENRES), None)


def listed_genre(fields: Sequence[str]) -> str | None:
    """Return the first genre of the fields of a line of ``movies.dat``, whose last field lists all of them."""
    first = fields[-1].split("|")[0].strip()
    return None if first in NO_GENRES else first


class GroupField:
    """Takes the group from a field of JSON lines, and knows whether any line had the field.

    Text and numbers are groups. Of a path of categories, such as ``["Beauty", "Hair Care", "Styling"]``, the second is:
    the first is that of the whole file. Of several paths the first counts.

    Args:
        name: name of the field.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._others: dict[str, None] = {}
        self._found = False

    def __call__(self, line: Mapping[str, Any]) -> str | None:
        """Return the group of a line; None if it has none."""
        if self._name not in line:
            self._others.update(dict.fromkeys(line))
            return None
        self._found = True
        return _group_of(line[self._name])

    def check(self, path: Path) -> None:
        """Check that the field was there.

        Raises:
            InputError: no line had it.
        """
        if not self._found:
            raise InputError(f"{path} has no field {self._name}: its lines have {', '.join(map(str, self._others))}")


def _group_of(value: Any) -> str | None:
    if isinstance(value, (list, tuple)) and value:
        path = value[0] if isinstance(value[0], (list, tuple)) else value
        return _group_of(path[min(1, len(path) - 1)]) if path else None
    if isinstance(value, str) or type(value) in (int, float):
        return str(value)
    return None


class GroupPairs:
    """Collects the groups of items; of several groups of one item the first in alphabetical order counts."""

    def __init__(self) -> None:
        self._pairs: list[pa.Table] = []
        self.wanted = False
        """Whether any batch had a column of groups."""

    def add(self, batch: Batch, log: ReadingLog) -> None:
        """Collect the groups of a batch, if it has any.

        Raises:
            InputError: the column is not text, or a group is not UTF-8 or too long and bad rows are not skipped.
        """
        if "group" not in batch.rows.schema.names:
            return
        self.wanted = True
        items, bad = read_ids(batch, "item")
        groups = _read_groups(batch, log)
        kept = groups.is_valid()
        for problem in bad:
            kept = pc.and_not(kept, problem.rows)
        pairs = pa.table({"item": items, "group": groups}).filter(kept)
        self._pairs.append(_first_of(pairs))

    def by_item(self, item_type: pa.DataType, earlier: Mapping[str, str]) -> dict[Any, str]:
        """Return the group of each item that has one, with those of an earlier data set."""
        key: Callable[[Any], Any] = str if item_type == pa.string() else int
        found: dict[Any, str] = {key(item): group for item, group in earlier.items()}
        tables = [pairs.set_column(0, "item", pairs["item"].cast(item_type)) for pairs in self._pairs]
        for pairs in tables:
            for item, group in zip(pairs["item"].to_pylist(), pairs["group"].to_pylist(), strict=True):
                found[item] = min(group, found.get(item, group))
        return found


def _first_of(pairs: pa.Table) -> pa.Table:
    return pairs.group_by("item").aggregate([("group", "min")]).rename_columns(["item", "group"])


def _read_groups(batch: Batch, log: ReadingLog) -> pa.Array:
    """Return groups as text without surrounding white space, null where there is none."""
    column = batch.rows["group"]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.string())
    named = f"{batch.path}: column {batch.names['group']}"
    if not is_text(column.type):
        raise InputError(f"{named} has the type {column.type}; groups must be text or whole numbers")
    text, unreadable = read_text(column)
    text = pc.utf8_trim_whitespace(text)
    long = pc.greater(pc.binary_length(text), MAX_ID_BYTES).fill_null(False)
    for rows, what in (
        *([(unreadable.rows, f"a group that is {NOT_UTF8}")] if unreadable else []),
        (long, f"a group of more than {MAX_ID_BYTES} bytes"),
    ):
        if not log.skip and pc.any(rows).as_py():
            first = pc.index(rows, True).as_py()
            log.bad(batch.path, partial(batch.place, first), what, column[first].as_py())
    return pc.if_else(pc.or_(long, pc.equal(pc.binary_length(text), 0)), None, text)
