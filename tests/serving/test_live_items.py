"""What a step knows of the items that are added and hidden while it runs."""

import pytest

from serving import live_items
from serving.live_items import LiveItems
from stores.store import AddedItem, Listing, StoreError


class Store:
    """Answers with the listing that it is given, or not at all."""

    def __init__(self) -> None:
        self.now: Listing | None = Listing(0, (), frozenset())
        self.asked: list[int | None] = []

    def listing(self, known: int | None = None) -> Listing | None:
        self.asked.append(known)
        if self.now is None:
            raise StoreError("the store cannot be used")
        return None if self.now.revision == known else self.now

    def add(self, *ids: bytes) -> None:
        added = tuple(AddedItem(item, item.decode()) for item in ids)
        self.now = Listing((self.now.revision if self.now else 0) + 1, added, frozenset())


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only value is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(live_items.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def live(store, clock) -> LiveItems[list[bytes]]:
    return LiveItems([], lambda listing: [item.item for item in listing.added], store)


def test_a_change_is_known_after_half_a_second(live, store, clock):
    """In between the store is not asked, and an unchanged listing makes nothing new."""
    first = live.current()
    store.add(b"a")
    clock[0] += 0.4
    assert live.current() is first
    clock[0] += 0.1
    assert live.current() == [b"a"]
    clock[0] += 0.5
    assert live.current() is live.current()
    assert store.asked == [None, 0, 1]


def test_an_item_that_another_step_knows_is_looked_for_at_once(live, store):
    """A step that the store was changed for before this one hands over a number that is not known here yet."""
    live.current()
    store.add(b"a", b"b")
    assert live.current(added=2) == [b"a", b"b"]
    assert live.current(added=1) == [b"a", b"b"]
    assert store.asked == [None, 0]


def test_a_step_goes_on_with_what_it_has_read(live, store, clock):
    """Except for an item that it does not know; and it is up to date again when the store is back."""
    store.add(b"a")
    live.current()
    now, store.now = store.now, None
    clock[0] += 5
    assert live.current() == [b"a"]
    with pytest.raises(StoreError):
        live.current(added=2)
    store.now = now
    store.add(b"a", b"b")
    clock[0] += 0.5
    assert live.current() == [b"a", b"b"]


def test_a_step_that_has_read_nothing_does_not_answer(live, store):
    """It would return items that are hidden. It asks again at the next request."""
    store.now = None
    for _ in range(2):
        with pytest.raises(StoreError):
            live.current()
    store.add(b"a")
    assert live.current() == [b"a"]


def test_without_a_store_the_exported_files_count():
    """Nothing is made of a listing then."""
    assert LiveItems("exported", lambda listing: pytest.fail("there is no store")).current(added=3) == "exported"
