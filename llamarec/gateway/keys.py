"""The API keys of a gateway, of which it keeps only the SHA-256."""

import hmac
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from preprocessing.errors import InputError
from serving.admin_key import digest

KEYS_VARIABLE = "LLAMAREC_GATEWAY_KEYS"
"""Environment variable with the keys themselves, separated by commas or white space."""
SHORTEST_KEY = 16
"""Characters. A shorter key can be guessed."""


class ApiKeys:
    """Recognises the keys of callers.

    Args:
        digests: SHA-256 of each key, in hexadecimal. Without any, every caller is accepted.
    """

    def __init__(self, digests: Iterable[str] = ()) -> None:
        self._digests = sorted({each.lower() for each in digests})

    def __bool__(self) -> bool:
        """Return whether callers need a key."""
        return bool(self._digests)

    def accepts(self, authorization: bytes) -> bool:
        """Return whether the value of an ``Authorization`` header has one of the keys.

        The comparison takes the same time whichever key it is, and says nothing about keys that are nearly right.
        """
        scheme, _, key = authorization.partition(b" ")
        given = digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return not self._digests or (scheme.lower() == b"bearer" and any(matches))


def read_keys(path: Path | None, environment: MutableMapping[str, str] = os.environ) -> ApiKeys:
    """Return the keys of a file and of ``LLAMAREC_GATEWAY_KEYS``, which is removed from the environment.

    Each line of the file begins with the SHA-256 of a key, in hexadecimal, as `sha256sum` prints it. What follows is a
    remark. Empty lines and lines that begin with ``#`` are skipped.

    Raises:
        InputError: the file cannot be read, has no keys or a line without a digest, or a key in the environment is too
            short. No message shows a key.
    """
    given = re.split(r"[,\s]+", environment.pop(KEYS_VARIABLE, "").strip(", \t\r\n"))
    keys = [key for key in given if key]
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise InputError(f"a key in {KEYS_VARIABLE} has fewer than {SHORTEST_KEY} characters: make longer ones")
    digests = [digest(os.fsencode(key)) for key in keys]
    return ApiKeys([*digests, *(_read_digests(path) if path else ())])


def _read_digests(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-keys {path} cannot be read ({type(error).__name__}): name a text file") from None
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not re.fullmatch("[0-9a-fA-F]{64}", words[0]):
            raise InputError(
                f"line {number} of {path} does not begin with a SHA-256 in hexadecimal: write the output of"
                " `printf %s KEY | sha256sum`, not the key"
            )
        found.append(words[0])
    if not found:
        raise InputError(f"{path} has no keys: add a line with the output of `printf %s KEY | sha256sum`")
    return found
