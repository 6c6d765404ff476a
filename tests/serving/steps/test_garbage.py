"""Python's garbage: never collected while a request is answered, and not kept for ever either."""

import gc
import threading
import weakref

import pytest

from serving.steps import garbage
from serving.steps.garbage import GarbageCollector


class Node:
    """Part of a cycle, which only a collection frees."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def collector(monkeypatch):
    """Yield a collector that looks often, and leave Python's own collection as it was."""
    monkeypatch.setattr(garbage, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(garbage, "LEAST_OBJECTS", 0)
    collector = GarbageCollector()
    yield collector
    collector.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_was_loaded_is_set_aside_and_nothing_is_collected_by_itself(collector):
    """CPython's own counts: the objects that live at the start are frozen, and the automatic collection is off."""
    assert gc.get_freeze_count() > 10_000
    assert not gc.isenabled()


def test_a_cycle_is_freed_between_requests_and_not_during_one(collector):
    """A cycle that a request leaves lives on while the next one is answered, and goes once none is."""
    node = Node()
    gone = threading.Event()
    weakref.finalize(node, gone.set)
    with collector.held_off():
        del node
        assert not gone.wait(0.1)
    assert gone.wait(5)
