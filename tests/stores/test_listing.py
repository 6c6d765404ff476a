"""Added and hidden items in every kind of store, compared with a list and a set."""

import itertools
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stores.address import open_store
from stores.store import AddedItem, Event, Listing, StoreError


class Model:
    """The definition: titles in the order in which their items came first, and the hidden ids."""

    def __init__(self, added: dict[bytes, str], hidden: set[bytes]) -> None:
        self.added, self.hidden = added, hidden

    def add_items(self, items):
        before = dict(self.added)
        for item, title in items:
            self.added[item] = title  # a dictionary keeps the place of a key that it has
        return sum(before.get(item) != title for item, title in self.added.items())

    def hide(self, items):
        before = len(self.hidden)
        self.hidden |= set(items)
        return len(self.hidden) - before

    def show(self, items):
        before = len(self.hidden)
        self.hidden -= set(items)
        return before - len(self.hidden)


ids = st.sampled_from([b"1", b"2", b"10", b"", b"a\0", b"a\0b", "\u00fc".encode()]) | st.binary(max_size=600)
titles = st.sampled_from(["Film", "film", "Film\0", "\u00e9", ""]) | st.text(st.characters(codec="utf-8"), max_size=50)
operations = st.one_of(
    st.tuples(st.just("add_items"), st.lists(st.builds(AddedItem, ids, titles), max_size=6)),
    st.tuples(st.sampled_from(["hide", "show"]), st.lists(ids, max_size=6)),
)


def test_any_sequence_of_calls_is_that_of_the_definition(opened):
    """Two connections to one store take turns. After every call both have the model's listing, and its revision is one
    that no earlier listing had if and only if something changed; with the revision that is known, the listing is None.
    """
    first, second = opened(), opened()
    revisions = {0}

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(operations, max_size=10))
    def run(calls):
        before = first.listing()
        model = Model(dict(before.added), set(before.hidden))  # an example goes on where the one before it ended
        for store, (name, items) in zip(itertools.cycle([first, second]), calls, strict=False):
            changed = getattr(model, name)(items)
            assert getattr(store, name)(items) == changed
            if changed:
                assert first.listing().revision not in revisions
            revisions.add(first.listing().revision)
            expected = tuple(map(AddedItem._make, model.added.items())), frozenset(model.hidden)
            for reader in (first, second):
                listing = reader.listing(before.revision if changed else None)
                assert (listing.added, listing.hidden) == expected
                assert changed or listing.revision == before.revision
                assert reader.listing(listing.revision) is None
            before = listing

    run()


def test_a_store_that_was_never_written_lists_nothing(opened):
    """Its revision is 0. Histories are no part of the listing."""
    store = opened()
    assert store.listing() == Listing(0, (), frozenset())
    store.record([(b"ann", [Event(b"50", 1)])])
    assert store.listing(0) is None


def test_places_never_change(opened):
    """An item that is added again, with another title or hidden in between, keeps the place that it had first."""
    store = opened()
    store.add_items([AddedItem(b"b", "B"), AddedItem(b"a", "A"), AddedItem(b"b", "B again")])
    store.hide([b"b"])
    store.add_items([AddedItem(b"c", "C"), AddedItem(b"a", "A, longer"), AddedItem(b"b", "B at last")])
    store.show([b"b"])
    assert [(item, title) for item, title in store.listing().added] == [
        (b"b", "B at last"),
        (b"a", "A, longer"),
        (b"c", "C"),
    ]


def test_the_same_again_is_no_change(opened):
    """A writer that is not sure may try again: nothing is counted, and no server reads the listing anew."""
    store = opened()
    assert store.add_items([AddedItem(b"1", "One"), AddedItem(b"2", "Two")]) == 2
    assert store.hide([b"1", b"nobody knows it", b"1"]) == 2
    revision = store.listing().revision
    assert store.add_items([AddedItem(b"1", "Uno"), AddedItem(b"2", "Two"), AddedItem(b"1", "One")]) == 0
    assert store.hide([b"1"]) == store.show([b"2"]) == store.add_items([]) == store.hide([]) == 0
    assert store.listing(revision) is None


def test_what_one_adds_another_sees(opened):
    """The second store has the listing of before; what changed since is there at its next look."""
    writer, reader = opened(), opened()
    known = reader.listing()
    writer.add_items([AddedItem(b"new", "New")])
    added = reader.listing(known.revision)
    assert added.added == (AddedItem(b"new", "New"),)
    writer.hide([b"new"])
    hidden = reader.listing(added.revision)
    assert (hidden.added, hidden.hidden) == (added.added, {b"new"})
    assert reader.listing(hidden.revision) is None


def test_items_of_another_data_set_are_refused(opened):
    """Nothing of them is kept."""
    opened(dataset="movielens-100k").add_items([AddedItem(b"50", "Film")])
    other = opened(dataset="beauty")
    for write in (lambda: other.add_items([AddedItem(b"60", "Soap")]), lambda: other.hide([b"50"])):
        with pytest.raises(StoreError, match="of data set 'movielens-100k', not of 'beauty'"):
            write()
    listing = opened().listing()
    assert (listing.added, listing.hidden) == ((AddedItem(b"50", "Film"),), frozenset())


STEP = 40
"""Number of items that the writer adds, and hides, in one call."""
WRITER = """
import sys
from stores.address import open_store
from stores.store import AddedItem
store, first, step = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for call in range(first, 10**6):
    ids = [b"%d-%d" % (call, number) for number in range(step)]
    assert store.add_items([AddedItem(item, "Title") for item in ids]) == step
    print(2 * call, flush=True)
    assert store.hide(ids) == step
    print(2 * call + 1, flush=True)
"""


def test_a_listing_is_whole_whenever_its_writer_is_killed(opened, store_url):
    """The writer is killed (SIGKILL) at any moment, four times. Every call that it had acknowledged is there, and at
    most one more; of none there is a part.
    """
    store, chance, first = opened(), random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, store_url, str(first), str(STEP)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == f"{2 * first}\n"
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].split("\n")[:-1]
        calls = 1 + (int(lines[-1]) if lines else 2 * first)
        listing = store.listing()
        found = len(listing.added) // STEP + len(listing.hidden) // STEP
        assert found in (calls, calls + 1)
        expected = [b"%d-%d" % (call, number) for call in range((found + 1) // 2) for number in range(STEP)]
        assert [item for item, _ in listing.added] == expected
        assert listing.hidden == set(expected[: found // 2 * STEP])
        first = (found + 1) // 2
        store.hide([item for item, _ in listing.added])  # what the killed one could not do any more
    assert first > 4


def test_a_revision_that_is_known_stays_unknown_to_a_lost_store(opened, store_url, request):
    """A store is lost, and gets as many changes as before but others: a server that still has the old revision reads
    the new items. The revision would otherwise be 1 both times.
    """
    store = opened()
    store.add_items([AddedItem(b"1", "Before")])
    known = store.listing().revision
    store.close()
    if store_url.startswith("sqlite"):
        for file in list(open_store(store_url)._path.parent.iterdir()):
            file.unlink()
    else:
        request.getfixturevalue("redis_server").flush()
    time.sleep(0.005)  # revisions are times in milliseconds
    with closing(open_store(store_url)) as other:
        other.add_items([AddedItem(b"1", "After")])
        assert other.listing(known).added == (AddedItem(b"1", "After"),)
