"""Items that were added to a store, in the next data set: their titles, and what they make anew."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from preprocessing.artifacts import read_manifest
from preprocessing.data import KIND, load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import AddedTitles, Preprocessing, preprocess, read_report
from preprocessing.report import sentences


def write_log(path, rows, titled):
    """Write a `table` in which the items in `titled` have a title, and return its options."""
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    titles = [f"Film {item}" if item in titled else None for item in frame["item"]]
    frame.assign(title=titles).to_parquet(path)
    return Preprocessing(dataset="table", raw=path, minimum=3)


ROWS = [(user, item, place) for user in "abc" for place, item in enumerate("123n")]
"""Three users who all have the items 1, 2, 3 and n."""


def items(folder):
    """Return the titles of the trained items, and those of the others."""
    catalogue = load_data(folder).catalogue
    found = [(catalogue.raw(item).decode(), catalogue.title(item)) for item in range(1, len(catalogue) + 1)]
    return dict(found[: catalogue.trained]), dict(found[catalogue.trained :])


def test_an_added_item_is_in_the_catalogue_with_its_title(tmp_path):
    """With events it is trained; without it only has a title. An item with a title in the raw files keeps that one."""
    options = write_log(tmp_path / "log.parquet", ROWS, "123")
    preprocess(options, tmp_path)
    assert items(tmp_path) == ({"1": "Film 1", "2": "Film 2", "3": "Film 3"}, {})
    added = AddedTitles({"n": "New", "later": "Later", "1": "Another"}, "log")
    statistics = preprocess(options, tmp_path, added)
    assert items(tmp_path) == ({"1": "Film 1", "2": "Film 2", "3": "Film 3", "n": "New"}, {"later": "Later"})
    assert statistics.interactions == 12
    assert "  2 of them from the store of added items" in sentences(read_report(tmp_path))


def test_the_stage_is_made_anew_when_the_added_items_changed(tmp_path):
    """Neither the same items again, in another order, nor a store without any are a change; a new title is."""
    options = write_log(tmp_path / "log.parquet", ROWS, "123")
    folder = tmp_path / "data"
    inode = None
    for added, anew in (
        (None, True),
        (AddedTitles({}), False),
        (AddedTitles({"n": "New", "m": "M"}), True),
        (AddedTitles({"m": "M", "n": "New"}), False),
        (AddedTitles({"m": "M", "n": "Newer"}), True),
        (None, True),
    ):
        preprocess(options, tmp_path, added)
        assert (folder.stat().st_ino != inode) == anew
        assert ("added items" in read_manifest(folder, KIND, "").inputs) == bool(added and added.titles)
        inode = folder.stat().st_ino


def test_items_of_another_data_set_are_refused(tmp_path):
    """The same id is another item there. What was made before stays."""
    options = write_log(tmp_path / "log.parquet", ROWS, "123")
    preprocess(options, tmp_path)
    with pytest.raises(InputError, match="added items are of data set 'beauty', not of 'log': name another store"):
        preprocess(options, tmp_path, AddedTitles({"n": "New"}, "beauty"))
    assert items(tmp_path)[0].keys() == {*"123"}


@pytest.mark.parametrize("new", ["01", "B1", "-0", "99999999999999999999"])
def test_numbers_of_the_raw_files_and_other_ids_stay_apart(tmp_path, new):
    """The raw ids are integers in Parquet. "01" is not item 1: ids are compared as they are written."""
    rows = [(user, item, item) for user in range(3) for item in (1, 2, 3)]
    options = write_log(tmp_path / "log.parquet", rows, {1, 2, 3})
    for added in ({"4": "Four"}, {"4": "Four", new: "New"}):
        preprocess(options, tmp_path, AddedTitles(added))
        assert items(tmp_path) == ({"1": "Film 1", "2": "Film 2", "3": "Film 3"}, added)


def test_added_items_stay_in_an_append(tmp_path):
    """A batch is appended without a store, then again with one that has a new title: its events count only once."""
    preprocess(write_log(tmp_path / "log.parquet", ROWS, "123"), tmp_path, AddedTitles({"n": "New", "m": "M"}))
    batch = replace(write_log(tmp_path / "batch.parquet", [("d", item, 1) for item in "123n"], ""), append=True)
    assert preprocess(batch, tmp_path).interactions == 16
    assert items(tmp_path) == ({"1": "Film 1", "2": "Film 2", "3": "Film 3", "n": "New"}, {"m": "M"})
    added = AddedTitles({"n": "Newer", "l": "L"}, "log")
    for _ in range(2):
        assert preprocess(batch, tmp_path, added).interactions == 16
        trained, others = items(tmp_path)
        assert (trained["n"], others) == ("Newer", {"m": "M", "l": "L"})
    inode = (tmp_path / "data").stat().st_ino
    preprocess(batch, tmp_path)
    assert (tmp_path / "data").stat().st_ino == inode


def test_a_title_of_a_later_batch_takes_the_place_of_an_added_one(tmp_path):
    """As if all raw files had been there from the start, although "Added" would be the first in alphabetical order."""
    preprocess(write_log(tmp_path / "log.parquet", ROWS, "123"), tmp_path, AddedTitles({"n": "Added"}))
    batch = write_log(tmp_path / "batch.parquet", [("d", item, 1) for item in "123n"], "n")
    preprocess(replace(batch, append=True), tmp_path)
    assert items(tmp_path)[0]["n"] == "Film n"


@pytest.mark.parametrize("seed", range(3))
def test_appended_batches_with_added_items_equal_a_full_run(tmp_path, seed):
    """Three batches in which half of the titles are missing, each with a longer list of added items: the same items,
    titles, counts and sequences as one run with all rows and the last list.
    """
    random = np.random.default_rng(seed)
    numbers = random.permutation(14)
    titled, others = set(numbers[:7].tolist()), numbers[7:]
    rows = [
        (user, int(item), int(random.integers(0, 9))) for user in range(30) for item in random.integers(0, 14, size=7)
    ]
    for place in range(3):
        options = write_log(tmp_path / f"log-{place}.parquet", rows[place * 70 : place * 70 + 70], titled)
        added = AddedTitles({str(item): f"Added {item}" for item in others[: 2 * place + 1]})
        preprocess(replace(options, append=place > 0), tmp_path / "grown", added)
    preprocess(write_log(tmp_path / "log.parquet", rows, titled), tmp_path / "whole", added)
    grown, whole = (load_data(tmp_path / name) for name in ("grown", "whole"))
    described = []
    for data in (grown, whole):
        raw = data.catalogue.raw
        sequences = [
            [raw(int(item)) for item in (*training, validation, test)]
            for training, validation, test in zip(data.training, data.validation, data.test, strict=True)
        ]
        counts = {raw(item): data.catalogue.counts[item - 1] for item in range(1, data.catalogue.trained + 1)}
        titles = {raw(item): data.catalogue.title(item) for item in range(1, len(data.catalogue) + 1)}
        described.append((data.users, sequences, counts, titles))
    assert described[0] == described[1]
    assert len(titled) < grown.catalogue.trained
