"""Groups of items: from each kind of raw data into the catalogue, and through an append."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest
from raw_data import LOG, ingested

from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess
from preprocessing.sources import Layout

MOVIES = 'movieId,title,genres\n10,"Matrix, The (1999)",Action|Sci-Fi\n20,Amélie (2001),(no genres listed)\n'
RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,100\n2,20,3.5,200\n"
RECBOLE = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


def flags(*places):
    """Return the 19 genre columns of a line of u.item, with these set."""
    return "|".join("1" if place in places else "0" for place in range(19))


CASES = {
    "a table": (
        "table",
        {"log.csv": "user,item,timestamp,title,brand\n1,10,9,A,Acme\n1,20,9,B,\n2,10,9,A, Acme \n"},
        "brand",
        {"10": "Acme"},
    ),
    "two groups of one item": (
        "table",
        {"log.csv": "user,item,timestamp,title,brand\n1,10,9,A,Zenith\n1,10,9,A,Acme\n"},
        "brand",
        {"10": "Acme"},
    ),
    "movies.csv": ("movielens", {"ratings.csv": RATINGS, "movies.csv": MOVIES}, "genres", {"10": "Action"}),
    "movies.dat": (
        "movielens",
        {"ratings.dat": "1::10::4::100\n", "movies.dat": "10::The Matrix (1999)::Action|Sci-Fi\n"},
        "genres",
        {"10": "Action"},
    ),
    "u.item": (
        "movielens-100k",
        {
            "u.data": "1\t10\t4\t100\n",
            # Genres 3 and 5 are Animation and Comedy, and 0 is unknown (MovieLens-100K, u.genre).
            "u.item": f"10|Toy Story (1995)|||x|{flags(3, 5)}\n20|Nothing (1995)|||x|{flags(0)}\n",
        },
        "genres",
        {"10": "Animation"},
    ),
    "recbole": (
        "movielens-100k",
        {
            "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t4\t100\n",
            "ml-100k.item": RECBOLE + "10\tToy Story\t1995\tAnimation Children's Comedy\n",
        },
        "genres",
        {"10": "Animation"},
    ),
    "Amazon's brands": (
        "amazon",
        {"ratings_X.csv": "u,a,5,100\n", "meta_X.json": "{'asin': 'a', 'title': 'Soap', 'brand': 'Acme'}\n"},
        "brand",
        {"a": "Acme"},
    ),
    "Amazon's paths": (
        "amazon",
        {
            "ratings_X.csv": "u,a,5,100\n",
            "meta_X.json": '{"asin": "a", "title": "Soap", "categories": [["Beauty", "Skin Care", "Soap"], ["Bath"]]}\n'
            '{"asin": "b", "title": "Gel", "categories": []}\n{"asin": "c", "title": "Oil", "categories": ["Oils"]}\n',
        },
        "categories",
        {"a": "Skin Care", "c": "Oils"},
    ),
}


def raw_folder(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_groups_are_read(tmp_path, name):
    """Each file is in the documented layout of its data set; the first of several groups counts."""
    dataset, contents, column, expected = CASES[name]
    raw, _ = ingested(
        raw_folder(tmp_path / "raw", contents), tmp_path / "made", dataset=dataset, layout=Layout(group=column)
    )
    assert raw.groups == expected


@pytest.mark.parametrize(
    ("dataset", "contents", "column", "message"),
    [
        ("table", CASES["a table"][1], "maker", "no column maker: it has user, item, timestamp, title, brand"),
        ("table", CASES["a table"][1], "title", "--group-column a fifth"),
        ("table", {"log.csv": "user,item,timestamp,title,brand\n1,1,9,A,\n"}, "brand", "no item has a group"),
        ("table", {"log.csv": f"user,item,timestamp,title,b\n1,1,9,A,{'x' * 513}\n"}, "b", "more than 512 bytes"),
        ("movielens", CASES["movies.csv"][1], "year", "no group column year: they have genres"),
        ("movielens", CASES["movies.dat"][1], "year", "no group column year: they have genres"),
        ("amazon", CASES["Amazon's brands"][1], "maker", "no field maker: its lines have asin, title, brand"),
    ],
)
def test_a_column_that_is_not_there_is_said(tmp_path, dataset, contents, column, message):
    """The error lists the columns or fields that are there."""
    folder = raw_folder(tmp_path / "raw", contents)
    with pytest.raises(InputError, match=message):
        ingested(folder, tmp_path / "made", dataset=dataset, layout=Layout(group=column))


def test_the_catalogue_keeps_groups(tmp_path):
    """Written and read again; added items have no group; a catalogue without groups has no column."""
    Catalogue([b"a", b"b", b"c"], ["A", "B", "C"], [2, 1, 1], ["Film", None, "Book"]).write(tmp_path / "grouped")
    catalogue = Catalogue.load(tmp_path / "grouped").with_added([(b"d", "D")])
    assert catalogue.groups.names == ("Book", "Film")
    assert catalogue.groups.codes.tolist() == [-1, 1, -1, 0, -1]
    assert catalogue.groups.values() == ["Film", None, "Book", None]
    assert catalogue.groups.codes_of(["Film", "Music"]).tolist() == [1]
    Catalogue([b"a"], ["A"], [1], [None]).write(tmp_path / "plain")
    assert pq.read_schema(tmp_path / "plain").names == ["item", "raw", "title", "training_count"]
    assert Catalogue.load(tmp_path / "plain").groups.names == ()


@pytest.mark.thorough
def test_an_append_keeps_groups(tmp_path):
    """Earlier items keep their groups where the batch has none, and the others get those of the batch."""
    first = LOG.assign(kind=LOG["item"].map(lambda item: "even" if int(item[1:]) % 2 == 0 else None))
    first.to_csv(tmp_path / "first.csv", index=False)
    preprocess(Preprocessing(dataset="table", raw=tmp_path / "first.csv", group_column="kind"), tmp_path)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["options"]["columns"]["group"] == "kind"
    assert manifest["facts"]["reading"]["titles"]["grouped"] == 6
    new = pd.DataFrame([("u0", "i99", 1_700_000_000, "New")], columns=["user", "item", "timestamp", "title"])
    new.assign(kind="odd").to_csv(tmp_path / "second.csv", index=False)
    new.assign(item="i98").to_csv(tmp_path / "third.csv", index=False)
    for batch, column in (("second.csv", "kind"), ("third.csv", None)):
        options = Preprocessing(dataset="table", raw=tmp_path / batch, append=True, group_column=column)
        preprocess(options, tmp_path)
    catalogue = Catalogue.load(tmp_path / "data" / ITEMS_FILE)
    found = {catalogue.raw(item).decode(): group for item, group in enumerate(catalogue.groups.values(), 1)}
    assert found == {
        **{f"i{item}": "even" if item % 2 == 0 else None for item in range(12)},
        "i99": "odd",
        "i98": None,
    }
