"""The NVTabular workflows against plain pandas, for any partitions, and the traps of NVTabular 23.8."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from frames import dataset, frame_of
from hypothesis import given, settings
from hypothesis import strategies as st
from nvtabular import Workflow

from preprocessing import workflows


def rows(dataset_):
    frame = dataset_.to_ddf().compute()
    return sorted(frame[workflows.COLUMNS].itertuples(index=False, name=None))


def reference_core(frame, minimum):
    """Return the k-core by removing one user or item at a time, which is not the operator's order of removals."""
    while True:
        for column in ("user", "item"):
            sizes = frame.groupby(column)["timestamp"].count()
            if (sizes < minimum).any():
                frame = frame[frame[column] != sizes.index[sizes < minimum][-1]]
                break
        else:
            return frame


pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(pairs=pairs, minimum=st.integers(2, 4), partitions=st.integers(1, 3))
def test_k_core_is_the_fixpoint(pairs, minimum, partitions):
    """The operator, fitted and applied over several partitions, equals the one-at-a-time reference in plain pandas."""
    frame = frame_of(pairs)
    _, core, kept = workflows.keep_core(dataset(frame, partitions), minimum)
    expected = reference_core(frame, minimum)
    assert rows(kept) == sorted(expected.itertuples(index=False, name=None))
    assert core.users == expected["user"].value_counts().to_dict()
    assert core.items == expected["item"].value_counts().to_dict()


def test_k_core_by_hand():
    """In the 2-core, u0 and u1 stay with i0 and i1.

    u3 has one interaction; without u3, i3 has one; without i3, u2 has one.
    """
    frame = frame_of([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 3), (3, 3)])
    _, core, kept = workflows.keep_core(dataset(frame), 2)
    assert core.users == {"u0": 2, "u1": 2}
    assert core.items == {"i0": 2, "i1": 2}
    assert len(rows(kept)) == 4


@pytest.mark.parametrize("filter_", ["titled", "core"])
def test_an_emptied_partition_leaks_no_rows(filter_):
    """The second partition loses all its rows, which a longer NVTabular workflow would bring back."""
    frame = frame_of([(0, 0), (1, 0), (0, 1), (1, 1), (2, 5), (3, 6), (4, 7), (5, 8)])
    data = dataset(frame, partitions=2)
    kept = workflows.keep_titled(data, ["i0", "i1"])[1]
    if filter_ == "core":
        kept = workflows.keep_core(data, 2)[2]
    assert {row[1] for row in rows(kept)} == {"i0", "i1"}
    assert len(rows(kept)) == 4


def encoded_sequences(frame, partitions, folder):
    """Return users, items and the sequences of all users; ties in time are ordered by item id."""
    users, items = sorted(set(frame["user"])), sorted(set(frame["item"]))
    _, encoded = workflows.encode(dataset(frame, partitions), Counter(sorted(frame["user"])), items, folder)
    _, written = workflows.sequences(encoded, users, np.arange(len(items)))
    return users, items, written.to_ddf().compute()


@settings(max_examples=15, deadline=None)
@given(data=st.data(), partitions=st.integers(1, 3), buckets=st.integers(1, 12), times=st.integers(1, 50))
def test_sequences_equal_sorted_pandas(data, partitions, buckets, times, tmp_path_factory):
    """The reference is pandas sorted by (time, item), for any partitions and buckets; few distinct times make ties."""
    users = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=12), min_size=1, max_size=8))
    pairs = [(user, item) for user, items in enumerate(users) for item in items]
    stamps = data.draw(st.lists(st.integers(0, times), min_size=len(pairs), max_size=len(pairs)))
    frame = frame_of(pairs, stamps).sample(frac=1, random_state=times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflows, "BUCKET_ROWS", max(len(frame) // buckets, 1))
        names, items, table = encoded_sequences(frame, partitions, tmp_path_factory.mktemp("encoded"))
    numbers = {item: number for number, item in enumerate(items, start=1)}
    ordered = frame.sort_values(["timestamp", "item"]).groupby("user")["item"].agg(list)
    expected = [[numbers[item] for item in ordered[user]] for user in names]
    assert table["user"].tolist() == names
    assert [row.tolist() for row in table["training"]] == [row[:-2] for row in expected]
    assert table["validation"].tolist() == [row[-2] for row in expected]
    assert table["test"].tolist() == [row[-1] for row in expected]


def test_saved_workflow_gives_the_catalogues_numbers(tmp_path):
    """The loaded encoding gives number + 2, 2 for an unknown id and 1 for a missing id (Categorify's own)."""
    frame = frame_of([(0, 2), (0, 0), (0, 1)])
    scratch = tmp_path / "scratch"
    workflow, _ = workflows.encode(dataset(frame), {"u0": 3}, ["i2", "i0", "i1"], scratch)
    workflow.save(str(tmp_path / "saved"))
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    asked = frame_of([(0, 0), (0, 1), (0, 2), (0, 0), (0, 0)])
    asked["item"] = ["i0", "i1", "i2", "never seen", None]
    loaded = Workflow.load(str(tmp_path / "saved"))
    assert loaded.transform(dataset(asked)).to_ddf().compute()["item"].tolist() == [4, 5, 3, 2, 1]


def test_an_emptied_partition_goes_all_the_way(tmp_path):
    """The second of two partitions loses all rows in a 2-core; by hand, two users have the items 0, 1, 2 in order."""
    frame = frame_of([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 5), (3, 6), (4, 7), (5, 8), (6, 9), (7, 10)])
    _, core, kept = workflows.keep_core(dataset(frame, partitions=2), 2)
    assert core.sizes == [6, 0]
    _, encoded = workflows.encode(kept, dict(sorted(core.users.items())), sorted(core.items), tmp_path)
    table = workflows.sequences(encoded, sorted(core.users), np.arange(3))[1].to_ddf().compute()
    assert table["training"].tolist() == [[1], [1]]
    assert table[["user", "validation", "test"]].values.tolist() == [["u0", 2, 3], ["u1", 2, 3]]


def test_saved_filters_and_sequences_work_again(tmp_path):
    """The custom operators are still fitted when they are loaded: the core keeps the same rows."""
    frame = frame_of([(0, 0), (0, 1), (1, 0), (1, 1), (2, 5)])
    workflow, _, kept = workflows.keep_core(dataset(frame), 2)
    workflow.save(str(tmp_path / "core"))
    assert rows(Workflow.load(str(tmp_path / "core")).transform(dataset(frame))) == rows(kept)


def test_sequences_of_nullable_columns_are_the_same():
    """Nullable columns, such as cuDF's or pandas' Int64, give the same sequences as plain integers.

    A comparison with the null of a shifted column gave null. By hand, user a took items 2, 3, 4 in this order, and user
    b 1, 2, 3.
    """
    plain = pd.DataFrame({"user": [4, 4, 4, 3, 3, 3], "item": [5, 3, 4, 6, 4, 5], "timestamp": [5, 3, 4, 9, 1, 5]})
    operator = workflows.Sequences(["a", "b"], np.arange(4))
    expected = operator.transform(None, plain)
    assert expected["training"].tolist() == [[2], [1]]
    assert expected[["user", "validation", "test"]].values.tolist() == [["a", 3, 4], ["b", 2, 3]]
    pd.testing.assert_frame_equal(operator.transform(None, plain.astype("Int64")), expected)
