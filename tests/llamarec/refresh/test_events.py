"""New events from a file and from a store, and the users whose newest event neither side was trained on."""

from contextlib import closing

import pandas as pd
import pyarrow.parquet as pq
import pytest
from raw_data import LATE, LOG

from llamarec.refresh.events import SNAPSHOT, Source, append_events, new_events
from preprocessing.data import load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess
from stores.address import open_store
from stores.loading import load_events
from stores.store import AddedItem, Event, StoreError

DAY = 86_400
EARLY, NEW = LOG[~LATE], LOG[LATE]
LAST = int(LOG["timestamp"].max())
PEOPLE = [f"u{user}" for user in range(20)]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Return artifacts of the first six events of each of 20 users."""
    folder = tmp_path_factory.mktemp("earlier") / "shop"
    EARLY.to_csv(folder.parent / "shop.csv", index=False)
    preprocess(Preprocessing(dataset="table", raw=folder.parent / "shop.csv"), folder)
    return folder


def write(path, rows):
    rows.to_csv(path, index=False)
    return path


def appended(earlier, work, source):
    """Return the longer data of a candidate, and its new events."""
    work.mkdir()
    append_events(source, earlier, work)
    data = load_data(work)
    return data, new_events(source, earlier, work, data)


def sequence(rows, user):
    return rows[rows["user"] == user].sort_values("timestamp")["item"].tolist()


def test_no_judging_event_is_in_either_training(earlier, tmp_path):
    """By hand, for a file with later events of ten users, of a new user, and an old event of u10 that came late.

    The judges are those ten and the new one. The item that judges is the last of their new events; the earlier data
    does not have this event, and the candidate has it neither for training nor for validation. u10 to u19 do not
    judge: their last event is one that the serving release was made of.
    """
    some = NEW[NEW["user"].isin(PEOPLE[:10])]
    guest = EARLY[EARLY["user"] == "u3"].assign(user="guest")
    late = EARLY[EARLY["user"] == "u10"].head(1).assign(timestamp=lambda rows: rows["timestamp"] - DAY, item="i5")
    rows = pd.concat([some, guest, late])
    source = Source(events=write(tmp_path / "new.csv", rows))
    data, found = appended(earlier, tmp_path / "work", source)
    names = [data.users[user] for user in found.judged]
    assert sorted(names) == sorted([*PEOPLE[:10], "guest"])
    assert found.count == len(some) + len(guest), "the late event judges nobody"
    before = load_data(earlier)
    assert load_data(earlier).statistics.interactions == len(EARLY), "the earlier artifacts are not changed"
    for user, name in zip(found.judged, names, strict=True):
        whole = sequence(pd.concat([EARLY, rows]), name)
        assert [*data.raw_history(user), data.catalogue.raw(int(data.test[user])).decode()] == whole
        if name in before.users:
            old = before.users.index(name)
            seen = [*before.raw_history(old), before.catalogue.raw(int(before.test[old])).decode()]
            assert whole[:6] == seen
            assert len(whole) == 12


def test_a_repeated_call_appends_once(earlier, tmp_path):
    """The second call finds the events in the data, even if their file is gone by now. Titles need not be repeated."""
    source = Source(events=write(tmp_path / "new.csv", NEW.assign(title=None)))
    data, found = appended(earlier, tmp_path / "work", source)
    source.events.unlink()
    append_events(source, earlier, tmp_path / "work")
    again = load_data(tmp_path / "work")
    assert again.fingerprint == data.fingerprint
    assert again.statistics.interactions == len(LOG)
    assert len(found.judged) == 20


def test_events_of_nobody_and_nothing_known_are_refused(earlier, tmp_path):
    """Other users and other items, with titles: another data set. A known item alone, or a known user, is enough."""
    other = NEW.assign(user="x" + NEW["user"], item="y" + NEW["item"])
    source = Source(events=write(tmp_path / "other.csv", other))
    with pytest.raises(InputError, match=r"events of .*other.csv are not of data set shop: .*none of their 12 items"):
        appended(earlier, tmp_path / "work", source)
    known = Source(events=write(tmp_path / "known.csv", NEW.assign(user="x" + NEW["user"])))
    assert len(appended(earlier, tmp_path / "known", known)[1].judged) == 20


def test_the_events_of_a_store_that_the_data_lacks(earlier, tmp_path):
    """The store has the events of the data, those of the late log in milliseconds, and an added item that ten saw.

    Only what is new is appended, so nobody has an event twice. The title of the added item comes from the store.
    """
    url = f"sqlite:///{tmp_path}/histories.sqlite"
    load_events(earlier, url)
    load_events(write(tmp_path / "late.csv", NEW.assign(timestamp=NEW["timestamp"] * 1000 + 7)), url)
    with closing(open_store(url)) as store:
        store.add_items([AddedItem(b"new", "A Thing that is new")])
        for user in PEOPLE[:10]:
            store.record(
                [(user.encode(), [Event(b"new", (LAST + DAY) * 1000), Event(b"new", (LAST + DAY) * 1000, b"buy")])]
            )
    data, found = appended(earlier, tmp_path / "work", Source(store=url))
    assert found.count == len(NEW) + 10, "an item seen and bought at once is one event"
    assert data.statistics.interactions == len(LOG) + 10
    assert pq.read_metadata(tmp_path / "work" / SNAPSHOT).num_rows == len(NEW) + 10
    assert sorted(data.users[user] for user in found.judged) == sorted(PEOPLE)
    for name in PEOPLE:
        user = data.users.index(name)
        whole = [*data.raw_history(user), data.catalogue.raw(int(data.test[user])).decode()]
        assert whole == sequence(LOG, name) + (["new"] if name in PEOPLE[:10] else [])
    assert data.catalogue.title_of("new") == "A Thing that is new"


def test_a_store_without_news_or_of_another_data_set(earlier, tmp_path):
    """Each sentence names the store, without its password."""
    url = f"sqlite:///{tmp_path}/same.sqlite"
    load_events(earlier, url)
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError, match=r"same.sqlite has no events that .* does not have"):
        append_events(Source(store=url), earlier, tmp_path / "work")
    other = f"sqlite:///{tmp_path}/other.sqlite"
    with closing(open_store(other, dataset="films")) as store:
        store.record([(b"u0", [Event(b"i1", 5)])])
    with pytest.raises(InputError, match=r"other.sqlite has the events of data set 'films', not of 'shop'"):
        append_events(Source(store=other), earlier, tmp_path / "work")
    with pytest.raises(StoreError, match=r"redis://127.0.0.1:9 cannot be used"):
        append_events(Source(store="redis://me:secret@127.0.0.1:9"), earlier, tmp_path / "work")
    assert Source(store="redis://me:secret@127.0.0.1:9/0").fingerprint() == "redis://127.0.0.1:9/0"


def test_a_refresh_needs_events():
    with pytest.raises(InputError, match="there are no new events: give a file with --events"):
        Source()
