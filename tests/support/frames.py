"""Interactions in the form that the workflows take, made from pairs of numbers."""

import dask.dataframe as dd
import numpy as np
import pandas as pd
from merlin.io import Dataset


def frame_of(pairs, times=None):
    """Return interactions of (user, item) number pairs; ids are a letter with the number, times default to the row."""
    frame = pd.DataFrame(pairs, columns=["u", "i"]).astype(int)
    return pd.DataFrame(
        {
            "user": "u" + frame["u"].astype(str),
            "item": "i" + frame["i"].astype(str),
            "timestamp": np.asarray(range(len(frame)) if times is None else times, np.int64),
        }
    )


def dataset(frame, partitions=1):
    return Dataset(dd.from_pandas(frame.reset_index(drop=True), npartitions=partitions, sort=False))
