"""Behaviour of NVTabular 23.8 that the workflows work around: if one of these tests fails, a workaround can go.

The workflows themselves are tested in test_workflows.py and test_preprocess.py.
"""

import numpy as np
import nvtabular as nvt
import pandas as pd
import pytest
from frames import dataset, frame_of
from merlin.io import Dataset
from nvtabular.ops import Categorify, Groupby, LambdaOp, ListSlice

from preprocessing.data import read_sequences
from preprocessing.preprocess import Preprocessing, preprocess
from preprocessing.workflows import COLUMNS, KeepItems

TWO_PARTITIONS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 5), (3, 6), (4, 7), (5, 8)]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Change to a temporary folder, because Categorify writes its vocabularies to the working folder by default."""
    monkeypatch.chdir(tmp_path)


def same(column):
    return column


def test_an_emptied_partition_leaks_into_the_next_operator():
    """Trap 1: items 5 to 8 are dropped with their partition, and reappear. Therefore filters end their workflow."""
    data = dataset(frame_of(TWO_PARTITIONS), partitions=2)
    workflow = nvt.Workflow(COLUMNS >> KeepItems(["i0", "i1"]) >> LambdaOp(same))
    assert "i5" in set(workflow.transform(data).to_ddf().compute()["item"])


def test_groupby_takes_its_keys_from_the_data_set():
    """Trap 2: after Categorify the users are still raw. Therefore encoded interactions are written and opened again."""
    data = dataset(frame_of([(0, 0), (0, 1), (1, 0)]))
    codes = ["user", "item"] >> Categorify()
    grouped = (codes + ["timestamp"]) >> Groupby(groupby_cols=["user"], aggs={"item": ["list"]})  # noqa: RUF005
    users = nvt.Workflow(grouped).fit_transform(data).to_ddf().compute()["user"]
    assert set(users) == {"u0", "u1"}


def test_list_slice_refuses_to_cut_the_end():
    """Trap 3: leave-one-out needs lists without their last two items. Therefore a custom operator cuts them."""
    frame = pd.DataFrame({"items": [[1, 2, 3], [4, 5, 6, 7]]})
    with pytest.raises(ValueError, match="maximum size of a dimension"):
        nvt.Workflow(["items"] >> ListSlice(0, -2)).fit_transform(Dataset(frame)).to_ddf().compute()


def test_categorify_begins_at_three_in_order_of_frequency():
    """Trap 4: 0 is padding, 1 null, 2 unknown. Therefore item numbers are its ids minus 2, and unknown gives none."""
    frame = pd.DataFrame({"item": ["b", "a", "b", None]})
    workflow = nvt.Workflow(["item"] >> Categorify())
    assert workflow.fit_transform(Dataset(frame)).to_ddf().compute()["item"].tolist() == [3, 4, 3, 1]
    unknown = workflow.transform(Dataset(pd.DataFrame({"item": ["c"]}))).to_ddf().compute()["item"]
    assert unknown.tolist() == [2]


def test_groupby_splits_users_over_partitions():
    """Trap 5: a user in two partitions becomes two rows. Therefore partitions are buckets of whole users."""
    data = dataset(frame_of([(0, 0), (1, 1), (0, 2), (1, 3)]), partitions=2)
    grouped = nvt.Workflow(COLUMNS >> Groupby(groupby_cols=["user"], aggs={"item": ["list"]})).fit_transform(data)
    assert len(grouped.to_ddf().compute()) == 4


def test_output_folders_hold_more_than_parquet(tmp_path):
    """Trap 6: the folder also has ``schema.pbtxt`` and lists of files. Therefore readers name the parts they read."""
    frame = frame_of([(user, item) for user in range(5) for item in range(5)])
    frame.assign(title=frame["item"]).to_parquet(tmp_path / "log.parquet")
    preprocess(Preprocessing(dataset="table", raw=tmp_path / "log.parquet"), tmp_path)
    assert (tmp_path / "data" / "sequences" / "schema.pbtxt").is_file()
    assert sum(map(len, read_sequences(tmp_path / "data"))) == 5


def test_merlin_cannot_write_folders_of_a_column_without_a_gpu(tmp_path):
    """Not a numbered trap: ``partition_on`` fails on pandas. Therefore Dask writes the buckets of users."""
    frame = pd.DataFrame({"bucket": [0, 1], "item": np.arange(2)})
    with pytest.raises(AttributeError, match="searchsorted"):
        Dataset(frame).to_parquet(str(tmp_path), partition_on=["bucket"])
