"""The admin key as a step of the server sees it."""

import pytest

from serving.admin_key import digest, is_key, known_digest

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""SHA-256 of ``abc`` (FIPS 180-2, appendix B.1)."""


def test_the_digest_is_sha256():
    assert digest(b"abc") == ABC


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LLAMAREC_ADMIN_KEY": ""}, None),
        ({"LLAMAREC_ADMIN_KEY": "", "LLAMAREC_ADMIN_KEY_SHA256": ""}, None),
        ({"LLAMAREC_ADMIN_KEY": "abc"}, ABC),
        ({"LLAMAREC_ADMIN_KEY_SHA256": ABC}, ABC),
        ({"LLAMAREC_ADMIN_KEY": "other", "LLAMAREC_ADMIN_KEY_SHA256": ABC}, ABC),
    ],
)
def test_a_step_finds_the_digest_or_makes_it_from_the_key(environment, expected):
    """`llamarec serve` sets the digest, which then counts; a plain `tritonserver` may have the key. Empty is unset."""
    assert known_digest(environment) == expected


def test_only_the_key_itself_is_the_key():
    """The digest opens nothing: whoever reads the environment of a step cannot use what is there."""
    assert is_key(b"abc", ABC)
    assert not any(is_key(given, ABC) for given in (b"", b"ab", b"abcd", b"ABC", ABC.encode()))


def test_a_key_that_is_not_ascii_is_compared_in_utf8():
    """As the client sends it."""
    key = "schlüssel"
    assert is_key(key.encode(), str(known_digest({"LLAMAREC_ADMIN_KEY": key})))
