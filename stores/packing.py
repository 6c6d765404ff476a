"""Packs a user's history into bytes: about eight for each event.

An event is three numbers: the milliseconds since the event before it, and those of its item and its kind in a table of
names. Each number takes seven bits of a byte, and the eighth bit says whether more follow (LEB128, as in protobuf).
"""

from collections.abc import Iterable

Numbers = tuple[int, int, int]
"""Time in milliseconds, number of the item, number of the kind."""


def pack(history: Iterable[Numbers]) -> bytes:
    """Return events as bytes; their times must not decrease."""
    packed, before = bytearray(), 0
    for time, item, kind in history:
        for number in (time - before, item, kind):
            while number > 127:
                packed.append(number & 127 | 128)
                number >>= 7  # noqa: PLW2901 - the rest of it
            packed.append(number)
        before = time
    return bytes(packed)


def unpack(packed: bytes) -> list[Numbers]:
    """Return the events in bytes that :func:`pack` made."""
    numbers, number, shift = [], 0, 0
    for byte in packed:
        if byte > 127:
            number |= (byte & 127) << shift
            shift += 7
        else:
            numbers.append(number | byte << shift)
            number = shift = 0
    history, time = [], 0
    for place in range(0, len(numbers), 3):
        time += numbers[place]
        history.append((time, numbers[place + 1], numbers[place + 2]))
    return history
