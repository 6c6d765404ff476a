"""The NVTabular workflows: title filter, iterative k-core, item numbers, sequences, leave-one-out.

One code path through Merlin's dispatch: cudf where there is a GPU, pandas elsewhere. Two rules of NVTabular 23.8 shape
it: an operator that drops or groups rows must be the last of its own workflow (where it leaves a partition empty, the
next operator would get the rows and columns before it), and Groupby reads its keys from the data set and not from an
operator before it, so the encoded interactions are written and opened again.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dask
import nvtabular as nvt
import pyarrow as pa
from merlin.core.dispatch import concat, get_lib, to_arrow
from merlin.dag import BaseOperator, ColumnSelector
from merlin.io import Dataset
from merlin.schema import ColumnSchema
from nvtabular.ops import Categorify, Groupby, StatOperator

FIRST_CATEGORY = 3
"""Categorify's ids: 0 is padding, 1 null, 2 unknown; the vocabulary begins at 3."""


class KeepItems(BaseOperator):  # type: ignore[misc]
    """Drops the interactions of items that are not in a list: those without a title."""

    def __init__(self, items: Iterable[str]) -> None:
        super().__init__()
        self.items = list(items)

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Rows whose ``item`` is in the list."""
        return df[df["item"].isin(self.items)]


class KCore(StatOperator):  # type: ignore[misc]
    """Drops users and items with fewer than ``minimum`` interactions until every one that is left has enough.

    The fixpoint is unique, so the order of removals doesn't matter (paper, section 4.0.1: 5-core). Once fitted,
    :attr:`users` and :attr:`items` hold the survivors' numbers of interactions by raw id.
    """

    def __init__(self, minimum: int) -> None:
        super().__init__()
        self.minimum = minimum
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:
        """Delays the fixpoint over all partitions."""
        return dask.delayed(_survivors)(ddf[["user", "item"]].to_delayed(), self.minimum)

    def fit_finalize(self, dask_stats: Any) -> None:
        """Keeps the surviving ids with their numbers of interactions."""
        self.users, self.items = dask_stats

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """Rows whose user and item survive."""
        return df[df["user"].isin(list(self.users)) & df["item"].isin(list(self.items))]

    def clear(self) -> None:
        """Forgets the fitted ids."""
        self.users, self.items = {}, {}


def _survivors(partitions: list[Any], minimum: int) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of interactions of the surviving users and items."""
    frame = concat(partitions)
    while len(frame):
        before = len(frame)
        for column in ("item", "user"):
            counts = frame[column].value_counts()
            frame = frame[frame[column].isin(counts[counts >= minimum].index)]
        if len(frame) == before:
            break
    return _counts(frame["user"]), _counts(frame["item"])


def _counts(ids: Any) -> dict[str, int]:
    table = to_arrow(ids.value_counts().rename("count").rename_axis("id").reset_index())
    return dict(zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True))


class LeaveOneOut(BaseOperator):  # type: ignore[misc]
    """Splits each sequence and turns Categorify's ids into item numbers.

    The last item is for test, the one before for validation, the rest for training.
    """

    def transform(self, col_selector: ColumnSelector, df: Any) -> Any:
        """``item_list`` to ``training`` (a list), ``validation`` and ``test``."""
        offset = FIRST_CATEGORY - 1
        rows = [[item - offset for item in row] for row in to_arrow(df[["item_list"]])["item_list"].to_pylist()]
        frame = type(df)({"user": df["user"].reset_index(drop=True)})
        frame["training"] = [row[:-2] for row in rows]
        frame["validation"] = [row[-2] for row in rows]
        frame["test"] = [row[-1] for row in rows]
        return frame

    def column_mapping(self, col_selector: ColumnSelector) -> dict[str, list[str]]:
        """Which input each output column comes from."""
        return {"user": ["user"], **{name: ["item_list"] for name in ("training", "validation", "test")}}

    def _compute_shape(self, col_schema: ColumnSchema, input_schema: Any) -> ColumnSchema:
        if col_schema.name == "training":
            return col_schema.with_shape(((0, None), (0, None)))
        return col_schema.with_shape(((0, None),))


COLUMNS = ["user", "item", "timestamp", "item_order"]


def keep_titled(interactions: Dataset, titled: Iterable[str]) -> tuple[nvt.Workflow, Dataset]:
    """Interactions of items that have a title."""
    workflow = nvt.Workflow(COLUMNS >> KeepItems(titled))
    return workflow, workflow.fit_transform(interactions)


def keep_core(interactions: Dataset, minimum: int) -> tuple[nvt.Workflow, KCore, Dataset]:
    """Interactions of the k-core, and the operator that holds its users and items."""
    core = KCore(minimum)
    workflow = nvt.Workflow(COLUMNS >> core)
    workflow.fit(interactions)
    return workflow, core, workflow.transform(interactions)


def encode(interactions: Dataset, users: list[str], items: list[str], folder: Path) -> tuple[nvt.Workflow, Dataset]:
    """Raw ids to Categorify's ids in the order of the given vocabularies, through a Parquet folder."""
    vocabularies = {"user": get_lib().Series(users), "item": get_lib().Series(items)}
    categories = ["user", "item"] >> Categorify(vocabs=vocabularies, out_path=str(folder))
    workflow = nvt.Workflow(categories + ["timestamp", "item_order"])  # noqa: RUF005 - this + joins columns
    workflow.fit_transform(_without_empty(interactions)).to_parquet(str(folder / "encoded"))
    files = sorted(str(path) for path in (folder / "encoded").glob("*.parquet"))
    return workflow, Dataset(files, engine="parquet")


def _without_empty(interactions: Dataset) -> Dataset:
    """The same without the partitions that the filters left empty: Categorify fails on them."""
    frame = interactions.to_ddf()
    sizes = frame.map_partitions(len).compute()
    return Dataset(frame.partitions[[place for place, size in enumerate(sizes) if size]])


def sequences(encoded: Dataset) -> tuple[nvt.Workflow, Dataset]:
    """One row a user: ``user`` and, in chronological order, ``item_list``, in Categorify's ids."""
    grouped = COLUMNS >> Groupby(
        groupby_cols=["user"], sort_cols=["timestamp", "item_order"], aggs={"item": ["list"]}, name_sep="_"
    )
    workflow = nvt.Workflow(grouped)
    return workflow, workflow.fit_transform(encoded.shuffle_by_keys(["user"]))


def split(grouped: Dataset) -> tuple[nvt.Workflow, pa.Table]:
    """One row a user, ordered by user: ``user`` (Categorify's id), ``training``, ``validation``, ``test``."""
    workflow = nvt.Workflow(["user", "item_list"] >> LeaveOneOut())
    return workflow, to_arrow(workflow.fit_transform(grouped).to_ddf().compute()).sort_by("user")
