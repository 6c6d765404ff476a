"""Events from files and from a data set's artifacts."""

import json
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.data import load_data
from preprocessing.errors import InputError
from preprocessing.sources import Layout
from stores.address import open_store
from stores.loading import Loaded, load_events
from stores.store import Event, StoreError


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/store"


def last(url, user):
    with closing(open_store(url)) as store:
        return store.last(user)


def test_a_file_is_loaded_in_the_order_of_its_times(tmp_path, url):
    """Seconds, read as such by their size, become milliseconds; loading again finds nothing new."""
    file = tmp_path / "events.csv"
    file.write_text("who,what,when\nann,50,1700000002\nbob,7,1700000000\nann,181,1700000001\n")
    layout = Layout("who", "what", "when")
    assert load_events(file, url, layout, kind="purchase") == Loaded(events=3, new=3, skipped=0)
    assert load_events(file, url, layout, kind="purchase") == Loaded(events=3, new=0, skipped=0)
    assert last(url, b"ann") == [
        Event(b"181", 1_700_000_001_000, b"purchase"),
        Event(b"50", 1_700_000_002_000, b"purchase"),
    ]


@pytest.mark.parametrize(
    ("values", "milliseconds"),
    [
        (pa.array([1_700_000_000_123], pa.int64()), 1_700_000_000_123),
        (pa.array([1_700_000_000_123_456_789], pa.int64()), 1_700_000_000_123),
        (pa.array([1_700_000_000.5], pa.float64()), 1_700_000_000_500),
        (pa.array([1_700_000_000_123], pa.timestamp("ms")), 1_700_000_000_123),
        (pa.array(["2023-11-14T22:13:20.123Z"]), 1_700_000_000_123),
        (pa.array([7], pa.int64()), 7),
    ],
)
def test_times_of_any_kind_become_milliseconds(tmp_path, url, values, milliseconds):
    """1,700,000,000 s is 2023-11-14T22:13:20 UTC. Numbers of no unit, which only order events, stay as they are."""
    pq.write_table(pa.table({"user": [5], "item": ["a"], "timestamp": values}), tmp_path / "events.parquet")
    load_events(tmp_path / "events.parquet", url)
    assert last(url, b"5") == [Event(b"a", milliseconds)]


def test_a_bad_row_is_named_or_skipped(tmp_path, url):
    file = tmp_path / "events.csv"
    file.write_text("user,item,timestamp\nann,50,1700000002\n,7,1700000000\n")
    with pytest.raises(InputError, match="line 3 has no user id"):
        load_events(file, url)
    assert load_events(file, url, skip=True) == Loaded(events=1, new=1, skipped=1)


def test_a_source_that_is_missing_or_empty_is_named(tmp_path, url):
    with pytest.raises(InputError, match="nothing does not exist"):
        load_events(tmp_path / "nothing", url)
    (tmp_path / "empty.csv").write_text("user,item,timestamp\n")
    with pytest.raises(InputError, match=r"empty\.csv has no events"):
        load_events(tmp_path / "empty.csv", url)


def test_the_events_of_a_data_set_are_its_sequences(artifacts, url):
    """MovieLens-100K has many events of the same second. Every history is in preprocessing's order, which breaks ties
    by item number, and ends with the validation and the test item; items that were filtered out are between them.
    The store takes the data set's name and refuses another's.
    """
    loaded = load_events(artifacts, url)
    assert loaded == Loaded(events=100_000, new=100_000, skipped=0)
    data = load_data(artifacts)
    vocabulary = {data.catalogue.raw(item) for item in range(1, data.catalogue.trained + 1)}
    with closing(open_store(url)) as store:
        assert store.dataset() == data.name
        for user, training, *held_out in zip(data.users, data.training, data.validation, data.test, strict=True):
            sequence = [data.catalogue.raw(int(item)) for item in np.append(training, held_out)]
            assert [event.item for event in store.last(user.encode()) if event.item in vocabulary] == sequence
    with (
        closing(open_store(url, dataset="another")) as other,
        pytest.raises(StoreError, match=json.dumps(data.name)[1:-1]),
    ):
        other.last(b"1")
