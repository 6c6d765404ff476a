"""`llamarec recommend-all` and `llamarec similar` as commands: what they print, and how bad input ends."""

import json
from contextlib import closing

import pyarrow.parquet as pq
import pytest

from preprocessing.data import load_data
from serving.layout import step_artifact
from serving.similar import SimilarItems
from stores.address import open_store
from stores.store import AddedItem, Event


@pytest.fixture(autouse=True)
def _no_store_of_the_environment(monkeypatch):
    monkeypatch.delenv("LLAMAREC_STORE", raising=False)


def batch(output, repository, *arguments):
    return ["recommend-all", "--stage", "retrieval", "--output", output, "--repository", repository, *arguments]


def rows(folder):
    return [row for path in sorted(folder.glob("recommendations/*")) for row in pq.read_table(path).to_pylist()]


def test_the_users_of_a_store_are_recommended_for(run, repository, tmp_path):
    """Without its hidden items. The rate is printed and is in the manifest; the same call again changes nothing."""
    url = f"sqlite:///{tmp_path}/store"
    with closing(open_store(url)) as store:
        store.record([(b"ann", [Event(b"50", 1)]), (b"bob", [Event(b"172", 1)])])
        store.hide([b"181"])
    code, out, _ = run(*batch(tmp_path / "out", repository, "--store", url, "--top-k", 5, "--json"))
    facts = json.loads(out)
    assert code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["facts"] == facts
    assert (facts["users"], facts["users_of_last_call"], facts["dataset"]) == (2, 2, "movielens-100k")
    assert facts["users_per_second"] > 0
    found = rows(tmp_path / "out")
    assert [(row["user"], len(row["items"])) for row in found] == [("ann", 5), ("bob", 5)]
    assert not any("181" in row["items"] for row in found)
    code, out, _ = run(*batch(tmp_path / "out", repository, "--store", url, "--top-k", 5))
    assert code == 0
    assert "users_per_second" in out
    with closing(open_store(url)) as store:
        store.record([(b"cid", [Event(b"1", 1)])])
    code, out, err = run(*batch(tmp_path / "out", repository, "--store", url, "--top-k", 5))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the histories have changed since: name another folder, or delete it" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nobody to recommend for: give --artifacts DIR, or --store URL"),
        (["--store", "sqlite:///none/store"], "there is no store sqlite:///none/store: check the address"),
        (["--store", "none"], "is not the address of a store"),
        (["--store", "redis://127.0.0.1:9/0"], "start Redis, or check the address"),
        (["--artifacts", "none"], "none/data does not exist or is not finished: run `llamarec preprocess`"),
    ],
)
def test_bad_input_of_a_batch_ends_with_one_sentence(run, repository, tmp_path, arguments, message):
    code, out, err = run(*batch(tmp_path / "out", repository, *arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_similar_items_are_printed_with_what_each_signal_says(run, repository, artifacts, tmp_path):
    """The rows are those of the exported files, and the table shows the titles of the artifacts."""
    similar = ["similar", 50, "--top-k", 3, "--repository", repository]
    expected = SimilarItems.load(step_artifact(repository, "retriever"))(b"50", 3)
    code, out, _ = run(*similar, "--json")
    assert code == 0
    fields = ("item_id", "score", "transitions", "titles")
    assert json.loads(out) == [dict(zip(fields, (row.item.decode(), *row[1:]), strict=True)) for row in expected]
    code, out, _ = run(*similar, "--artifacts", artifacts)
    assert code == 0
    assert "items like 50 Star Wars (1977)" in out
    assert load_data(artifacts).catalogue.title_of(expected[0].item.decode()) in out
    url = f"sqlite:///{tmp_path}/store"
    with closing(open_store(url)) as store:
        store.hide([expected[0].item])
    code, out, _ = run(*similar, "--store", url, "--json")
    assert [row["item_id"] for row in json.loads(out)][:2] == [row.item.decode() for row in expected[1:]]


@pytest.mark.thorough
def test_an_added_item_is_found_by_its_title(run, titled_repository, tmp_path):
    url = f"sqlite:///{tmp_path}/store"
    with closing(open_store(url)) as store:
        store.add_items([AddedItem(b"again", "Star Wars (1977)")])
    code, out, _ = run("similar", "again", "--repository", titled_repository, "--store", url, "--json")
    assert code == 0
    assert json.loads(out)[0]["titles"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "ITEM is 'none', which is not in the catalogue (1,682 items)"),
        (["50", "--top-k", 0], "TOP_K is 0: ask for 1 to 1,000"),
        (["50", "--repository", "none"], "does not exist or is not finished: run `llamarec export` first"),
        (["50", "--server", "127.0.0.1:9"], "no server answers at 127.0.0.1:9"),
    ],
)
def test_bad_input_for_similar_items_ends_with_one_sentence(run, repository, arguments, message):
    given = arguments if "--repository" in arguments else [*arguments, "--repository", repository]
    code, out, err = run("similar", *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
