"""`llamarec events`, `llamarec users` and `llamarec serve --store` and `--answers`."""

import json

import pytest


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


def test_a_store_has_to_be_named(run, monkeypatch):
    """Typer's own error, which names the option and the variable."""
    monkeypatch.delenv("LLAMAREC_STORE", raising=False)
    code, _, err = run("users", "show", "ann")
    assert code == 2
    assert "--store" in err
