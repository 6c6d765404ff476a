"""The NVTabular workflows: title filter, iterative k-core, item numbers, sequences with leave-one-out split.

CPU and GPU share one code path through Merlin's dispatch: cudf with a GPU, pandas without. Only the k-core holds all
interactions in memory, as two 32-bit codes each. Two limitations of NVTabular 23.8 determine the structure. First, an
operator that drops or groups rows must be the last of its workflow: where it leaves a partition empty, the next
operator would get the rows and columns from before it. Second, a partition that is grouped must hold whole users, so
the encoded interactions are written in buckets of users and opened again.
"""

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dask
import dask.dataframe as dd
import numpy as np
import nvtabular as nvt
from merlin.core.dispatch import concat, create_multihot_col, get_lib, to_arrow
from merlin.dag import BaseOperator, ColumnSelector
from merlin.io import Dataset
from merlin.schema import ColumnSchema, Tags
from numpy.typing import NDArray
from nvtabular.ops import Categorify, StatOperator

FIRST_CATEGORY = 3
"""First id of Categorify's vocabulary; 0 is padding, 1 null and 2 unknown."""
FIRST_BUCKET = 1_000_000
"""Number of the first bucket. Buckets are folders, whose names sort as numbers only if they have equal length."""
BUCKET_ROWS = 500_000
"""Approximate number of interactions in a bucket, which are sorted together."""
MANY_ROWS = 25_000_000
"""Number of interactions for which partitions grow by one row group and buckets by BUCKET_ROWS."""
COLUMNS = ["user", "item", "timestamp"]


class KeepItems(BaseOperator):  # type: ignore[misc]  # NVTabular has no types
    """An operator that drops the interactions of items outside a list, here of items without a title."""

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__()
        self.items = get_lib().Series(list(items))

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Return the rows whose ``item`` is in the list."""
        return df[df["item"].isin(self.items)]


class KCore(StatOperator):  # type: ignore[misc]  # NVTabular has no types
    """An operator that drops users and items with fewer than ``minimum`` interactions until all others have enough.

    The fixpoint is unique, so the order of removals does not matter (paper, section 4.0.1: 5-core). Once fitted,
    :attr:`users` and :attr:`items` hold the number of interactions of each remaining user and item by raw id,
    :attr:`sizes` the number of interactions that remain in each partition, and :attr:`seen` the number before the
    filter.
    """

    def __init__(self, minimum: int) -> None:
        super().__init__()
        self.minimum = minimum
        self.users: dict[Any, int] = {}
        self.items: dict[Any, int] = {}
        self.sizes: list[int] = []
        self.seen = 0
        self._ids: dict[str, Any] = {}

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """Return the fixpoint over all partitions as a Dask task; each partition is first reduced to codes."""
        coded = [dask.delayed(_code)(partition) for partition in ddf[["user", "item"]].to_delayed()]
        return dask.delayed(_survivors)(coded, self.minimum)

    def fit_finalize(self, dask_stats: Any) -> None:
        """Store the remaining ids and their numbers of interactions."""
        self.users, self.items, self.sizes, self.seen = dask_stats
        # Built once here instead of once per partition.
        # An empty list has no dtype of its own.
        self._ids = {
            name: get_lib().Series(list(ids), dtype=None if ids else "object")
            for name, ids in (("user", self.users), ("item", self.items))
        }

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Return the rows whose user and item remain."""
        return df[df["user"].isin(self._ids["user"]) & df["item"].isin(self._ids["item"])]

    def clear(self) -> None:
        """Discard the fitted ids."""
        self.users, self.items, self.sizes, self.seen, self._ids = {}, {}, [], 0, {}


class _Coded(NamedTuple):
    """A column encoded as indices into its distinct values."""

    codes: Any  # [rows] int32
    values: Any  # [distinct]


def _code(frame: Any) -> tuple[_Coded, _Coded]:
    columns = []
    for name in ("user", "item"):
        codes, values = frame[name].factorize()
        columns.append(_Coded(codes.astype(np.int32), get_lib().Series(values)))
    return columns[0], columns[1]


def _join(parts: Sequence[_Coded]) -> _Coded:
    """Return the codes of several partitions as one column of codes into the distinct values of all of them."""
    codes, values = concat([part.values for part in parts]).factorize()
    codes = codes.astype(np.int32)
    ends = np.cumsum([len(part.values) for part in parts])
    joined = [codes[end - len(part.values) : end][part.codes] for part, end in zip(parts, ends, strict=True)]
    return _Coded(np.concatenate(joined), get_lib().Series(values))


def _survivors(
    partitions: list[tuple[_Coded, _Coded]], minimum: int
) -> tuple[dict[Any, int], dict[Any, int], list[int], int]:
    """Return the remaining interactions of each user, of each item and in each partition, and their former number."""
    users, items = (_join(parts) for parts in zip(*partitions, strict=True))
    codes = [items.codes, users.codes]
    before = -1
    while len(codes[0]) != before:
        before = len(codes[0])
        for column in (0, 1):
            kept = (np.bincount(codes[column]) >= minimum)[codes[column]]
            codes = [column_codes[kept] for column_codes in codes]
    counts = [
        np.bincount(left, minlength=len(column.values)) for left, column in zip(codes, (items, users), strict=True)
    ]
    survive = (counts[1] > 0)[users.codes] & (counts[0] > 0)[items.codes]
    ends = np.cumsum([len(part.codes) for part, _ in partitions])
    sizes = [int(part.sum()) for part in np.split(survive, ends[:-1])]
    return _named(counts[1], users.values), _named(counts[0], items.values), sizes, len(users.codes)


def _named(counts: Any, values: Any) -> dict[Any, int]:
    table = to_arrow(get_lib().DataFrame({"id": values, "count": counts})[counts > 0])
    return dict(zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True))


def _sorted(df: Any) -> Any:
    """Return rows sorted by (user, timestamp, place), by one key if they fit into 63 bits, which is much faster."""
    keys = ["user", "timestamp", "place"]
    lowest = [int(df[key].min()) for key in keys]
    spans = [int(df[key].max()) - low + 1 for key, low in zip(keys, lowest, strict=True)]
    if math.prod(spans) >= 2**63 or df["timestamp"].dtype.kind != "i":
        return df.sort_values(keys)
    packed = sum(
        (df[key].astype("int64") - low) * math.prod(spans[place + 1 :])
        for place, (key, low) in enumerate(zip(keys, lowest, strict=True))
    )
    return df.assign(packed=packed).sort_values("packed")


class UserBucket(BaseOperator):  # type: ignore[misc]  # NVTabular has no types
    """An operator that assigns consecutive users to buckets of about :data:`BUCKET_ROWS` interactions.

    Args:
        counts: number of interactions of each user, in the order of Categorify's vocabulary.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        ends = np.cumsum(counts)
        self.buckets = FIRST_BUCKET + (ends - 1) // (BUCKET_ROWS * _scale(int(ends[-1])))

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Return the ``bucket`` of each ``user`` (Categorify's id)."""
        return type(df)({"bucket": get_lib().Series(self.buckets).take(df["user"] - FIRST_CATEGORY).values})

    def column_mapping(self, col_selector: ColumnSelector) -> dict[str, list[str]]:
        """Return the input columns of each output column."""
        return {"bucket": ["user"]}


class Sequences(BaseOperator):  # type: ignore[misc]  # NVTabular has no types
    """An operator that makes one row per user: items in chronological order, split leave-one-out.

    A user's last item is for test and the second-to-last for validation. Categorify's ids become raw ids of users and
    item numbers, which begin at 1. Each user must have at least three interactions, all in the same partition.

    Args:
        users: raw ids in the order of Categorify's vocabulary.
        places: rank of each item of the vocabulary in the order of raw ids, which breaks ties of timestamps.
    """

    def __init__(self, users: Sequence[str], places: NDArray[np.int64]) -> None:
        super().__init__()
        self.users = list(users)
        self.places = places

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Map ``user``, ``item`` and ``timestamp`` to ``user``, ``training`` (a list), ``validation`` and ``test``."""
        series = get_lib().Series
        code = df["item"] - FIRST_CATEGORY
        df = _sorted(df.assign(item=code + 1, place=series(self.places).take(code).values))
        user, item = df["user"], df["item"].astype("int32")
        # With a fill value: a shifted column of cudf ends with a null, and a comparison with null gives null.
        last = (user != user.shift(-1, fill_value=-1)).astype(bool)
        before_last = ~last & (user != user.shift(-2, fill_value=-1)).astype(bool)
        held_out = last | before_last
        # Offsets at which the training parts end when they are concatenated.
        ends = np.cumsum(np.diff(np.flatnonzero(last.values), prepend=-1) - 2)
        # Not by .values, which a column of text does not have in cudf.
        frame = type(df)({"user": series(self.users).take(user[last] - FIRST_CATEGORY).reset_index(drop=True)})
        frame["training"] = create_multihot_col(np.append(0, ends), item[~held_out])
        frame["validation"] = item[before_last].values
        frame["test"] = item[last].values
        return frame

    def column_mapping(self, col_selector: ColumnSelector) -> dict[str, list[str]]:
        """Return the input columns of each output column."""
        return {"user": ["user"], **{name: ["item"] for name in ("training", "validation", "test")}}

    def _compute_shape(self, col_schema: ColumnSchema, input_schema: Any) -> ColumnSchema:
        return col_schema.with_shape(((0, None), (0, None)) if col_schema.name == "training" else ((0, None),))

    def _compute_dtype(self, col_schema: ColumnSchema, input_schema: Any) -> ColumnSchema:
        return col_schema.with_dtype(np.dtype(object) if col_schema.name == "user" else np.int32)

    def _compute_tags(self, col_schema: ColumnSchema, input_schema: Any) -> ColumnSchema:
        tags = {
            "user": [Tags.USER_ID, Tags.USER],
            "training": [Tags.ITEM_ID, Tags.ITEM, Tags.SEQUENCE],
        }
        return col_schema.with_tags(tags.get(col_schema.name, [Tags.ITEM_ID, Tags.ITEM, Tags.TARGET]))


# Workflows that have nothing to fit are not fitted: fitting would process the whole first partition to find the types
# of the columns, which the operators declare.


def open_interactions(path: Path, rows: int) -> Dataset:
    """Return the interactions of a Parquet file in partitions of one row group, or of several for very many rows.

    Each partition is looked up in the whole vocabulary and divided among all buckets. If partitions did not grow with
    the data, the time would grow faster than linearly.
    """
    # Escaped because fsspec takes a path for a pattern.
    return Dataset(glob.escape(str(path)), engine="parquet", row_groups_per_part=_scale(rows))


def _scale(rows: int) -> int:
    return 1 + rows // MANY_ROWS


def keep_titled(interactions: Dataset, titled: Iterable[Any]) -> tuple[nvt.Workflow, Dataset]:
    """Return the workflow that selects the interactions of items with a title, and these interactions."""
    workflow = nvt.Workflow(COLUMNS >> KeepItems(titled))
    return workflow, workflow.transform(interactions)


def keep_core(interactions: Dataset, minimum: int) -> tuple[nvt.Workflow, KCore, Dataset]:
    """Return the workflow, the fitted k-core operator, and the interactions of the k-core without empty partitions."""
    core = KCore(minimum)
    workflow = nvt.Workflow(COLUMNS >> core)
    workflow.fit(interactions)
    kept = workflow.transform(interactions)
    left = [place for place, size in enumerate(core.sizes) if size]
    # Categorify fails on an empty partition.
    return workflow, core, Dataset(kept.to_ddf().partitions[left], schema=kept.schema) if left else kept


def encode(
    interactions: Dataset, users: Mapping[Any, int], items: Sequence[Any], folder: Path
) -> tuple[nvt.Workflow, Dataset]:
    """Replace raw ids by Categorify's ids, and return the workflow and the interactions in partitions of whole users.

    Args:
        interactions: interactions of these users and items.
        users: number of interactions of each user by raw id, in the order of the vocabulary.
        items: raw item ids in the order of the vocabulary.
        folder: folder in which the encoded interactions are written, in buckets of users.
    """
    vocabularies = {"user": get_lib().Series(list(users)), "item": get_lib().Series(items)}
    codes = ["user", "item"] >> Categorify(vocabs=vocabularies, out_path=str(folder), dtype=np.int32)
    bucket = codes["user"] >> UserBucket(list(users.values()))
    workflow = nvt.Workflow(codes + bucket + ["timestamp"])
    encoded = folder / "encoded"
    # Dask's to_parquet, because Merlin's cannot partition by a column without a GPU.
    frame = workflow.transform(interactions).to_ddf()
    frame.to_parquet(str(encoded), partition_on=["bucket"], write_index=False)
    buckets = sorted(str(path) for path in encoded.glob("bucket=*"))
    schema = workflow.output_schema.select_by_name(COLUMNS)
    return workflow, Dataset(dd.from_map(_read_bucket, buckets, meta=frame._meta[COLUMNS]), schema=schema)


def _read_bucket(path: str) -> Any:
    return get_lib().read_parquet(path, columns=COLUMNS)


def sequences(encoded: Dataset, users: Sequence[str], places: NDArray[np.int64]) -> tuple[nvt.Workflow, Dataset]:
    """Return the workflow and one row per user in the order of the vocabulary; see :class:`Sequences`."""
    workflow = nvt.Workflow(COLUMNS >> Sequences(users, places))
    return workflow, workflow.transform(encoded)
