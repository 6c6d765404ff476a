"""Writes a data set whose interactions of equal time are in random order, a control of what follows from ties.

Preprocessing orders interactions of equal time by item id, as the files of the public data sets do. A model or a signal
could learn that order, which says nothing about users.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.retriever.batches import Items
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import INTERACTIONS_FILE, KIND, SEQUENCES_FOLDER, STATISTICS_FILE, TYPES, load_data

SEED = 0


def write_random_ties(whole: Path, folder: Path) -> Path:
    """Write the data of one folder with ties in random order into another, and return that folder.

    Users, items and their numbers stay the same; a user's validation and test items may be others.

    Args:
        whole: folder that holds the preprocessed data.
        folder: folder to write ``data`` into; finished data there is left as it is.
    """
    manifest = read_manifest(whole / "data", KIND, "llamarec preprocess")
    options, inputs = {"random_ties": SEED}, {"data": manifest.fingerprint}
    if is_finished(folder / "data", KIND, options=options, inputs=inputs):
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
    with new_artifact(folder / "data", KIND, options=options, inputs=inputs, facts=dict(manifest.facts)) as new:
        (new / SEQUENCES_FOLDER).mkdir()
        pq.write_table(pa.table(columns, pa.schema(TYPES)), new / SEQUENCES_FOLDER / "part_0.parquet")
        catalogue.write(new / ITEMS_FILE)
        shutil.copy(whole / "data" / STATISTICS_FILE, new)
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
