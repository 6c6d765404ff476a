"""Chooses the users whose requests go to a canary release: stable per user, and without a list of users."""

import hashlib
import re
from numbers import Real
from reprlib import repr as short

from llamarec_client.errors import InvalidRequest

CANARY = "canary"
"""Suffix of the aliases ``llamarec_canary`` and ``llamarec_retrieval_canary``, which serve the release under trial."""
SALT = "llamarec"
"""Salt of the hash that chooses users; another salt chooses other users for the next trial."""


def parse_share(text: str) -> float:
    """Return ``5%`` or ``0.05`` as a share from 0 to 1.

    Raises:
        InvalidRequest: ``text`` is neither a percentage nor a share.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise InvalidRequest(f"--canary {text!r} is not a share of the users: give a percentage such as 5%")
    return share


def canary_model(model: str, user_id: str | None, share: float, salt: str = SALT) -> str:
    """Return the model for a user: ``model``, or its canary for ``share`` of the users.

    A user who gets the canary keeps it while the share grows. Requests without a user id never go to the canary.

    Args:
        model: ``llamarec`` or ``llamarec_retrieval``.
        user_id: any text.
        share: 0 to 1.
        salt: see :data:`SALT`.

    Raises:
        InvalidRequest: ``share`` is not a number from 0 to 1.
    """
    if not isinstance(share, Real) or not 0 <= share <= 1:
        raise InvalidRequest(f"the canary's share is {short(share)}: give a number from 0 to 1")
    if user_id is None:
        return model
    digest = hashlib.sha256(f"{salt}\0{user_id}".encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform on [0, 1)
    return f"{model}_{CANARY}" if place < share else model
