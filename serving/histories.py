"""Chooses the history that a request is answered from: its own, or the user's in the store."""

from collections.abc import Sequence

from llamarec_client.contract import HISTORY, MAX_ID_BYTES, USER_ID
from preprocessing.errors import InputError
from preprocessing.features import is_utf8
from serving.contract import STORE_VARIABLE
from stores.store import Store


def requested_history(
    history: Sequence[bytes] | None, user: bytes | None, store: Store | None, *, titled: bool = False
) -> Sequence[bytes]:
    """Return the raw ids of a history, oldest first.

    Args:
        history: of the request; an empty one is one. It counts even if there is a user.
        user: of the request; one who is not in the store has an empty history.
        store: where histories are kept; None if the server has no store.
        titled: whether the request has titles of a history, which are one without ids too.

    Raises:
        InputError: there is no history, and no user to look up or no store to find one in.
        StoreError: the store cannot be reached.
    """
    if history is not None:
        return history
    if titled:
        return []
    if user is None:
        raise InputError(
            f"neither {HISTORY.name} nor {USER_ID.name} is given: send {HISTORY.name}, which may be empty, or the"
            f" {USER_ID.name} of somebody whose events the store has"
        )
    check_user(user)
    if store is None:
        raise InputError(
            f"{HISTORY.name} is missing and this server has no store to find {USER_ID.name} in: send {HISTORY.name}, or"
            f" start the server with `llamarec serve --store URL` or {STORE_VARIABLE}"
        )
    return [event.item for event in store.last(user)]


def check_user(user: bytes) -> None:
    """Check the id of a user.

    Raises:
        InputError: it is empty, too long or not text.
    """
    if not 1 <= len(user) <= MAX_ID_BYTES or not is_utf8(user):
        raise InputError(f"{USER_ID.name} has {len(user)} bytes: give 1 to {MAX_ID_BYTES} bytes of UTF-8")
