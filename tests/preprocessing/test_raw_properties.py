"""The same log in many types, units, files, partitions and compressions gives the same sequences, those of pandas."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_data import ingested, sequences

from preprocessing.sources import Layout

START = 1_500_000_000
SCALES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
SUFFIXES = {None: "", "gzip": ".gz", "bz2": ".bz2", "zstd": ".zst"}
SEPARATORS = {",": ".csv", "\t": ".tsv", ";": ".csv"}
TEXT_TIMES = ("number", "fraction", "iso", "zone")
TYPED_TIMES = (*TEXT_TIMES, "float", "time", "utc")
ID_TYPES = ("text", "large_text", "bytes", "categories", "int16", "int64", "uint64")
WRITERS = ("pandas", "arrow", "polars")


def seconds_as(seconds, how, unit):
    """Return times as an Arrow array: as numbers of a unit, as text, or typed."""
    scaled = pa.array(seconds * SCALES[unit])
    moments = pd.to_datetime(seconds, unit="s")
    if how == "number":
        return scaled
    if how == "fraction":
        return pa.array([f"{value}.0" for value in scaled.to_pylist()])
    if how == "float":
        return scaled.cast(pa.float64(), safe=False)
    if how == "iso":
        return pa.array(moments.strftime("%Y-%m-%d %H:%M:%S"))
    if how == "zone":
        return pa.array([f"{moment:%Y-%m-%dT%H:%M:%S}+05:30" for moment in moments + pd.Timedelta(minutes=330)])
    return pa.array(moments).cast(pa.timestamp(unit, "UTC" if how == "utc" else None))


def ids_as(ids, how):
    """Return ids, which are integers, as an Arrow array of a type."""
    text = pa.array(ids.astype(str))
    if how == "categories":
        return text.dictionary_encode()
    kinds = {"text": pa.string(), "large_text": pa.large_string(), "bytes": pa.binary()}
    return text.cast(kinds[how]) if how in kinds else pa.array(ids, getattr(pa, how)())


def write_parquet(table, path, writer):
    path = path.with_suffix(".parquet")
    if writer == "pandas":
        table.to_pandas().to_parquet(path)
    elif writer == "polars":
        pl.from_arrow(table).write_parquet(path)
    else:
        pq.write_table(table, path, version="2.6", row_group_size=7)


def write_text(table, path, separator, compression):
    text = table.to_pandas().to_csv(sep=separator, index=False).encode()
    path = path.with_name(path.name + SEPARATORS[separator] + SUFFIXES[compression])
    with (
        pa.OSFile(str(path), "wb") if compression is None else pa.CompressedOutputStream(str(path), compression) as file
    ):
        file.write(text)


@st.composite
def written(draw):
    """Return a log and the ways in which its parts are written; all numbers have one unit, as they must."""
    seed, base = draw(st.integers(0, 99)), draw(st.sampled_from([0, 2**63]))
    unit, separator = draw(st.sampled_from(sorted(SCALES))), draw(st.sampled_from(sorted(SEPARATORS)))
    random = np.random.default_rng(seed)
    rows = 60
    frame = pd.DataFrame({"user": random.integers(0, 6, rows), "item": random.integers(0, 12, rows)}, dtype="uint64")
    frame["user"] += np.uint64(base)
    frame["seconds"] = START + random.integers(0, 10, rows)
    names = ID_TYPES if base == 0 else [name for name in ID_TYPES if not name.startswith("int")]
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        writer = draw(st.sampled_from(["text", *WRITERS]))
        times = draw(st.sampled_from(TEXT_TIMES if writer == "text" else TYPED_TIMES))
        # Typed times have a unit of their own, but pandas 1.5 and polars know neither seconds nor all others.
        own = draw(st.sampled_from(["ms", "us", "ns"]))
        parts.append(
            {
                "writer": writer,
                "compression": draw(st.sampled_from(list(SUFFIXES))),
                "times": times,
                "unit": own if times in ("time", "utc") else unit,
                "user": "text" if writer == "text" else draw(st.sampled_from(names)),
                "item": "text" if writer == "text" else draw(st.sampled_from(ID_TYPES)),
                "folder": draw(st.sampled_from([".", "2023/05", "year=2023", "year=2024/month=1", "item=99"])),
            }
        )
    return frame, separator, parts


def expected_sequences(frame):
    """Return each user's items by time and then by number, in plain pandas."""
    ordered = frame.sort_values(["user", "seconds", "item"]).astype({"user": str, "item": str})
    return ordered.groupby("user")["item"].agg(list).to_dict()


def check(example):
    frame, separator, parts = example
    with tempfile.TemporaryDirectory() as folder:
        log, scratch = Path(folder) / "log", Path(folder) / "out"
        for place, part in enumerate(parts):
            rows = frame.iloc[place :: len(parts)]
            table = pa.table(
                {
                    "user": ids_as(rows["user"], part["user"]),
                    "item": ids_as(rows["item"], part["item"]),
                    "timestamp": seconds_as(rows["seconds"].to_numpy(), part["times"], part["unit"]),
                    "title": "Thing " + rows["item"].astype(str),
                }
            )
            (log / part["folder"]).mkdir(parents=True, exist_ok=True)
            path = log / part["folder"] / f"part-{place}"
            if part["writer"] == "text":
                write_text(table, path, separator, part["compression"])
            else:
                write_parquet(table, path, part["writer"])
        layout = Layout(delimiter=";") if separator == ";" else Layout()
        raw, record = ingested(log, scratch, layout=layout)
        assert sequences(raw) == expected_sequences(frame)
        assert {str(item): title for item, title in raw.titles.items()} == {
            str(item): f"Thing {item}" for item in frame["item"]
        }
        assert raw.rows == len(frame) == sum(found.rows for found in record.files.values())
        assert list(scratch.iterdir()) == [raw.interactions]


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=15, deadline=None, suppress_health_check=SLOW)
@given(written())
def test_one_log_in_many_forms(example):
    """A few of the forms; the expected sequences are those of a sort in pandas."""
    check(example)


@pytest.mark.thorough
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(written())
def test_one_log_in_all_forms(example):
    """300 of the forms."""
    check(example)
