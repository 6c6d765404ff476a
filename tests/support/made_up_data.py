"""Data artifacts that are written directly, without NVTabular: users who walk around one circle of items."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import new_artifact
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import KIND, SEQUENCES_FOLDER, STATISTICS_FILE, TYPES, Statistics

USERS, ITEMS, STEPS = 60, 30, 12
COLOURS, ANIMALS = ("Red", "Blue", "Green", "White", "Black"), ("Fox", "Owl", "Cat", "Dog", "Hen", "Bee")
NUMBERED = tuple(f"Film {item}" for item in range(1, ITEMS + 1))
"""Titles of which each has a word of its own, so that no two words are in two titles each."""
COLOURED = tuple(f"{COLOURS[item % 5]} {ANIMALS[item % 6]}" for item in range(ITEMS))
"""Titles of two words; every word is in several titles, and no two titles are equal."""


def write_data(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    titles: Sequence[str],
    trained: int,
    ids: Sequence[str] | None = None,
) -> Path:
    """Write the artifact ``data`` into a folder, and return the folder.

    Args:
        folder: the artifacts' folder.
        sequences: item numbers of each user, oldest first; the last two are for validation and test.
        titles: titles of all items.
        trained: number of items that may be in the sequences; the others have only a title.
        ids: raw ids of all items; by default i1, i2, ...
    """
    users = [f"u{user}" for user in range(len(sequences))]
    columns = {
        "user": pa.array(users, TYPES["user"]),
        "training": pa.array([items[:-2] for items in sequences], TYPES["training"]),
        "validation": pa.array([items[-2] for items in sequences], TYPES["validation"]),
        "test": pa.array([items[-1] for items in sequences], TYPES["test"]),
    }
    counts = np.bincount(np.concatenate([items[:-2] for items in sequences]), minlength=trained + 1)[1:]
    statistics = Statistics("made-up", len(users), trained, sum(map(len, sequences))).row()
    with new_artifact(folder / "data", KIND, options={}, inputs={}, facts=statistics) as partial:
        (partial / SEQUENCES_FOLDER).mkdir()
        pq.write_table(pa.table(columns), partial / SEQUENCES_FOLDER / "part_0.parquet")
        raw = ids or [f"i{item}" for item in range(1, len(titles) + 1)]
        Catalogue([one.encode() for one in raw], titles, counts.tolist()).write(partial / ITEMS_FILE)
        (partial / STATISTICS_FILE).write_text(json.dumps(statistics))
    return folder


def write_circle(folder: Path, titles: Sequence[str] = COLOURED) -> Path:
    """Write the data of 60 users who take 12 steps around a circle of 30 items each, and return the folder.

    The next item is certain: i + 1 after i, and 1 after 30. User u starts at item 1 + u modulo 30.

    Args:
        folder: the artifacts' folder.
        titles: titles of the 30 items, and of further items that no sequence contains.
    """
    walks = [[1 + (user + step) % ITEMS for step in range(STEPS)] for user in range(USERS)]
    return write_data(folder, walks, titles, ITEMS)
