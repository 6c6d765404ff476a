"""Files as people have them, each after a public report: they are read as meant, or refused in one sentence."""

import gzip
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import LATE, LOG, U0, ingested, sequences

from preprocessing.errors import InputError
from preprocessing.report import sentences
from preprocessing.sources import Layout
from preprocessing.titles import SCRIPT


def write_typed(part, path, unit):
    """Write rows with Arrow's timestamps in a unit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamps = pa.array(pd.to_datetime(part.timestamp, unit="s")).cast(pa.timestamp(unit))
    table = pa.table({"user": part.user, "item": part["item"], "timestamp": stamps, "title": part.title})
    pq.write_table(table, path, version="2.6")


def write_column(path, **changed):
    """Write the log as Parquet with other columns in place of some."""
    columns = {name: changed.get(name, LOG[name]) for name in LOG}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(("early", "late"), [("us", "ms"), ("s", "ns"), ("ns", "us")])
def test_typed_times_of_several_units_become_one(tmp_path, early, late):
    """Parquet files with timestamps of two units (apache/arrow-rs#1459, pola-rs/polars#20196, #22307).

    The order is that in which the log was drawn.
    """
    write_typed(LOG[~LATE], tmp_path / "log" / "a.parquet", early)
    write_typed(LOG[LATE], tmp_path / "log" / "b.parquet", late)
    raw, _ = ingested(tmp_path / "log", tmp_path / "out")
    assert sequences(raw)["u0"] == U0


def test_numbers_in_two_units_are_refused(tmp_path):
    """Seconds in one file and milliseconds in the other: both are named, with a value of each (polars#20196)."""
    (tmp_path / "log").mkdir()
    LOG[~LATE].to_parquet(tmp_path / "log" / "a.parquet")
    LOG[LATE].assign(timestamp=LOG.timestamp * 1000).to_csv(tmp_path / "log" / "b.csv", index=False)
    for skip in (False, True):
        with pytest.raises(InputError) as error:
            ingested(tmp_path / "log", tmp_path / "out", skip=skip)
        assert str(error.value) == (
            f"{tmp_path}/log/a.parquet: row 1 has the timestamp 1600000000, a time in seconds, and"
            f" {tmp_path}/log/b.csv: line 2 has the timestamp 1600518400000, a time in milliseconds: all numbers must"
            f" have one unit, so convert {tmp_path}/log/b.csv to seconds"
        )
        assert list((tmp_path / "out").iterdir()) == []


def test_numbers_and_dates_are_joined(tmp_path):
    """Seconds in one file, ISO 8601 text and Arrow's times in others: each is a time, so they have one order."""
    LOG[~LATE].to_csv(tmp_path / "a.csv", index=False)
    third = LOG[LATE].index[::2]
    iso = LOG[LATE].drop(third).assign(timestamp=lambda rows: pd.to_datetime(rows.timestamp, unit="s").astype(str))
    iso.to_csv(tmp_path / "b.csv", index=False)
    write_typed(LOG.loc[third], tmp_path / "c.parquet", "ms")
    raw, _ = ingested(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert sequences(raw)["u0"] == U0
    assert raw.times["read_as"] == "dates and numbers in seconds"
    assert (raw.times["first"], raw.times["last"]) == ("2020-09-13T12:26:40Z", "2020-09-24T12:26:40Z")


def test_ordinals_are_kept_and_reported(tmp_path):
    """Numbers in no unit between 1980 and 2100 are an order, with fractions too."""
    for scale in (1, 0.5):
        days = (LOG.timestamp - 1_600_000_000) // 86_400
        LOG.assign(timestamp=days * scale).to_csv(tmp_path / "log.csv", index=False)
        raw, _ = ingested(tmp_path / "log.csv", tmp_path / "out")
        assert sequences(raw)["u0"] == U0
        assert "an order only" in raw.times["read_as"]


def test_a_number_outside_the_unit_of_the_others(tmp_path):
    """0 among seconds stops with both named; it is skipped and counted on request, unless such are the majority."""
    rows = LOG.copy()
    rows.loc[5, "timestamp"] = 0
    rows.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(InputError, match=r"log.csv: line 7 has the timestamp 0, which is outside 1980 to 2100"):
        ingested(tmp_path / "log.csv", tmp_path / "out")
    raw, log = ingested(tmp_path / "log.csv", tmp_path / "out", skip=True)
    assert sequences(raw)["u0"] == [*U0[:5], *U0[6:]]
    assert log.skipped() == {tmp_path / "log.csv": 1}
    rows.loc[5:, "timestamp"] = 0
    rows.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(InputError, match=r"235 of 240 rows are so"):
        ingested(tmp_path / "log.csv", tmp_path / "out", skip=True)


def test_folders_in_the_folder_are_read(tmp_path):
    """Nested folders, Hive's partitions of pandas, and files that Spark, macOS and editors leave next to the data."""
    nested = tmp_path / "log"
    (nested / "2023" / "05").mkdir(parents=True)
    LOG[~LATE].to_parquet(nested / "a.parquet")
    LOG[LATE].to_parquet(nested / "2023" / "05" / "b.parquet")
    hive = tmp_path / "hive"
    LOG.assign(year=np.where(LATE, 2024, 2023)).to_parquet(hive, partition_cols=["year"])
    for folder in (nested, hive):
        (folder / "._a.parquet").write_bytes(b"\0\5")
        (folder / ".b.parquet").write_bytes(b"nothing")
        (folder / "_SUCCESS").write_bytes(b"")
        (folder / "_metadata").write_bytes(b"PAR1")
        (folder / "_delta_log").mkdir()
        (folder / "_delta_log" / "0.parquet").write_bytes(b"nothing")
        (folder / "README.md").write_text("about")
        raw, log = ingested(folder, tmp_path / "out")
        assert raw.rows == 240
        assert sequences(raw)["u0"] == U0
        assert sum(record.rows for record in log.files.values()) == 240


def test_a_partition_is_a_column_only_if_the_files_lack_it(tmp_path):
    """Hive takes the column of a partition out of the files; here it is the day, and for one file the user."""
    days = LOG.assign(timestamp=pd.to_datetime(LOG.timestamp, unit="s").dt.strftime("%Y-%m-%d"))
    days.to_parquet(tmp_path / "log", partition_cols=["timestamp"])
    raw, _ = ingested(tmp_path / "log", tmp_path / "out")
    assert sequences(raw)["u0"] == U0
    folder = tmp_path / "csv" / "user=a%2Fb" / "title=not this"
    folder.mkdir(parents=True)
    LOG[LOG.user == "u0"].drop(columns="user").to_csv(folder / "part.csv.gz", index=False)
    raw, _ = ingested(tmp_path / "csv", tmp_path / "out")
    assert sequences(raw) == {"a/b": U0}
    assert raw.titles["i9"] == "Thing 9"


def test_a_link_to_a_folder_above_ends(tmp_path):
    LOG.to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "again").symlink_to(tmp_path)
    assert ingested(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")[0].rows == 240


def write_compressed(path, compression, content):
    with pa.CompressedOutputStream(str(path), compression) as file:
        file.write(content)


@pytest.mark.parametrize("name", ["log.pq", "log.PARQUET", "log.parq", "log"])
def test_parquet_by_any_name(tmp_path, name):
    """Parquet files are known by their names in any case, or by their first bytes."""
    LOG.to_parquet(tmp_path / name, engine="pyarrow")
    assert sequences(ingested(tmp_path / name, tmp_path / "out")[0])["u0"] == U0


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("log.csv.bz2", "bz2"),
        ("log.csv.zst", "zstd"),
        ("log.CSV.GZ", "gzip"),
        ("log.csv", "gzip"),
        ("a.csv.lz4", "lz4"),
    ],
)
def test_text_in_any_compression(tmp_path, name, compression):
    """Compressions are known by their first bytes; a file that is cut short is refused."""
    write_compressed(tmp_path / name, compression, LOG.to_csv(index=False).encode())
    assert sequences(ingested(tmp_path / name, tmp_path / "out")[0])["u0"] == U0
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cannot be read as a table .*; check that the download is complete"):
        ingested(tmp_path / name, tmp_path / "out")


def test_a_spreadsheet_is_refused(tmp_path):
    """Excel's files are zip archives."""
    (tmp_path / "log.xlsx").write_bytes(b"PK\x03\x04\0\0\0\0")
    with pytest.raises(InputError, match=r"is a zip archive or a spreadsheet"):
        ingested(tmp_path / "log.xlsx", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "separator", "option"), [("a.tsv", "\t", None), ("a.csv", ";", ";"), ("a.txt", "|", "|")]
)
def test_separators(tmp_path, name, separator, option):
    """A tab is known by the file's name, others are an option; without it the error says so."""
    LOG.to_csv(tmp_path / name, sep=separator, index=False)
    assert sequences(ingested(tmp_path / name, tmp_path / "out", layout=Layout(delimiter=option))[0])["u0"] == U0
    if option:
        with pytest.raises(InputError, match=r"has no column user, item, timestamp, title: .*set --delimiter"):
            ingested(tmp_path / name, tmp_path / "out")


def test_large_and_categorical_ids(tmp_path):
    """Unsigned ids from 2^63 on, as ClickHouse has them, and dictionaries are ids like others."""
    users = LOG.user.str[1:].astype("uint64") + np.uint64(2**63)
    path = write_column(tmp_path / "log.parquet", user=users, item=pa.array(LOG["item"]).dictionary_encode())
    raw, _ = ingested(path, tmp_path / "out")
    assert sequences(raw)[str(2**63)] == U0
    numbers = pa.array(LOG["item"].str[1:].astype("int16")).dictionary_encode()
    path = write_column(
        tmp_path / "log.parquet", user=pa.array(map(Decimal, users.astype(str)), pa.decimal128(20, 0)), item=numbers
    )
    assert sequences(ingested(path, tmp_path / "out")[0])[str(2**63)] == [item[1:] for item in U0]


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ([*LOG["item"][:-1], "x" * 513], "row 240 has an item id of more than 512 bytes \\('x+...\\)"),
        ([*LOG["item"][:-1], "é" * 257], "row 240 has an item id of more than 512 bytes"),
        (["", *LOG["item"][1:]], "row 1 has an empty item id"),
        ([" \t", *LOG["item"][1:]], "row 1 has an empty item id"),
        ([*LOG["item"][:9], None, *LOG["item"][10:]], "row 10 has no item id"),
        (
            [*LOG["item"].str.encode("utf-8")[:9], b"\xe9", *LOG["item"].str.encode("utf-8")[10:]],
            "row 10 has an item id",
        ),
    ],
)
def test_ids_that_could_never_be_asked_for(tmp_path, column, problem):
    """Serving refuses ids of more than 512 bytes, so that preprocessing does; empty ids name nothing."""
    path = write_column(tmp_path / "log.parquet", item=pa.array(column))
    with pytest.raises(InputError, match=f"log.parquet: {problem}.*; fix the file or use --skip-bad-lines"):
        ingested(path, tmp_path / "out")
    raw, log = ingested(path, tmp_path / "out", skip=True)
    assert (raw.rows, log.skipped()) == (239, {path: 1})


def test_an_id_of_512_bytes_is_accepted(tmp_path):
    raw, _ = ingested(write_column(tmp_path / "log.parquet", item=["x" * 512] * 240), tmp_path / "out")
    assert raw.titles.keys() == {"x" * 512}


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("title", pa.array([["a", "b"]] * 240), "column title has the type list<.*>; titles must be text"),
        ("title", pa.array([1.5] * 240), "column title has the type double; titles must be text"),
        ("item", pa.array([["a"]] * 240), "column item has the type list<.*>; ids must be integers or text"),
        ("timestamp", pa.array([True] * 240), "column timestamp has the type bool; timestamps must be times, dates"),
        ("timestamp", pa.array([5] * 240, pa.time64("us")), "column timestamp has the type time64"),
    ],
)
def test_columns_of_a_wrong_type(tmp_path, column, kind, message):
    """A column of lists, as Amazon's metadata has them in Parquet, is one sentence and no traceback."""
    path = write_column(tmp_path / "log.parquet", **{column: kind})
    with pytest.raises(InputError, match=f"log.parquet: {message}"):
        ingested(path, tmp_path / "out")


def test_titles_as_bytes(tmp_path):
    """Bytes of UTF-8 are titles; those of ISO-8859-1 stop, or are dropped and counted."""
    for encoding in ("utf-8", "iso-8859-1"):
        titles = [title.replace("Thing 9", "Chose é").encode(encoding) for title in LOG.title]
        path = write_column(tmp_path / f"{encoding}.parquet", title=pa.array(titles, pa.binary()))
    assert ingested(tmp_path / "utf-8.parquet", tmp_path / "out")[0].titles["i9"] == "Chose é"
    with pytest.raises(InputError, match=r"iso-8859-1.parquet: row 1 has a title that is not UTF-8"):
        ingested(path, tmp_path / "out")
    raw, log = ingested(path, tmp_path / "out", skip=True)
    assert (raw.rows, log.titles) == (240, {"not UTF-8": 20})
    assert "i9" not in raw.titles


def test_two_columns_of_one_name(tmp_path):
    """Two columns named title: which one is meant cannot be known."""
    columns = [pa.array(LOG[name]) for name in ("user", "item", "timestamp", "title", "title")]
    pq.write_table(
        pa.Table.from_arrays(columns, names=["user", "item", "timestamp", "title", "title"]), tmp_path / "a.pq"
    )
    (tmp_path / "a.csv").write_text("user,item,timestamp,title,title\n1,2,3,a,b\n")
    for name in ("a.pq", "a.csv"):
        with pytest.raises(InputError, match=f"{name} has 2 columns named title: rename all but one of them"):
            ingested(tmp_path / name, tmp_path / "out")
    rows = pa.Table.from_arrays([*columns[:4], columns[0], columns[0]], names=[*LOG, "x", "x"])
    pq.write_table(rows, tmp_path / "a.pq")
    assert ingested(tmp_path / "a.pq", tmp_path / "out")[0].rows == 240


def test_the_error_names_the_line(tmp_path):
    """1_600_000_000 in row 50 is no number; quoted line breaks and blank lines before it count as lines."""
    rows = LOG.astype({"timestamp": str})
    rows.loc[49, "timestamp"] = "1_600_000_000"
    rows.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(InputError, match=r"log.csv: line 51 has a timestamp .* \('1_600_000_000'\)"):
        ingested(tmp_path / "log.csv", tmp_path / "out")
    rows.loc[3, "title"] = "Thing\n9"
    lines = rows.to_csv(index=False).splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join([*lines[:20], "\n", "too,few\n", *lines[20:]]))
    with pytest.raises(InputError, match=r"log.csv: line 22 has 2 fields, not 4"):
        ingested(tmp_path / "log.csv", tmp_path / "out")
    (tmp_path / "log.csv").write_text("".join([*lines[:20], "\n", *lines[20:]]))
    with pytest.raises(InputError, match=r"log.csv: line 53 has a timestamp"):
        ingested(tmp_path / "log.csv", tmp_path / "out")
    raw, log = ingested(tmp_path / "log.csv", tmp_path / "out", skip=True)
    assert (raw.rows, log.skipped()) == (239, {tmp_path / "log.csv": 1})


def amazon(folder, ratings, metadata, reviews="reviews.jsonl", meta="meta_Things.jsonl"):
    """Write an Amazon data set, whose metadata are objects and whose ratings are text or objects."""
    folder.mkdir(exist_ok=True)
    text = ratings if isinstance(ratings, str) else "".join(json.dumps(row) + "\n" for row in ratings)
    (folder / reviews).write_text(text)
    (folder / meta).write_text("".join(json.dumps(row) + "\n" for row in metadata))
    return folder


EVENTS = list(LOG[["user", "item", "timestamp"]].itertuples(index=False, name=None))
REVIEWS_2018 = [{"reviewerID": user, "asin": item, "unixReviewTime": at} for user, item, at in EVENTS]
REVIEWS_2023 = [
    {"user_id": user, "parent_asin": item, "timestamp": at * 1000, "asin": "x"} for user, item, at in EVENTS
]
META_2023 = [{"parent_asin": f"i{item}", "title": f"Thing {item}"} for item in range(12)]


def test_scripts_and_other_titles_that_are_none(tmp_path):
    """Amazon's metadata of 2018 has scripts as titles; lists, objects, NaN and half surrogates come with scraping.

    What is dropped is counted, and HTML is cleaned. The item that is a number and the one in a list have no title.
    """
    titles = {
        1: "<b>Bold</b> &amp; more",
        2: float("nan"),
        3: "var aPageStart = (new Date()).getTime();\nvar ue_t0=...",
        4: ["a", "b"],
        5: {"a": "b"},
        6: "\ud83d",
        7: "nan",
        8: 1984,
    }
    metadata = [{"asin": f"i{item}", "title": titles.get(item, f"Thing {item}")} for item in range(12)]
    raw, log = ingested(amazon(tmp_path / "a", REVIEWS_2018, metadata), tmp_path / "out", dataset="amazon")
    assert {item: raw.titles.get(f"i{item}") for item in range(1, 9)} == {
        **dict.fromkeys(range(1, 9)),
        1: "Bold & more",
        8: "1984",
    }
    assert log.titles == {SCRIPT: 1, "not text": 2, "not UTF-8": 1, "a null written as text": 1}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"asin": ""}, "an empty item id"),
        ({"asin": None}, "no item id"),
        ({"asin": ["i1"]}, "an item id that is not text"),
        ({"asin": 1.0}, "an item id that is not text"),
        ({"reviewerID": "\ud83d"}, "a user id that is not UTF-8"),
        ({"unixReviewTime": -62135596800000}, "a timestamp before 1970"),
        ({"unixReviewTime": "soon"}, "a timestamp that is neither a number nor"),
        ({"unixReviewTime": None}, "no timestamp"),
        ({"unixReviewTime": {}}, "a timestamp that is not text"),
    ],
)
def test_bad_values_of_json(tmp_path, changed, problem):
    """A year 1 as milliseconds, as in Amazon's reviews, and other values: the line is named, or skipped and counted."""
    reviews = [*REVIEWS_2018, {**REVIEWS_2018[0], **changed}]
    metadata = [{"asin": row["parent_asin"], "title": row["title"]} for row in META_2023]
    folder = amazon(tmp_path / "a", reviews, metadata)
    with pytest.raises(InputError, match=f"reviews.jsonl: line 241 has {problem}"):
        ingested(folder, tmp_path / "out", dataset="amazon")
    raw, log = ingested(folder, tmp_path / "out", dataset="amazon", skip=True)
    assert (sequences(raw)["u0"], log.skipped()) == (U0, {folder / "reviews.jsonl": 1})


def test_amazon_2023_as_distributed(tmp_path):
    """The reviews, and the ratings alone as CSV with the header user_id,parent_asin,rating,timestamp, both in ms."""
    header = "user_id,parent_asin,rating,timestamp\n"
    ratings = header + "".join(f"{user},{item},5.0,{at * 1000}\n" for user, item, at in EVENTS)
    for name, rows in (("All_Things.csv", ratings), ("All_Things.jsonl", REVIEWS_2023)):
        folder = amazon(tmp_path / name, rows, META_2023, name, "meta_All_Things.jsonl")
        raw, _ = ingested(folder, tmp_path / "out", dataset="amazon")
        assert sequences(raw)["u0"] == U0
        assert raw.times["read_as"] == "numbers in milliseconds"
        for path in list(folder.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        assert sequences(ingested(folder, tmp_path / "out", dataset="amazon")[0])["u0"] == U0


def test_blank_lines_of_json_are_ignored(tmp_path):
    """A blank last line, as `jq` and editors leave it, is no bad line."""
    folder = amazon(tmp_path / "a", REVIEWS_2023, META_2023)
    for path in list(folder.iterdir()):
        path.write_text(path.read_text() + "\n  \n")
    raw, log = ingested(folder, tmp_path / "out", dataset="amazon")
    assert (sequences(raw)["u0"], log.skipped()) == (U0, {})


def test_a_line_without_header_is_named(tmp_path):
    """The ratings of 2014 have no header, so that the first row is line 1."""
    rows = [f"{user},{item},5.0,{at}\n" for user, item, at in EVENTS]
    rows[2] = rows[2].replace(",16", ",x16")
    folder = amazon(tmp_path / "a", "".join(rows), META_2023, "ratings_Things.csv")
    with pytest.raises(InputError, match=r"ratings_Things.csv: line 3 has a timestamp"):
        ingested(folder, tmp_path / "out", dataset="amazon")
    rows[1] = "U,B\n"
    amazon(tmp_path / "a", "".join(rows), META_2023, "ratings_Things.csv")
    with pytest.raises(InputError, match=r"ratings_Things.csv: line 2 has 2 fields, not 4"):
        ingested(folder, tmp_path / "out", dataset="amazon")


def movie_lens_100k(folder):
    """Write u.data and u.item in the layout of the original ml-100k: tabs, and 24 fields of ISO-8859-1."""
    folder.mkdir()
    data = "".join(f"{user[1:]}\t{item[1:]}\t5\t{at}\n" for user, item, at in EVENTS)
    (folder / "u.data").write_text(data)
    genres = "|".join("0" * 19)
    item = "".join(f"{item}|Amélie {item}, The (2001)|01-Jan-1995||http://x|{genres}\n" for item in range(12))
    (folder / "u.item").write_bytes(item.encode("iso-8859-1"))
    (folder / "u.genre").write_text("unknown|0\n")
    return folder


@pytest.mark.parametrize("dataset", ["movielens", "movielens-100k"])
def test_the_original_movielens_100k(tmp_path, dataset):
    """The layout of GroupLens's ml-100k.zip, whose README describes u.data and u.item."""
    raw, _ = ingested(movie_lens_100k(tmp_path / "ml-100k"), tmp_path / "out", dataset=dataset)
    assert sequences(raw)["0"] == [item[1:] for item in U0]
    assert raw.titles["9"] == "The Amélie 9 (2001)"


def test_titles_may_be_compressed_where_the_ratings_are_not(tmp_path):
    """movies.dat.gz next to ratings.dat."""
    (tmp_path / "ratings.dat").write_text("".join(f"{user[1:]}::{item[1:]}::5::{at}\n" for user, item, at in EVENTS))
    movies = "".join(f"{item}::Thing {item}::Drama\n" for item in range(12))
    write_compressed(tmp_path / "movies.dat.gz", "gzip", movies.encode())
    raw, _ = ingested(tmp_path, tmp_path / "out", dataset="movielens")
    assert sequences(raw)["0"] == [item[1:] for item in U0]
    assert raw.titles["9"] == "Thing 9"


def test_the_report_groups_many_files(tmp_path):
    """Twelve files in two folders are two entries, with their rows and what was skipped."""
    for place, (day, rows) in enumerate(LOG.groupby("timestamp")):
        folder = tmp_path / "log" / f"half={place // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        extra = rows.head(int(place == 7)).assign(item="")
        pd.concat([rows, extra]).to_csv(folder / f"{day}.csv", index=False)
    _, log = ingested(tmp_path / "log", tmp_path / "out", skip=True)
    assert log.report(tmp_path / "log") == [
        {"path": "half=0/*", "format": "CSV", "files": 6, "rows": 120, "skipped": {}},
        {"path": "half=1/*", "format": "CSV", "files": 6, "rows": 120, "skipped": {"no item id": 1}},
    ]


def test_the_report_in_sentences():
    """By hand, from a report with everything in it."""
    report = {
        "files": [{"path": "log/*", "format": "CSV", "files": 1200, "rows": 5000, "skipped": {"no user id": 2}}],
        "unread": ["README.md"],
        "interactions": 5000,
        "times": {"read_as": "numbers in seconds", "first": "2020-01-01T00:00:00Z", "last": "2020-01-02T00:00:00Z"},
        "titles": {"items": 70, "several": 3, "dropped": {"blank": 1}},
        "dropped": {"of items without a title": 5, "outside the k-core": 0},
    }
    assert sentences(report) == [
        "read log/* (1,200 files, CSV): 5,000 rows",
        "  skipped 2 with no user id",
        "not read: README.md",
        "times: numbers in seconds, from 2020-01-01T00:00:00Z to 2020-01-02T00:00:00Z",
        "titles: 70 items",
        "  dropped 1: blank",
        "  3 items have several titles: the first in alphabetical order is used",
        "dropped 5 interactions of items without a title",
    ]
