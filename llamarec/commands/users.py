"""`llamarec users`: shows, merges and deletes histories in the store."""

from contextlib import closing
from datetime import datetime, timezone
from typing import Annotated

import typer

from llamarec.options import Json, Store, encode_id
from llamarec.tables import console, print_json, print_row, print_table

users = typer.Typer(help="Histories of users, in the store.", no_args_is_help=True)
User = Annotated[str, typer.Argument(help="User id.")]


@users.command()
def show(user: User, store: Store, as_json: Json = False) -> None:
    """Print the events of a user, oldest first."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        events = opened.last(_encoded(user))
    rows = [[_shown(event.time), event.item.decode(), event.kind.decode()] for event in events]
    columns = ["time", "item", "kind"]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(f"{len(rows):,} events of {user}", columns, rows)


@users.command()
def forget(user: User, store: Store, as_json: Json = False) -> None:
    """Delete all events of a user from the store. Trained models and exported files keep what they learned."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        print_row("forgotten", {"user": user, "events": opened.forget(_encoded(user))}, as_json)


@users.command()
def merge(
    old: Annotated[str, typer.Argument(help="User id whose events are moved, for example an anonymous one.")],
    new: Annotated[str, typer.Argument(help="User id that gets them.")],
    store: Store,
    as_json: Json = False,
) -> None:
    """Give the events of one user to another, as when an anonymous user logs in; the first has none afterwards."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        new_events = opened.merge(_encoded(old), _encoded(new))
    print_row("merged", {"from": old, "to": new, "new events": new_events}, as_json)


@users.command()
def migrate(store: Store, as_json: Json = False) -> None:
    """Bring a store that an older version of llamarec wrote to this version. The histories stay as they are."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        before, after = opened.migrate()
    if as_json:
        print_json({"from": before, "to": after})
    elif before == after:
        console.print(f"the store has version {after} already: there is nothing to do", highlight=False, soft_wrap=True)
    else:
        console.print(f"migrated from version {before} to {after}", highlight=False, soft_wrap=True)


def _encoded(user: str) -> bytes:
    """Return a user id as the store keeps it.

    Raises:
        InputError: it is not one.
    """
    from serving.histories import check_user

    encoded = encode_id("user id", user)
    check_user(encoded)
    return encoded


def _shown(milliseconds: int) -> str:
    """Return a time in ISO 8601; one after the year 9999 as a number."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="milliseconds")
    except ValueError:
        return str(milliseconds)
