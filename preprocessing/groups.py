"""Groups of items, such as genres or brands: at most one for each item, for the rules of a policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Groups:
    """The group of each item of a catalogue."""

    names: tuple[str, ...]
    """Names of all groups, in alphabetical order; empty if the items have none."""
    codes: NDArray[np.int32]
    """For each item number the place of its group in ``names``, -1 for none [items + 1]; empty without names."""

    @classmethod
    def of(cls, values: Sequence[str | None]) -> "Groups":
        """Return the groups of items in the order of their numbers, of which some may have none."""
        names = tuple(sorted({value for value in values if value is not None}))
        if not names:
            return cls((), np.empty(0, np.int32))
        places: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        return cls(names, np.array([-1, *(places.get(value, -1) for value in values)], np.int32))

    def with_ungrouped(self, items: int) -> "Groups":
        """Return the groups of a catalogue that is longer by this number of items, which have none."""
        if not self.names:
            return self
        return Groups(self.names, np.concatenate((self.codes, np.full(items, -1, np.int32))))

    def values(self) -> list[str | None]:
        """Return the name of each item's group in the order of the item numbers; empty if there are no groups."""
        return [None if code < 0 else self.names[code] for code in self.codes[1:].tolist()]

    def codes_of(self, names: Sequence[str]) -> NDArray[np.int32]:
        """Return the codes of groups by name; a name that is no group has none."""
        return np.array([self._places[name] for name in names if name in self._places], np.int32)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}
