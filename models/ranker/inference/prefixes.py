"""Keeps what a ranker computed of a prompt's beginning, so that a user's next request need not compute it again."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prefix:
    """The keys and values of the tokens that all independent lines continue: instruction and history."""

    layers: Sequence[tuple[Any, Any]]
    """Keys and values of each layer [key heads, prefix, width], as arrays of the runtime."""

    @property
    def nbytes(self) -> int:
        """Memory that the keys and values take, in bytes."""
        return sum(int(array.nbytes) for pair in self.layers for array in pair)


class PrefixCache:
    """The prefixes used last, by their tokens.

    Args:
        limit: maximum memory of all of them in bytes; 0 keeps none.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._bytes = 0

    def get(self, tokens: Sequence[int], compute: Callable[[Sequence[int]], Prefix]) -> Prefix:
        """Return the prefix of these tokens, computed if it is not kept."""
        key = tuple(tokens)
        found = self._kept.get(key)
        if found is None:
            found = compute(tokens)
            self._keep(key, found)
        else:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: tuple[int, ...], prefix: Prefix) -> None:
        if prefix.nbytes > self._limit:
            return
        self._kept[key] = prefix
        self._bytes += prefix.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
