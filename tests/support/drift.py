"""A shop whose customers change their habits: two eras in which different articles follow each other.

Ids and titles are those of docs/tutorial.md.
"""

from pathlib import Path

import numpy as np
import pandas as pd

USERS = 300
KINDS = ("Fresh", "Organic", "Sliced", "Smoked", "Dried", "Canned", "Frozen", "Grilled")
AISLES = ("apples", "bread", "cheese", "dates", "eggs", "figs", "garlic", "ham")
TITLES = [f"{kind} {aisle}" for aisle in AISLES for kind in KINDS]
ITEMS = len(TITLES)
DAY = 86_400
FIRST_ERA, SECOND_ERA = 1_700_000_000, 1_750_000_000
"""Times at which the eras begin, in seconds."""
STEPS = {FIRST_ERA: 1, SECOND_ERA: 7}
"""In the first era article i + 1 follows article i, in the second i + 7, modulo the number of articles."""


def era(begin: int, events: int, step: int | None = None) -> pd.DataFrame:
    """Return the events of an era: every user starts somewhere and goes on by a step, with one article in ten random.

    Args:
        begin: one of the eras.
        events: number of events of each user, one a day.
        step: by default, that of the era.
    """
    random, step = np.random.default_rng(begin), step or STEPS[begin]
    rows = []
    for user in range(USERS):
        item = int(random.integers(ITEMS))
        for place in range(events):
            rows.append((f"s{user}", f"sku-{item}", begin + DAY * place + user, TITLES[item]))
            item = int(random.integers(ITEMS)) if random.random() < 0.1 else (item + step) % ITEMS
    return pd.DataFrame(rows, columns=["user", "item", "timestamp", "title"])


def write(path: Path, rows: pd.DataFrame) -> Path:
    """Write events as CSV, and return the file."""
    rows.to_csv(path, index=False)
    return path
