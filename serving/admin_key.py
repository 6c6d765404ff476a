"""The admin key of a server: who may know it, and how a step checks it.

`llamarec serve` protects Triton's own admin APIs with the key, which must not be in the environment of the steps. So it
hands them only the key's SHA-256, with which a step can recognise the key. A plain `tritonserver` has the key itself in
its environment, if the operator set it there.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping

KEY_VARIABLE = "LLAMAREC_ADMIN_KEY"
"""Environment variable with the key. Without it, `llamarec serve` makes a random key."""
DIGEST_VARIABLE = "LLAMAREC_ADMIN_KEY_SHA256"
"""Environment variable with the key's SHA-256 in hexadecimal, which `llamarec serve` sets for its server."""


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def known_digest(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the digest of the server's key, from the environment of one of its steps; None if there is no key."""
    if given := environment.get(DIGEST_VARIABLE):
        return given
    key = environment.get(KEY_VARIABLE)
    return digest(os.fsencode(key)) if key else None


def is_key(given: bytes, expected: str) -> bool:
    """Return whether a key has a digest, in a time that tells nothing about the key."""
    return hmac.compare_digest(digest(given), expected)
