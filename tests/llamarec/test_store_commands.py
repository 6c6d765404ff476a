"""`llamarec events`, `llamarec users`, `llamarec items`, and the options `--store` and `--answers` of others."""

import json
import sqlite3
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export.config import write_configs
from preprocessing.data import load_data
from serving.server.releases import State
from stores.sqlite import APPLICATION, TABLES_1


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return the address of a store that is named by the environment."""
    address = f"sqlite:///{tmp_path}/histories.sqlite"
    monkeypatch.setenv("LLAMAREC_STORE", address)
    return address


def shown(run, user: str) -> list[str]:
    code, out, _ = run("users", "show", user, "--json")
    assert code == 0
    return [row["item"] for row in json.loads(out)]


def test_a_life_of_two_users(run, store, tmp_path):
    """Loaded, shown, merged and forgotten. 1,700,000,000 s is 2023-11-14T22:13:20 UTC."""
    file = tmp_path / "events.csv"
    file.write_text("user,item,timestamp\nann,50,1700000000\nguest,181,1700000001\nann,172,1700000002\n")
    code, out, _ = run("events", "load", file, "--json")
    assert (code, json.loads(out)) == (0, {"events": 3, "new": 3, "skipped": 0})
    code, out, _ = run("users", "show", "guest", "--json")
    assert json.loads(out) == [{"time": "2023-11-14T22:13:21.000+00:00", "item": "181", "kind": "view"}]
    code, out, _ = run("users", "merge", "guest", "ann", "--json")
    assert (code, json.loads(out)) == (0, {"from": "guest", "to": "ann", "new events": 1})
    assert shown(run, "ann") == ["50", "181", "172"]
    assert shown(run, "guest") == []
    code, out, _ = run("users", "forget", "ann", "--json")
    assert (code, json.loads(out)) == (0, {"user": "ann", "events": 3})
    assert shown(run, "ann") == []


def test_a_table_shows_what_json_does(run, store, tmp_path):
    (tmp_path / "events.csv").write_text("who;what;when\nann;50;1700000000\n")
    columns = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when", "--delimiter", ";"]
    assert run("events", "load", tmp_path / "events.csv", *columns, "--kind", "purchase", "--store", store)[0] == 0
    code, out, _ = run("users", "show", "ann")
    assert code == 0
    assert "1 events of ann" in out
    assert all(part in out for part in ("2023-11-14T22:13:20", "50", "purchase"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["users", "show", "ann", "--store", "histories"],
            "'histories' is not the address of a store",
        ),
        (
            ["users", "show", "ann", "--store", "sqlite:////nowhere/store"],
            "the store sqlite:////nowhere/store",
        ),
        (["users", "forget", "u" * 513], "USER_ID has 513 bytes: give 1 to 512"),
        (["events", "load", "/nowhere/file.csv"], "/nowhere/file.csv does not exist"),
        (
            ["serve", "--repository", "model_repository", "--store", "ftp://x"],
            "'ftp://x' is not the address",
        ),
        (
            ["serve", "--repository", "model_repository", "--answers", "README.md"],
            "--answers README.md is not a folder: name another path",
        ),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(run, store, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("release", [None, "r1"])
def test_answers_of_an_old_repository_are_logged_with_a_warning(run, tmp_path, monkeypatch, release):
    """Without USER among the outputs of `features`, nobody can tell to whom an answer was shown; the server starts."""
    started = []

    class Supervisor:
        def __init__(self, repository, arguments, **options):
            started.append(options["load"])

        def run(self):
            return 0

    monkeypatch.setattr("serving.server.supervisor.Supervisor", Supervisor)
    for variable in ("LLAMAREC_ANSWERS", "LLAMAREC_ANSWERS_SAMPLE"):
        monkeypatch.setenv(variable, "")  # the command sets both, and they have to be as before when the test ends
        monkeypatch.delenv(variable)
    repository = tmp_path / "repository"
    write_configs(repository, suffix=f"_{release}" if release else "")
    features = repository / (f"features_{release}" if release else "features") / "config.pbtxt"
    if release:
        (repository / ".releases").mkdir()
        State(release, release, released=True).write(repository)
    serve = ["serve", "--repository", repository]
    current, old = features.read_text(), features.read_text().replace('name: "USER"', 'name: "OTHER"')
    features.write_text(old)
    assert run(*serve) == (0, "", "")
    features.write_text(current)
    assert run(*serve, "--answers", tmp_path / "answers") == (0, "", "")
    features.write_text(old)
    code, _, err = run(*serve, "--answers", tmp_path / "answers")
    assert (code, len(started)) == (0, 3)
    assert f"an earlier version exported {features.parent.name} of {repository}, so answers are logged without" in err
    assert ("`llamarec release build`" if release else "`llamarec export`") in err
    assert err.count("\n") == 1


def test_a_store_has_to_be_named(run, monkeypatch):
    """Typer's own error, which names the option and the variable."""
    monkeypatch.delenv("LLAMAREC_STORE", raising=False)
    code, _, err = run("users", "show", "ann")
    assert code == 2
    assert "--store" in err


def listed(run) -> list[list[object]]:
    code, out, _ = run("items", "list", "--json")
    assert code == 0
    return [list(row.values()) for row in json.loads(out)]


def test_a_life_of_some_items(run, store, tmp_path):
    """Added, with another title, hidden and shown. Tags and spaces are not part of a title, as in preprocessing."""
    file = tmp_path / "new.csv"
    file.write_text("item,title,price\nb,Second,1\na,<b>First</b>  one,2\n")
    code, out, _ = run("items", "add", file, "--json")
    assert (code, json.loads(out)) == (0, {"items": 2, "changed": 2, "skipped": 0})
    assert listed(run) == [["b", "Second", False], ["a", "First one", False]]
    file.write_text("item,title\na,First\nc,Third\na,Last\n")
    code, out, _ = run("items", "add", file, "--json")
    assert json.loads(out) == {"items": 2, "changed": 2, "skipped": 0}
    code, out, _ = run("items", "hide", "a", "50", "a", "--json")
    assert (code, json.loads(out)) == (0, {"items": 2, "changed": 2})
    assert listed(run) == [["b", "Second", False], ["a", "Last", True], ["c", "Third", False], ["50", None, True]]
    code, out, _ = run("items", "show", "50", "b", "--json")
    assert (code, json.loads(out)) == (0, {"items": 2, "changed": 1})
    code, out, _ = run("items", "list")
    assert "3 added, 1 hidden" in out
    assert all(part in out for part in ("Second", "Last", "yes"))


def test_items_are_read_from_parquet_and_other_columns(run, store, tmp_path):
    """Ids that are integers are the same as their text; a file of text has the separator that is given."""
    pq.write_table(pa.table({"asin": [7, 8], "name": ["Seven", "Eight"]}), tmp_path / "new.parquet")
    (tmp_path / "new.csv").write_text("asin;name\n7;Sieben\n")
    columns = "--item-column", "asin", "--title-column", "name"
    assert run("items", "add", tmp_path / "new.parquet", *columns)[0] == 0
    assert run("items", "add", tmp_path / "new.csv", *columns, "--delimiter", ";")[0] == 0
    assert listed(run) == [["7", "Sieben", False], ["8", "Eight", False]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"item,title\n1,One\n2,\n", "line 3 has no title; fix the file or use --skip-bad-lines"),
        (b"item,title\n1,One\n2,nan\n", "line 3 has a title that is a null written as text ('nan')"),
        (b"item,title\n1,One\n2,<p> </p>\n", "line 3 has a title that is blank ('<p> </p>')"),
        (b"item,title\n1,One\n,Two\n", "line 3 has no item id"),
        (b"item,title\n1,One\n ,Two\n", "line 3 has an empty item id"),
        (b"item,title\n1,One\n" + b"x" * 513 + b",Two\n", "line 3 has an item id of more than 512 bytes ('xxx"),
        (b"item,title\n1,One\n2,Two,Three\n", "line 3 has 3 fields, not 2"),
        (b"item,title\n1,One\n2,\xff\n", "is not UTF-8; convert it first"),
        (b"item,name\n1,One\n", "has no column title: it has item, name"),
        (b"item,title\n", "has no items: check that it is complete"),
        (b"", "is empty; check that the download is complete"),
    ],
)
def test_a_bad_file_adds_nothing(run, store, tmp_path, content, message):
    """Not even its good rows."""
    (tmp_path / "new.csv").write_bytes(content)
    code, out, err = run("items", "add", tmp_path / "new.csv")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert listed(run) == []


def test_bad_rows_are_skipped_on_request(run, store, tmp_path):
    """A row with several faults is counted once."""
    (tmp_path / "new.csv").write_text("item,title\n1,One\n,\n2,null\n3,Three\n")
    code, out, _ = run("items", "add", tmp_path / "new.csv", "--skip-bad-lines", "--json")
    assert (code, json.loads(out)) == (0, {"items": 2, "changed": 2, "skipped": 2})
    assert listed(run) == [["1", "One", False], ["3", "Three", False]]


def test_a_title_of_parquet_that_is_not_utf8_is_named(run, store, tmp_path):
    titles = pa.array([b"One", b"\xff"], pa.binary())
    pq.write_table(pa.table({"item": ["1", "2"], "title": titles}), tmp_path / "new.parquet")
    code, _, err = run("items", "add", tmp_path / "new.parquet")
    assert code == 2
    assert r"row 2 has a title that is not UTF-8 (b'\xff')" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["items", "hide", ""], "an item id is empty: give 1 to 512 bytes"),
        (["items", "show", "ü" * 257], "has 514 bytes: give 1 to 512"),
        (["items", "hide", "\udcff"], "is not valid Unicode"),
        (["items", "add", "/nowhere/file.csv"], "/nowhere/file.csv does not exist: name a CSV or Parquet file"),
        (["items", "add", "x.csv", "--item-column", "title"], "must name two different columns"),
        (["items", "add", "x.csv", "--delimiter", "::"], "--delimiter must be one character, or `tab`, not '::'"),
        (["items", "list", "--store", "sqlite:////nowhere/store"], "the store sqlite:////nowhere/store"),
        (["users", "migrate", "--store", "sqlite:////nowhere/store"], "there is no store sqlite:////nowhere/store"),
    ],
)
def test_bad_items_end_with_one_sentence_and_code_2(run, store, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_store_of_version_1_is_migrated(run, store):
    """The empty tables of version 1, as it made them. Until then, the error names the command."""
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        connection.executescript(TABLES_1 + f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = 1;")
    code, _, err = run("users", "show", "ann")
    assert code == 2
    assert "has version 1, and this llamarec reads 2: run `llamarec users migrate --store URL`" in err
    assert run("users", "migrate")[:2] == (0, "migrated from version 1 to 2\n")
    assert run("users", "migrate")[:2] == (0, "the store has version 2 already: there is nothing to do\n")
    assert json.loads(run("users", "migrate", "--json")[1]) == {"from": 2, "to": 2}
    assert shown(run, "ann") == []


def test_added_items_are_part_of_the_next_data_set(run, store, tmp_path):
    """An item whose title only the store has is trained, as it has events; the command says how many there were."""
    rows = [(user, item, place) for user in "abc" for place, item in enumerate(["1", "2", "3", "new"])]
    log = "".join(f"{user},{item},{time},{'' if item == 'new' else item}\n" for user, item, time in rows * 2)
    (tmp_path / "log.csv").write_text("user,item,timestamp,title\n" + log)
    (tmp_path / "new.csv").write_text("item,title\nnew,A new one\nother,Nobody had it\n")
    assert run("items", "add", tmp_path / "new.csv")[0] == 0
    command = "preprocess", "--dataset", "table", "--raw", tmp_path / "log.csv", "--artifacts", tmp_path, "--json"
    assert json.loads(run(*command)[1])["items"] == 3  # the environment's store is not asked
    code, out, err = run(*command, "--store", store)
    assert code == 0
    assert (json.loads(out)["items"], json.loads(out)["reading"]["titles"]["added"]) == (4, 2)
    assert "2 items were added to the store" in err
    catalogue = load_data(tmp_path).catalogue
    assert catalogue.title(catalogue.number(b"new")) == "A new one"
    assert catalogue.trained == 4
    assert catalogue.title(5) == "Nobody had it"
