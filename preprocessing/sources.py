"""Raw data sets: where their files are and how they read."""

import ast
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from preprocessing.errors import InputError
from preprocessing.titles import movie_title, product_title

Frame = Any
"""A pandas data frame; pandas 1.5 carries no types."""


class Raw(NamedTuple):
    """A data set as read, before any filter."""

    interactions: Frame
    """Columns ``user`` and ``item`` (strings) and ``timestamp`` (numbers), one row an interaction."""
    titles: Frame
    """Columns ``item`` and ``title`` (strings), one row for each item that has a title."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a ``table``."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    title: str = "title"


class Source(NamedTuple):
    """How one kind of raw data is found and read."""

    files: Callable[[Path | None], list[Path]]
    """The raw files, which must exist."""
    read: Callable[[list[Path], Columns], Raw]


def raw_files(dataset: str, raw: Path | None) -> list[Path]:
    """The files that a data set is made of.

    Args:
        dataset: a name of :data:`SOURCES`.
        raw: the file or folder that holds it; None for a data set that comes with a package.

    Raises:
        InputError: there is no such data set, or a file is missing.
    """
    if dataset not in SOURCES:
        raise InputError(f"there is no data set {dataset!r}: choose one of {', '.join(SOURCES)}")
    return SOURCES[dataset].files(raw)


def read_raw(dataset: str, files: list[Path], columns: Columns) -> Raw:
    """Reads the files that :func:`raw_files` found.

    Raises:
        InputError: a file is empty, not UTF-8, lacks a column, or holds a timestamp that is no number.
    """
    found = SOURCES[dataset].read(files, columns)
    named = ", ".join(path.name for path in files)
    if found.interactions.empty:
        raise InputError(f"{named}: there are no interactions; check that the download is complete")
    missing = found.interactions[["user", "item"]].isna().any(axis=1)
    if missing.any():
        raise InputError(f"{named}: {int(missing.sum()):,} interactions have no user or no item; remove these rows")
    titles = found.titles.dropna()
    # Where an item has several titles the first in order stays, so that the order of the rows is no matter.
    titles = titles[titles["title"].str.strip() != ""].sort_values(["item", "title"]).drop_duplicates("item")
    if titles.empty:
        raise InputError(f"{named}: no item has a title, and the ranker reads titles; give the file that holds them")
    if not found.interactions["item"].isin(titles["item"]).any():
        raise InputError(
            f"{named}: no item of the interactions has a title; check that both name items by the same ids"
        )
    return Raw(found.interactions, titles)


def _existing(folder: Path | None, names: tuple[str, ...], what: str) -> list[Path]:
    if folder is None:
        raise InputError(f"give --raw a folder with {' and '.join(names)}: {what}")
    paths = [folder / name for name in names]
    for path in paths:
        zipped = path.with_name(path.name + ".gz")
        if not path.is_file() and not zipped.is_file():
            raise InputError(f"{path} is not there: {what}")
    return [path if path.is_file() else path.with_name(path.name + ".gz") for path in paths]


def _csv(path: Path, columns: Mapping[str, str] | None, **options: Any) -> Frame:
    """A text table with every column as strings; ``columns`` renames and selects from its header."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8", **options)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; check that the download is complete") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
    except (pd.errors.ParserError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} does not read as a table ({error}); check that the download is complete") from None
    return frame if columns is None else _select(frame, columns, path)


def _select(frame: Frame, columns: Mapping[str, str], path: Path) -> Frame:
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise InputError(f"{path} has no column {', '.join(absent)}: it has {', '.join(map(str, frame.columns))}")
    return frame[list(columns)].rename(columns=columns)


def _with_numbers(interactions: Frame, path: Path) -> Frame:
    """The same with the timestamps as numbers."""
    raw = interactions["timestamp"]
    if pd.api.types.is_datetime64_any_dtype(raw):
        numbers = raw.astype("int64").where(raw.notna())
    else:
        numbers = pd.to_numeric(raw, errors="coerce")
    if numbers.isna().any():
        row = int(numbers.isna().to_numpy().argmax())
        raise InputError(f"{path}: timestamp {raw.iloc[row]!r} of interaction {row + 1:,} is not a number")
    return interactions.assign(timestamp=numbers)


def _movielens_100k_files(raw: Path | None) -> list[Path]:
    if raw is None:
        spec = importlib.util.find_spec("recbole")  # its files are read, the package is never imported
        if spec is None or spec.origin is None:
            raise InputError("MovieLens-100K comes with the recbole package: pip install --no-deps recbole==1.2.1")
        raw = Path(spec.origin).parent / "dataset_example" / "ml-100k"
    return _existing(raw, ("ml-100k.inter", "ml-100k.item"), "the folder is that of recbole's dataset_example/ml-100k")


def _movielens_100k(files: list[Path], _: Columns) -> Raw:
    inter, item = files
    names = {"user_id:token": "user", "item_id:token": "item", "timestamp:float": "timestamp"}
    interactions = _with_numbers(_csv(inter, names, sep="\t"), inter)
    names = {"item_id:token": "item", "movie_title:token_seq": "title", "release_year:token": "year"}
    titles = _csv(item, names, sep="\t", quoting=3)
    year = titles["year"].map(lambda value: f" ({value})", na_action="ignore").fillna("")
    titles["title"] = (titles["title"] + year).map(movie_title, na_action="ignore")
    return Raw(interactions, titles[["item", "title"]])


MOVIELENS = "MovieLens data sets are at https://files.grouplens.org/datasets/movielens/"


def _movielens_files(raw: Path | None) -> list[Path]:
    if raw is not None and (raw / "ratings.dat").is_file():
        return _existing(raw, ("ratings.dat", "movies.dat"), MOVIELENS)
    return _existing(raw, ("ratings.csv", "movies.csv"), MOVIELENS)


def _movielens(files: list[Path], _: Columns) -> Raw:
    ratings, movies = files
    if ratings.suffix == ".dat":
        interactions = _csv(ratings, None, sep=":", header=None, usecols=[0, 2, 6], names=[*"abcdefg"])
        interactions.columns = ["user", "item", "timestamp"]
        titles = pd.DataFrame(_double_colon_lines(movies), columns=["item", "title"])
    else:
        names = {"userId": "user", "movieId": "item", "timestamp": "timestamp"}
        interactions = _csv(ratings, names)
        titles = _csv(movies, {"movieId": "item", "title": "title"})
    titles["title"] = titles["title"].map(movie_title, na_action="ignore")
    return Raw(_with_numbers(interactions, ratings), titles)


def _double_colon_lines(path: Path) -> Iterator[list[str]]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # MovieLens-1M is ISO-8859-1; all others are UTF-8
        text = content.decode("iso-8859-1")
    for line in text.splitlines():
        fields = line.split("::")
        if len(fields) != 3:
            raise InputError(f"{path}: {line!r} is not item::title::genres")
        yield fields[:2]


AMAZON = (
    "an Amazon data set is a folder with one ratings file (ratings_*.csv of 2014, or reviews as JSON lines) and one "
    "meta_*.json or meta_*.jsonl, plain or .gz; see https://jmcauley.ucsd.edu/data/amazon/"
)


def _amazon_files(raw: Path | None) -> list[Path]:
    if raw is None or not raw.is_dir():
        raise InputError(f"give --raw a folder: {AMAZON}")
    tables = [
        path for path in sorted(raw.iterdir()) if path.name.removesuffix(".gz").endswith((".csv", ".json", ".jsonl"))
    ]
    metadata = [path for path in tables if path.name.startswith("meta_")]
    ratings = [path for path in tables if path not in metadata]
    if len(metadata) != 1 or len(ratings) != 1:
        raise InputError(f"{raw} holds {len(ratings)} ratings files and {len(metadata)} meta files: {AMAZON}")
    return [ratings[0], metadata[0]]


def _amazon(files: list[Path], _: Columns) -> Raw:
    ratings, metadata = files
    if ratings.name.removesuffix(".gz").endswith(".csv"):
        # The ratings of 2014 name the user first, the later "ratings only" files the item.
        order = ("user", "item") if ratings.name.startswith("ratings_") else ("item", "user")
        interactions = _csv(ratings, None, header=None, names=[*order, "rating", "timestamp"])
    else:
        keys = ("reviewerID", "user_id"), ("parent_asin", "asin"), ("unixReviewTime", "timestamp")
        rows = [[_first(line, names) for names in keys] for line in _json_lines(ratings)]
        interactions = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    titles = [[_first(line, ("parent_asin", "asin")), line.get("title")] for line in _json_lines(metadata)]
    table = pd.DataFrame(titles, columns=["item", "title"])
    table["title"] = table["title"].map(product_title, na_action="ignore")
    return Raw(_with_numbers(interactions[["user", "item", "timestamp"]], ratings), table)


def _first(line: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((line[name] for name in names if name in line), None)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of JSON lines, or of Python literals as in the metadata of 2014, which are parsed and never run."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                try:
                    found = json.loads(line) if '"' in line[:3] else ast.literal_eval(line)
                    found.keys()
                except (ValueError, SyntaxError, AttributeError, MemoryError, RecursionError):
                    raise InputError(f"{path}: line {number:,} is neither JSON nor a Python literal") from None
                yield found
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise InputError(f"{path} does not read ({error}); check that the download is complete") from None


def _table_files(raw: Path | None) -> list[Path]:
    if raw is None or not raw.exists():
        raise InputError(
            f"{raw or '--raw'} is not there: give --raw a CSV or Parquet file, or a folder of Parquet files"
        )
    files = sorted(raw.glob("*.parquet")) if raw.is_dir() else [raw]
    if not files:
        raise InputError(
            f"{raw} holds no *.parquet file: give --raw a CSV or Parquet file, or a folder of Parquet files"
        )
    return files


def _table(files: list[Path], columns: Columns) -> Raw:
    names = {columns.user: "user", columns.item: "item", columns.timestamp: "timestamp", columns.title: "title"}
    if len(names) < 4:
        raise InputError("--user-column, --item-column, --timestamp-column and --title-column must be four columns")
    frames = []
    for path in files:
        if path.suffix == ".parquet":
            try:
                frame = _select(pd.read_parquet(path), names, path)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} does not read as Parquet ({error})") from None
            for name in ("user", "item", "title"):
                frame[name] = frame[name].map(str, na_action="ignore")
        else:
            frame = _csv(path, names)
        frames.append(_with_numbers(frame, path))
    table = pd.concat(frames, ignore_index=True)
    return Raw(table[["user", "item", "timestamp"]], table[["item", "title"]])


SOURCES: Mapping[str, Source] = {
    "movielens-100k": Source(_movielens_100k_files, _movielens_100k),
    "movielens": Source(_movielens_files, _movielens),
    "amazon": Source(_amazon_files, _amazon),
    "table": Source(_table_files, _table),
}
"""Every kind of raw data by the name that `--dataset` takes."""
