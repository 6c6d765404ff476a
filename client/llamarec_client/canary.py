"""Which users a canary release answers: a choice of the client, stable for each user and without a list of them."""

import hashlib
import re

from llamarec_client.errors import InvalidRequest

CANARY = "canary"
"""The aliases ``llamarec_canary`` and ``llamarec_retrieval_canary`` are the release under trial."""
SALT = "llamarec"
"""Another salt draws other users for the next trial."""


def parse_share(text: str) -> float:
    """``5%`` or ``0.05`` as a share from 0 to 1.

    Raises:
        InvalidRequest: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise InvalidRequest(f"--canary {text!r} is no share of the users: give a percentage such as 5%")
    return share


def canary_model(model: str, user_id: str | None, share: float, salt: str = SALT) -> str:
    """The model to ask for a user: ``model``, or its canary for ``share`` of the users.

    A user stays with the canary while the share grows. Requests without a user are never part of a trial.

    Args:
        model: ``llamarec`` or ``llamarec_retrieval``.
        user_id: any text.
        share: 0 to 1.
        salt: see :data:`SALT`.
    """
    if user_id is None:
        return model
    digest = hashlib.sha256(f"{salt}\0{user_id}".encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform on [0, 1)
    return f"{model}_{CANARY}" if place < share else model
