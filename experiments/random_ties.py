"""Writes a data set whose interactions of equal time are in random order, a control of what follows from ties.

Preprocessing orders interactions of equal time by item id, as the files of the public data sets do. A model or a signal
could learn that order, which says nothing about users.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.datasets import is_derived, write_derived
from models.retriever.batches import Items
from preprocessing.catalogue import Catalogue
from preprocessing.data import INTERACTIONS_FILE, load_data

SEED = 0
MADE_WITH = {"random_ties": SEED}


def write_random_ties(whole: Path, folder: Path) -> Path:
    """Write the data of one folder with ties in random order into another, and return that folder.

    Users, items and their numbers stay the same; a user's validation and test items may be others.

    Args:
        whole: folder that holds the preprocessed data.
        folder: folder to write ``data`` into; finished data there is left as it is.
    """
    if is_derived(whole, folder, MADE_WITH):
        return folder
    data = load_data(whole)
    sequences = in_random_order(whole / "data" / INTERACTIONS_FILE, data.users, data.catalogue)
    assert list(map(len, sequences)) == [len(training) + 2 for training in data.training]
    training = [items[:-2] for items in sequences]
    columns = {
        "user": data.users,
        "training": training,
        "validation": [items[-2] for items in sequences],
        "test": [items[-1] for items in sequences],
    }
    counts = np.bincount(np.concatenate(training), minlength=data.catalogue.trained + 1)[1:]
    items = range(1, len(data.catalogue) + 1)
    catalogue = Catalogue(
        [data.catalogue.raw(item) for item in items], [data.catalogue.title(item) for item in items], counts.tolist()
    )
    write_derived(whole, folder, MADE_WITH, columns, catalogue)
    return folder


def in_random_order(interactions: Path, users: list[str], catalogue: Catalogue) -> list[Items]:
    """Return each user's sequence of item numbers by time, with interactions of equal time in random order.

    Args:
        interactions: Parquet file with the columns ``user, item, timestamp``.
        users: raw ids of the users to keep, in order.
        catalogue: the items; only trained ones are kept.
    """
    frame = pd.read_parquet(interactions, columns=["user", "item", "timestamp"])
    numbers = {catalogue.raw(item).decode(): item for item in range(1, catalogue.trained + 1)}
    frame["item"] = frame["item"].astype(str).map(numbers)
    frame["user"] = frame["user"].astype(str).map({user: place for place, user in enumerate(users)})
    frame = frame.dropna().sample(frac=1, random_state=SEED)
    frame = frame.sort_values(["user", "timestamp"], kind="stable")
    items = frame["item"].to_numpy(np.int32)
    return np.split(items, np.cumsum(np.bincount(frame["user"].astype(int), minlength=len(users)))[:-1])
