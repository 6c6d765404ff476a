"""Addresses of stores: what they mean, and the sentence for those that mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.errors import InputError
from stores.address import open_store


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///histories.sqlite", Path("histories.sqlite")),
        ("sqlite:////var/lib/histories", Path("/var/lib/histories")),
        ("sqlite:///with%20space?keep=5", Path("with space")),
    ],
)
def test_a_path_is_relative_or_absolute(url, path):
    """As in SQLAlchemy's addresses: three slashes and a path, which may begin with a fourth."""
    assert open_store(url)._path == path


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("histories.sqlite", "'histories.sqlite' is not the address of a store: give sqlite:///FILE"),
        ("sqlite://histories", "names no file"),
        ("sqlite:///", "names no file"),
        ("redis://", "is not the address of a store"),
        ("redis://host/name", "'name' in the store's address is no number of a database"),
        ("sqlite:///x?keep=0", "keep='0' in the store's address: give a number of events from 1 to 10,000"),
        ("sqlite:///x?keep=many", "keep='many'"),
        ("sqlite:///x?timeout=1", "timeout in the store's address: only keep=N can be given"),
        ("http://user:secret@host", "'http://...' is not the address of a store"),
    ],
)
def test_an_address_without_a_meaning_is_named(url, message):
    with pytest.raises(InputError) as refused:
        open_store(url)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_stores_are_light():
    """They run in the `features` step: neither torch nor NumPy nor Arrow is imported, nor redis-py for a file."""
    program = (
        "import sys; from stores.address import open_store; open_store('sqlite:///x');"
        "heavy = {'torch', 'numpy', 'pyarrow', 'redis'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
