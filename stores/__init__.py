"""What changes beside the releases: the last events of users, and the items that were added and hidden.

::

    with closing(open_store("sqlite:///histories.sqlite")) as store:
        store.record([(b"ann", [Event(b"50", 1_732_791_600_000)])])
        history = [event.item for event in store.last(b"ann")]

A store is one SQLite file, or a database of Redis. The state of a user is a set of events: the last ones of all that
were ever recorded, whatever their order of arrival. The same event recorded again changes nothing, so a writer that is
not sure may always try again.
"""
