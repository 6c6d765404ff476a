"""The catalogue of raw ids, numbers and titles, read back from its file."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.catalogue import ITEMS_FILE, Catalogue


@pytest.fixture
def catalogue(tmp_path):
    Catalogue([b"50", b"caf\xc3\xa9", b"7"], ["Star Wars (1977)", "Café", "Fell away"], [9, 4]).write(
        tmp_path / ITEMS_FILE
    )
    return Catalogue.load(tmp_path / ITEMS_FILE)


def test_what_is_written_reads_back(catalogue):
    """Numbers start at 1 in the given order; the last item has a title and no embedding."""
    assert len(catalogue) == 3
    assert catalogue.trained == 2
    assert [catalogue.number(raw) for raw in (b"50", "café".encode(), b"7")] == [1, 2, 3]
    assert [catalogue.raw(item) for item in (1, 2, 3)] == [b"50", "café".encode(), b"7"]
    assert [catalogue.title(item) for item in (1, 2, 3)] == ["Star Wars (1977)", "Café", "Fell away"]


def test_ids_are_compared_exactly(catalogue):
    """Ids are neither trimmed nor parsed as numbers: an id is exactly the text of the raw file."""
    assert catalogue.number(b"050") is None
    assert catalogue.number(b" 50") is None
    assert catalogue.number(b"\xff") is None


def test_other_readers_find_the_documented_columns(tmp_path, catalogue):
    """The columns are those of the README, read with pyarrow alone."""
    table = pq.read_table(tmp_path / ITEMS_FILE)
    assert {field.name: str(field.type) for field in table.schema} == {
        "item": "int32",
        "raw": "string",
        "title": "string",
        "training_count": "int64",
    }
    assert table["item"].to_pylist() == [1, 2, 3]
    assert table["training_count"].to_pylist() == [9, 4, None]


@given(ids=st.lists(st.text(min_size=1), unique=True, min_size=1))
def test_number_and_raw_id_are_inverse(ids):
    """raw(number(x)) = x for every id."""
    catalogue = Catalogue([raw.encode() for raw in ids], ids, [1] * len(ids))
    for raw in ids:
        item = catalogue.number(raw.encode())
        assert item is not None
        assert catalogue.raw(item) == raw.encode()


def test_it_needs_no_pandas():
    """The Triton steps load this module, so it may import only the standard library, NumPy and pyarrow."""
    imports = []
    for name in ("catalogue.py", "groups.py"):
        lines = (Path(__file__).resolve().parents[2] / "preprocessing" / name).read_text().splitlines()
        imports += [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    arrow = {"pyarrow", "pyarrow.parquet", "numpy", "numpy.typing"}
    assert set(imports) == {*arrow, "collections.abc", "dataclasses", "functools", "pathlib", "preprocessing.groups"}


def test_added_items_are_numbered_after_the_catalogues(catalogue):
    """An id that the catalogue knows keeps its number and title; its further number stands for no title."""
    whole = catalogue.with_added([(b"new", "New"), (b"50", "Another title"), (b"newer", "Newer")])
    assert (len(whole), whole.trained, whole.counts) == (6, 2, [9, 4])
    assert [whole.number(raw) for raw in (b"50", b"7", b"new", b"newer", b"unknown")] == [1, 3, 4, 6, None]
    assert (whole.raw(6), whole.title(6), whole.title_of("50")) == (b"newer", "Newer", "Star Wars (1977)")
    assert whole.titles_after(len(catalogue)) == ["New", None, "Newer"]
    assert (len(catalogue), catalogue.number(b"new")) == (3, None), "the exported catalogue is as it was"
