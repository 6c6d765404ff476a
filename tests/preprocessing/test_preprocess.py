"""The data stage from raw files to artifact: the published statistics, the order of its output, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from merlin.io import Dataset
from merlin.schema import Tags
from nvtabular import Workflow
from raw_data import LATE, LOG, U0

from preprocessing import ingest, workflows
from preprocessing.artifacts import read_manifest
from preprocessing.catalogue import Catalogue
from preprocessing.data import KIND, load_data
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from preprocessing.preprocess import Preprocessing, preprocess, raw_order, read_report


def write_log(path, rows):
    """Write a `table` of (user, item, timestamp) rows with a title for every item, and return its options."""
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    frame = frame.assign(title="Film " + frame["item"].astype(str))
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return Preprocessing(dataset="table", raw=path, minimum=3)


def generated(seed, users=30, items=12):
    """Return rows in which each user sees 3 to 8 items at few distinct times, so that most orders are ties."""
    random = np.random.default_rng(seed)
    return [
        (user, int(item), int(random.integers(0, 4)))
        for user in range(users)
        for item in random.integers(0, items, random.integers(3, 9))
    ]


def reference(rows, minimum):
    """Return the users, the items by number and the sequences of item numbers of the same stage in plain pandas."""
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    size = -1
    while len(frame) != size:
        size = len(frame)
        frame = frame[frame.groupby("item")["item"].transform("count") >= minimum]
        frame = frame[frame.groupby("user")["user"].transform("count") >= minimum]
    counts = frame["item"].value_counts()
    items = sorted(counts.index, key=lambda item: (-counts[item], item))
    numbers = {item: number for number, item in enumerate(items, start=1)}
    ordered = frame.sort_values(["user", "timestamp", "item"]).groupby("user")["item"].agg(list)
    return list(ordered.index), items, [[numbers[item] for item in row] for row in ordered]


@pytest.mark.parametrize("seed", range(3))
def test_the_stage_equals_plain_pandas(tmp_path, seed):
    """Users are in order, items by falling frequency then id, sequences by (time, id), as in a separate reference."""
    rows = generated(seed)
    statistics = preprocess(write_log(tmp_path / "log.csv", rows), tmp_path / "out")
    data = load_data(tmp_path / "out")
    users, items, sequences = reference(rows, 3)
    assert data.users == [str(user) for user in users]
    assert [data.catalogue.raw(number) for number in range(1, data.catalogue.trained + 1)] == [
        str(item).encode() for item in items
    ]
    assert [row.tolist() for row in data.training] == [row[:-2] for row in sequences]
    assert data.validation.tolist() == [row[-2] for row in sequences]
    assert data.test.tolist() == [row[-1] for row in sequences]
    assert statistics == data.statistics
    assert (statistics.users, statistics.items) == (len(users), len(items))
    assert statistics.interactions == sum(map(len, sequences))
    assert {array.dtype for array in (*data.training, data.validation, data.test)} == {np.dtype(np.int32)}


def test_the_order_of_raw_rows_is_no_matter(tmp_path):
    """The same log, shuffled three times, gives items and sequences that are equal to the byte."""
    rows = generated(7)
    contents = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        order = np.random.default_rng(seed).permutation(len(rows))
        preprocess(write_log(folder / "log.csv", [rows[place] for place in order]), folder)
        contents.append(
            [(folder / "data" / name).read_bytes() for name in ("items.parquet", "sequences/part_0.parquet")]
        )
    assert contents[0] == contents[1] == contents[2]


def test_ties_follow_ids_as_numbers_only_if_all_are(tmp_path):
    """Items 9 and 10 at one time: 9 precedes 10 as numbers, and "10" precedes "9" when another item's id is a word."""
    for other, last_two in (("11", ["9", "10"]), ("x", ["10", "9"])):
        folder = tmp_path / other
        folder.mkdir()
        rows = [(user, item, stamp) for user in "abc" for item, stamp in (("10", 5), ("9", 5), (other, 1))]
        preprocess(write_log(folder / "log.csv", rows), folder)
        data = load_data(folder)
        assert [data.catalogue.raw(int(item)).decode() for item in (data.validation[0], data.test[0])] == last_two


def test_raw_order_knows_numbers():
    """By hand: ids with signs or leading zeros are numbers; a fraction, a superscript or an empty id is not."""
    assert sorted(["10", "9", "-3", "010"], key=raw_order(["10", "9", "-3", "010"])) == ["-3", "9", "010", "10"]
    for odd in ("1.5", "²", "", "1e3"):
        assert sorted(["10", "9", odd], key=raw_order(["10", "9", odd])) == sorted(["10", "9", odd], key=str.encode)


def test_repeated_interactions_stay(tmp_path):
    """Interactions are not de-duplicated: a user with the same item three times has three interactions."""
    rows = [(user, item, stamp) for user in "abc" for item, stamp in ((1, 1), (1, 2), (1, 3))]
    statistics = preprocess(write_log(tmp_path / "log.csv", rows), tmp_path)
    assert statistics.row() == {
        "dataset": "log",
        "users": 3,
        "items": 1,
        "interactions": 9,
        "mean_length": 3.0,
        "density": 3.0,
    }
    assert [row.tolist() for row in load_data(tmp_path).training] == [[1], [1], [1]]


def test_items_outside_the_core_keep_their_titles(tmp_path):
    """Item 8, seen once, has a title and a number above the trained ones, and no sequence contains it."""
    rows = [(user, item, item) for user in "abc" for item in (1, 2, 3)] + [("a", 8, 9)]
    preprocess(write_log(tmp_path / "log.csv", rows), tmp_path)
    data = load_data(tmp_path)
    assert (len(data.catalogue), data.catalogue.trained, data.catalogue.number(b"8")) == (4, 3, 4)
    assert data.catalogue.title(4) == "Film 8"
    assert max(data.test.max(), data.validation.max()) <= 3


def test_untitled_items_go_before_the_core_is_taken(tmp_path):
    """User d has three interactions, one with the untitled item; without it, d falls out of the 3-core."""
    rows = [(user, item, item) for user in "abcd" for item in (1, 2, 3)]
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    frame.loc[(frame["user"] == "d") & (frame["item"] == 3), "item"] = 7
    frame["title"] = ("Film " + frame["item"].astype(str)).where(frame["item"] != 7)
    frame.to_csv(tmp_path / "log.csv", index=False)
    statistics = preprocess(Preprocessing(dataset="table", raw=tmp_path / "log.csv", minimum=3), tmp_path)
    data = load_data(tmp_path)
    assert data.users == ["a", "b", "c"]
    assert statistics.interactions == 9
    assert data.catalogue.number(b"7") is None


def test_columns_of_a_table_have_any_name(tmp_path):
    options = write_log(tmp_path / "log.csv", generated(1))
    expected = preprocess(options, tmp_path / "plain")
    frame = pd.read_csv(options.raw).set_axis(["who", "what", "when", "name"], axis=1)
    frame.to_csv(tmp_path / "log.csv", index=False)
    names = {"user_column": "who", "item_column": "what", "timestamp_column": "when", "title_column": "name"}
    options = Preprocessing(dataset="table", raw=tmp_path / "log.csv", minimum=3, **names)
    assert preprocess(options, tmp_path / "renamed") == expected


def test_manifest_and_statistics_say_what_was_made(tmp_path):
    """The row of Table 2 is in the manifest and in statistics.json, and the workflows are saved with them."""
    statistics = preprocess(write_log(tmp_path / "log.csv", generated(1)), tmp_path)
    manifest = read_manifest(tmp_path / "data", KIND, "")
    assert {name: manifest.facts[name] for name in statistics.row()} == statistics.row()
    assert json.loads((tmp_path / "data" / "statistics.json").read_text()) == statistics.row()
    for name in ("titled", "core", "encode", "sequences"):
        assert f"workflow/{name}/workflow.pkl" in manifest.files


def test_a_finished_stage_is_left_alone_without_nvtabular(tmp_path):
    """A second run in a new process keeps the files and does not import NVTabular, which would take seconds."""
    options = write_log(tmp_path / "log.csv", generated(1))
    preprocess(options, tmp_path)
    before = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    code = (
        "import sys; from pathlib import Path; from preprocessing.preprocess import Preprocessing, preprocess\n"
        f"options = Preprocessing(dataset='table', raw=Path({str(options.raw)!r}), minimum=3)\n"
        f"preprocess(options, Path({str(tmp_path)!r})); sys.exit('nvtabular' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == before


def test_other_raw_data_or_options_are_made_anew(tmp_path):
    """A changed file or option is detected."""
    options = write_log(tmp_path / "log.csv", generated(1))
    first = preprocess(options, tmp_path)
    assert preprocess(Preprocessing(dataset="table", raw=options.raw, minimum=4), tmp_path) != first
    assert preprocess(write_log(tmp_path / "log.csv", generated(2)), tmp_path) != first


def test_partitions_are_no_matter(tmp_path, monkeypatch):
    """Seven partitions and six buckets of users give the same result as one of each."""
    options = write_log(tmp_path / "log.csv", generated(3))
    preprocess(options, tmp_path / "one")
    monkeypatch.setattr(ingest, "PARTITION_ROWS", 25)
    monkeypatch.setattr(workflows, "BUCKET_ROWS", 30)
    preprocess(options, tmp_path / "many")
    one, many = (load_data(tmp_path / name) for name in ("one", "many"))
    assert len(list((tmp_path / "many" / "data" / "sequences").glob("part_*.parquet"))) == 6
    assert many.users == one.users
    assert [row.tolist() for row in many.training] == [row.tolist() for row in one.training]
    assert (many.validation.tolist(), many.test.tolist()) == (one.validation.tolist(), one.test.tolist())
    assert (tmp_path / "many/data/items.parquet").read_bytes() == (tmp_path / "one/data/items.parquet").read_bytes()


def test_training_counts_are_of_training_alone(tmp_path):
    """Three users have items 1, 2, 3, 1 in time: 1 and 2 are in training three times, 3 only in validation."""
    rows = [(user, item, stamp) for user in "abc" for stamp, item in enumerate((1, 2, 3, 1))]
    preprocess(write_log(tmp_path / "log.csv", rows), tmp_path)
    catalogue = load_data(tmp_path).catalogue
    counts = {catalogue.raw(item): catalogue.counts[item - 1] for item in (1, 2, 3)}
    assert counts == {b"1": 3, b"2": 3, b"3": 0}


def test_integer_ids_of_parquet_are_as_their_strings(tmp_path):
    """The same log with integer and with string ids gives equal users, items and sequences."""
    frame = pd.DataFrame(generated(5), columns=["user", "item", "timestamp"])
    frame["title"] = "Film " + frame["item"].astype(str)
    contents = []
    for kind in ("int64", "str"):
        folder = tmp_path / kind
        folder.mkdir()
        frame.astype({"user": kind, "item": kind}).to_parquet(folder / "log.parquet")
        preprocess(Preprocessing(dataset="table", raw=folder / "log.parquet", minimum=3), folder)
        names = "items.parquet", "sequences/part_0.parquet"
        contents.append([(folder / "data" / name).read_bytes() for name in names])
    assert contents[0] == contents[1]


def test_other_merlin_tools_understand_the_sequences(tmp_path):
    """Opened as a Merlin data set, the columns have their tags and the training column is a list."""
    preprocess(write_log(tmp_path / "log.csv", generated(1)), tmp_path)
    schema = Dataset(str(tmp_path / "data" / "sequences"), engine="parquet").schema
    assert schema.select_by_tag(Tags.USER_ID).column_names == ["user"]
    assert schema.select_by_tag(Tags.ITEM_ID).column_names == ["training", "validation", "test"]
    assert schema.select_by_tag(Tags.SEQUENCE).column_names == ["training"]
    assert schema["training"].is_list
    assert not schema["test"].is_list


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 1, 1), ("b", 2, 2)], "3-core filtering leaves nothing of 2 interactions"),
        ([("a", item, item) for item in range(9)], "3-core filtering leaves nothing of 9 interactions"),
        ([("a", 1, "noon")], "line 2 has a timestamp that is neither a number nor"),
    ],
)
def test_refused_data_leaves_what_was_there(tmp_path, rows, message):
    """An error writes nothing: no artifact where there was none, and the old one stays where there was one."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    options = write_log(tmp_path / "log.csv", generated(1))
    expected = preprocess(options, good)
    write_log(tmp_path / "log.csv", rows)
    for folder in (good, bad):
        with pytest.raises(InputError, match=message):
            preprocess(options, folder)
    assert load_data(good).statistics == expected
    assert not list(bad.glob("*"))
    assert [path.name for path in good.iterdir()] == ["data"]


def test_titles_of_other_items_are_refused(tmp_path):
    """Ratings and movies that name items differently have no item in common."""
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "1,10,4.0,100\n" * 9)
    (tmp_path / "movies.csv").write_text("movieId,title\ntt10,Film\n")
    with pytest.raises(InputError, match="no item of the interactions has a title"):
        preprocess(Preprocessing(dataset="movielens", raw=tmp_path), tmp_path / "out")


def test_bad_lines_are_skipped_and_counted_on_request(tmp_path, caplog):
    """A line of two fields stops the stage; with ``skip_bad_lines`` the log reports how many lines were skipped."""
    options = write_log(tmp_path / "log.csv", generated(1))
    expected = preprocess(options, tmp_path / "whole")
    with options.raw.open("a") as file:
        file.write("1,2\n")
    with pytest.raises(InputError, match="has 2 fields, not 4; fix the file or use --skip-bad-lines"):
        preprocess(options, tmp_path / "out")
    assert preprocess(replace(options, skip_bad_lines=True), tmp_path / "out") == expected
    assert "log.csv: 1 lines skipped" in caplog.text


def described(folder):
    """Return all contents by raw id, so that the numbering does not matter."""
    data = load_data(folder)
    raw = data.catalogue.raw
    sequences = [
        [raw(int(item)) for item in (*training, validation, test)]
        for training, validation, test in zip(data.training, data.validation, data.test, strict=True)
    ]
    items = {raw(item): data.catalogue.title(item) for item in range(1, len(data.catalogue) + 1)}
    counts = {raw(item): data.catalogue.counts[item - 1] for item in range(1, data.catalogue.trained + 1)}
    return data.users, sequences, items, counts, data.statistics.row()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_appended_batches_equal_a_full_run(tmp_path, seed, suffix):
    """A log in three batches, with late events of old users, differs from a full run only in the numbers of items."""
    rows = generated(seed, users=25, items=14)
    random = np.random.default_rng(seed)
    random.shuffle(rows)
    cuts = [0, *sorted(random.choice(np.arange(90, len(rows)), 2, replace=False)), len(rows)]
    parts = [rows[start:end] for start, end in pairwise(cuts)]
    trained = []
    for place, part in enumerate(parts):
        options = write_log(tmp_path / f"log.{suffix}", part)
        preprocess(replace(options, append=place > 0), tmp_path / "grown")
        catalogue = load_data(tmp_path / "grown").catalogue
        now = [catalogue.raw(item) for item in range(1, catalogue.trained + 1)]
        assert now[: len(trained)] == trained
        trained = now
    preprocess(write_log(tmp_path / f"log.{suffix}", rows), tmp_path / "whole")
    assert described(tmp_path / "grown") == described(tmp_path / "whole")


def append_in_two(folder, first, second, older=False):
    """Preprocess one file, append another, and return the sequence of user u0.

    Args:
        folder: a new folder.
        first: function that writes the earlier rows to a path.
        second: function that writes the later rows to a path.
        older: whether the first artifact is one of 0.1.0, whose manifest does not tell how the times were read.
    """
    for place, write in enumerate((first, second)):
        path = folder / f"{place}.parquet"
        write(path)
        preprocess(Preprocessing(dataset="table", raw=path, append=place > 0), folder)
        if older and place == 0:
            manifest = json.loads((folder / "data" / "manifest.json").read_text())
            del manifest["facts"]["reading"]
            (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    data = load_data(folder)
    return [*data.raw_history(data.users.index("u0")), data.catalogue.raw(int(data.test[0])).decode()]


def typed(rows, unit):
    """Return a function that writes rows with timestamps of a unit."""
    stamps = pa.array(pd.to_datetime(rows["timestamp"], unit="s")).cast(pa.timestamp(unit))
    table = pa.table({"user": rows["user"], "item": rows["item"], "timestamp": stamps, "title": rows["title"]})
    return lambda path: pq.write_table(table, path, version="2.6")


def numbers(rows, scale):
    """Return a function that writes rows with times as numbers."""
    return lambda path: rows.assign(timestamp=rows["timestamp"] * scale).to_parquet(path)


@pytest.mark.parametrize("older", [False, True], ids=["new", "0.1.0"])
def test_an_append_of_another_unit(tmp_path, older):
    """Typed times of another unit are joined, and dates with the seconds of before (pola-rs/polars#22307)."""
    early, late = LOG[~LATE], LOG[LATE]
    for place, (first, second) in enumerate(
        [(typed(early, "us"), typed(late, "ms")), (numbers(early, 1), typed(late, "s"))]
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert append_in_two(folder, first, second, older) == U0
    path = tmp_path / "more.parquet"
    numbers(late, 1000)(path)
    with pytest.raises(InputError, match=r"row 1 has the timestamp 1600000000, .*so convert .*more.parquet to seconds"):
        preprocess(Preprocessing(dataset="table", raw=path, append=True), tmp_path / "1")


@pytest.mark.parametrize("older", [False, True], ids=["new", "0.1.0"])
def test_an_append_of_numbers_in_another_unit_is_refused(tmp_path, older):
    """Seconds, then milliseconds: both are named, with the unit to convert to, and the data set stays as it was."""
    message = r"interactions.parquet: row 1 has the timestamp 1600000000, a time in seconds, and .*1.parquet: row 1 has"
    with pytest.raises(InputError, match=message):
        append_in_two(tmp_path, numbers(LOG[~LATE], 1), numbers(LOG[LATE], 1000), older)
    assert load_data(tmp_path).statistics.interactions == 120


def test_the_manifest_says_what_was_read(tmp_path):
    """By hand: of 241 rows, one has no user, and the twenty of the item without a title are dropped."""
    rows = pd.concat([LOG, LOG.head(1).assign(user=None)])
    (tmp_path / "log").mkdir()
    rows.assign(title=rows["title"].where(rows["item"] != "i3")).to_csv(tmp_path / "log" / "a.csv", index=False)
    (tmp_path / "log" / "README").write_text("about")
    options = Preprocessing(dataset="table", raw=tmp_path / "log", skip_bad_lines=True)
    preprocess(options, tmp_path / "out")
    assert read_report(tmp_path / "out") == {
        "files": [{"path": "a.csv", "format": "CSV", "files": 1, "rows": 240, "skipped": {"no user id": 1}}],
        "unread": ["README"],
        "interactions": 240,
        "times": {
            "kind": "s",
            "number_unit": "s",
            "example": [str(tmp_path / "log" / "a.csv"), "line 2", 1_600_000_000],
            "read_as": "numbers in seconds",
            "first": "2020-09-13T12:26:40Z",
            "last": "2020-09-24T12:26:40Z",
        },
        "titles": {"items": 11, "several": 0, "dropped": {}},
        "dropped": {"of items without a title": 20, "outside the k-core": 0},
    }


def test_files_of_one_name_in_several_folders_are_all_inputs(tmp_path):
    """A change of either file is detected."""
    for place, part in enumerate((LOG[~LATE], LOG[LATE])):
        (tmp_path / "log" / str(place)).mkdir(parents=True)
        part.to_csv(tmp_path / "log" / str(place) / "part.csv", index=False)
    preprocess(Preprocessing(dataset="table", raw=tmp_path / "log"), tmp_path)
    assert set(read_manifest(tmp_path / "data", KIND, "").inputs) == {"0/part.csv", "1/part.csv"}


@pytest.mark.parametrize("delimiter", ["", "::", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter):
    with pytest.raises(InputError, match="--delimiter must be one character, or `tab`"):
        Preprocessing(dataset="table", delimiter=delimiter)


def test_a_batch_is_appended_once(tmp_path):
    """Appending the same file again, for example after an interruption, counts nothing twice."""
    preprocess(write_log(tmp_path / "log.csv", generated(1)), tmp_path / "out")
    batch = replace(write_log(tmp_path / "batch.csv", generated(2)), append=True)
    first = preprocess(batch, tmp_path / "out")
    assert preprocess(batch, tmp_path / "out") == first
    assert first.interactions > 0


def test_nothing_to_append_to_is_said(tmp_path):
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        preprocess(replace(write_log(tmp_path / "log.csv", generated(1)), append=True), tmp_path / "out")


def test_serving_encodes_as_the_saved_workflow(tmp_path):
    """A known id gives Categorify's id - 2; one outside the core and an unknown one give nothing, as null does."""
    rows = [*generated(4), (0, 99, 9)]
    preprocess(write_log(tmp_path / "log.csv", rows), tmp_path)
    catalogue = Catalogue.load(tmp_path / "data" / "items.parquet")
    ids = [*(catalogue.raw(item).decode() for item in range(1, len(catalogue) + 1)), "never seen"]
    assert "99" in ids
    frame = pd.DataFrame({"user": "0", "item": [*ids, None], "timestamp": 0})
    workflow = Workflow.load(str(tmp_path / "data" / "workflow" / "encode"))
    *expected, null = workflow.transform(Dataset(frame)).to_ddf().compute()["item"] - 2
    encoded = [FeatureEncoder(catalogue).encode([raw.encode()]).history.tolist() for raw in ids]
    assert [row[0] if row else 0 for row in encoded] == expected
    assert null == -1


def run_limited(folder, log, megabytes):
    """Run `llamarec preprocess` in a process whose files cannot exceed ``megabytes`` MiB, as if the disk were full."""
    code = (
        "import resource, signal, sys; from llamarec.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({megabytes} << 20,) * 2)\n"
        f"sys.argv[1:] = 'preprocess --dataset table --raw {log} --artifacts {folder}'.split()\n"
        "main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """The interactions alone take more than a megabyte."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"user": random.integers(0, 5000, 400_000), "item": random.integers(0, 5000, 400_000)})
    frame = frame.assign(timestamp=random.integers(10**9, 2 * 10**9 - 4 * 10**8, 400_000), title="Film")
    frame.to_parquet(tmp_path / "log.parquet")
    ended = run_limited(tmp_path / "out", tmp_path / "log.parquet", 1)
    assert ended.returncode == 2
    assert "make room" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "out").iterdir())


def test_artifacts_in_a_folder_whose_name_is_a_pattern(tmp_path):
    """Brackets in the name of the folder are characters, not a pattern (fsspec/filesystem_spec#1476)."""
    options = write_log(tmp_path / "log.csv", generated(1))
    preprocess(options, tmp_path / "plain")
    preprocess(options, tmp_path / "art [v2]")
    assert described(tmp_path / "art [v2]") == described(tmp_path / "plain")


def test_a_folder_that_is_none_is_said(tmp_path):
    """`--artifacts` below a file cannot be created."""
    (tmp_path / "file").write_text("")
    options = write_log(tmp_path / "log.csv", generated(1))
    ended = run_limited(tmp_path / "file" / "out", options.raw, 100)
    assert ended.returncode == 2
    assert "Not a directory" in ended.stderr


def test_a_minimum_below_three_is_refused():
    """Training, validation and test need one item each."""
    with pytest.raises(InputError, match="at least 3, not 2"):
        Preprocessing(minimum=2)


def test_without_data_the_error_names_the_command(tmp_path):
    with pytest.raises(InputError, match="llamarec preprocess"):
        load_data(tmp_path)


def test_movielens_100k(tmp_path):
    """All 943 users of the embedded default have 20 or more ratings; another test compares it with plain pandas."""
    statistics = preprocess(Preprocessing(), tmp_path)
    assert statistics.row() == {
        "dataset": "movielens-100k",
        "users": 943,
        "items": 1349,
        "interactions": 99_287,
        "mean_length": 105.288,
        "density": 0.078049,
    }


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("dataset", "folder", "users", "items", "interactions", "mean_length"),
    [
        ("movielens", "ml-latest-small", 610, 3650, 90_274, 147.990),
        ("amazon", "amazon-2014-beauty", 22_332, 12_086, 198_215, 8.876),
    ],
)
def test_the_papers_statistics(shared_data, tmp_path, dataset, folder, users, items, interactions, mean_length):
    """Table 2 of the paper, with the exact counts of the authors' protocol (the paper rounds ML-100k to "100k")."""
    row = preprocess(Preprocessing(dataset=dataset, raw=shared_data / folder), tmp_path).row()
    assert row["dataset"] == folder
    assert (row["users"], row["items"], row["interactions"]) == (users, items, interactions)
    assert row["mean_length"] == mean_length
    assert row["density"] == pytest.approx(interactions / (users * items), abs=1e-6)
