"""Histories as bytes."""

from hypothesis import given
from hypothesis import strategies as st

from stores.packing import pack, unpack


def test_bytes_worked_out_by_hand():
    """LEB128 of 300 is AC 02 (the example of protobuf's documentation); the second time is 1 later."""
    assert pack([(300, 1, 2), (301, 300, 0)]) == bytes([0xAC, 2, 1, 2, 1, 0xAC, 2, 0])


@given(st.lists(st.tuples(st.integers(0, 2**48 - 1), st.integers(0, 2**62), st.integers(0, 2**62))).map(sorted))
def test_what_is_packed_comes_back(history):
    assert unpack(pack(history)) == history
