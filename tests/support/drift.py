"""A log whose users change their taste: two eras in which different items follow each other."""

from pathlib import Path

import numpy as np
import pandas as pd

ITEMS, USERS = 40, 240
DAY = 86_400
FIRST_ERA, SECOND_ERA = 1_700_000_000, 1_750_000_000
"""Times at which the eras begin, in seconds."""
STEPS = {FIRST_ERA: 1, SECOND_ERA: 7}
"""In the first era item i + 1 follows item i, in the second i + 7, modulo the number of items."""
COLOURS = ("Red", "Blue", "Green", "White", "Black", "Grey", "Pink", "Brown")
ANIMALS = ("Fox", "Owl", "Cat", "Dog", "Hen")
TITLES = [f"{COLOURS[item % 8]} {ANIMALS[item % 5]}" for item in range(ITEMS)]


def era(begin: int, events: int, users: int = USERS, seed: int = 0) -> pd.DataFrame:
    """Return the events of an era: every user starts somewhere and goes on by the era's step, with one in ten random.

    Args:
        begin: one of the eras.
        events: number of events of each user.
        users: number of users.
        seed: random seed.
    """
    random = np.random.default_rng((begin, seed))
    rows = []
    for user in range(users):
        item = int(random.integers(ITEMS))
        for place in range(events):
            rows.append((f"u{user}", f"i{item}", begin + DAY * place + user, TITLES[item]))
            item = int(random.integers(ITEMS)) if random.random() < 0.1 else (item + STEPS[begin]) % ITEMS
    return pd.DataFrame(rows, columns=["user", "item", "timestamp", "title"])


def write(path: Path, rows: pd.DataFrame) -> Path:
    """Write events as CSV, and return the file."""
    rows.to_csv(path, index=False)
    return path
