"""`llamarec feedback`: from two releases and what their users did to a table, JSON and a plot; and what is refused."""

import json
import random
import re
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answer_log import START_MS, shown, write_events, write_log

from stores.address import open_store
from stores.store import Event

ITEMS = [str(item) for item in range(1, 41)]
DAY = 86_400


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Path, Path]:
    """Return a log and a file of events. 800 users with a favourite see 2 answers of 5 items on two days. Release r2, a
    canary for a quarter of them, shows the favourite in 3 of 4 answers, first; r1 in 1 of 2, at the fourth place, which
    was the retriever's first. A favourite that is shown is taken a second later.
    """
    chance = random.Random(5)
    answers, events = [], []
    for number in range(800):
        user, release, favourite = f"user {number}", "r2" if number % 4 == 0 else "r1", chance.choice(ITEMS)
        for day in range(2):
            others = chance.sample([item for item in ITEMS if item != favourite], 5)
            second, ranks = day * DAY + number * 10, [1, 2, 3, 4, 5]
            if release == "r2" and chance.random() < 3 / 4:
                others[0] = favourite
            elif release == "r1" and chance.random() < 1 / 2:
                others[3], ranks = favourite, [2, 3, 4, 1, 5]
            answers.append(shown(user, second, others, release=release, ranks=ranks))
            if favourite in others:
                events.append((user, favourite, second + 1))
    folder = tmp_path_factory.mktemp("feedback")
    write_log(folder / "log", answers[:700])
    write_log(folder / "log", answers[700:], name="2.parquet")
    (folder / "log" / ".3.parquet.17.partial").write_bytes(b"PAR1 being written")
    return folder / "log", write_events(folder / "events.csv", events)


def test_the_better_release_is_found(run, experiment, tmp_path):
    """The true hit rates are 3/4 and 1/2, the true MRR 3/4 and 1/8: the intervals contain them, and the differences.
    The plot is a PNG.
    """
    log, events = experiment
    arguments = ["feedback", "--answers", log, "--events", events, "--window", "60", "--plot", tmp_path / "plot.png"]
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["dataset"], found["answers"], found["window_s"]) == ("ml", 1600, 60)
    assert found["followed_answers"] == found["taken_items"] == sum(row["hits"] for row in found["releases"])
    rows = {row["release"]: row for row in found["releases"]}
    for name, hit_rate, mrr in (("r1", 1 / 2, 1 / 8), ("r2", 3 / 4, 3 / 4)):
        assert rows[name]["hit_rate"]["low"] < hit_rate < rows[name]["hit_rate"]["high"]
        assert rows[name]["mrr"]["low"] < mrr < rows[name]["mrr"]["high"]
    assert rows["r1"]["moved"]["places"] == {"value": -3, "low": -3, "high": -3}
    (difference,) = found["differences"]
    assert (difference["release"], difference["baseline"]) == ("r2", "r1")
    for estimates in (difference, difference["weighted"]):
        assert 0 < estimates["hit_rate"]["low"] < 1 / 4 < estimates["hit_rate"]["high"]
        assert 0 < estimates["mrr"]["low"] < 5 / 8 < estimates["mrr"]["high"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_which_release_is_better(run, experiment):
    log, events = experiment
    code, out, _ = run("feedback", "--answers", log, "--events", events)
    assert code == 0
    assert "1,600 answers to users with an id" in out
    assert "within 3,600 s" in out
    assert "r2 minus r1" in out
    assert "more is taken from r2" in out


def test_events_of_a_store_are_those_of_a_file(run, experiment, tmp_path):
    """The same events, recorded in a store: the same figures."""
    log, events = experiment
    address = f"sqlite:///{tmp_path}/store"
    lines = [line.split(",") for line in events.read_text().splitlines()[1:]]
    with closing(open_store(address)) as store:
        store.record([(user.encode(), [Event(item.encode(), int(time))]) for user, item, time in lines])
    of_file, of_store = (
        json.loads(run("feedback", "--answers", log, "--events", source, "--json")[1]) for source in (events, address)
    )
    assert of_file == of_store


def test_equal_releases_do_not_differ(run, tmp_path):
    """What a difference of the observed size takes is said: r1 has 30 hits of 100, r2 31."""
    answers = [shown(f"{n}", n, ["a", "b"], release=f"r{1 + n % 2}") for n in range(200)]
    events = [(f"{n}", "b", n + 0.5) for n in range(200) if n // 2 < (31 if n % 2 else 30)]
    log = write_log(tmp_path / "log", answers)
    code, out, _ = run("feedback", "--answers", log, "--events", write_events(tmp_path / "events.csv", events))
    assert code == 0
    assert "the hit rates do not differ, as far as these answers can tell; a difference of this size takes about" in out


# --- refusals


def foreign(folder: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), folder / "2.parquet")


def cut_off(folder: Path) -> None:
    whole = (folder / "1.parquet").read_bytes()
    (folder / "2.parquet").write_bytes(whole[: len(whole) // 2])


def of_another_data_set(folder: Path) -> None:
    write_log(folder, [shown("ann", 0, ["a"])], name="2.parquet", dataset="beauty")


LOG = [shown(f"{number}", number, ["a", "b", "c"]) for number in range(100)]
HITS = [(f"{number}", "a", number + 0.5) for number in range(50)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (foreign, r"2.parquet is no file of a log of answers: move it out"),
        (cut_off, r"2.parquet is no whole Parquet file: move it out"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt is no whole Parquet file"),
        (lambda folder: (folder / "sub").mkdir(), "is no file of a log of answers"),
        (of_another_data_set, "2.parquet has answers of data set 'beauty', and 1.parquet those of 'ml'"),
        (
            lambda folder: (folder / "1.parquet").unlink(),
            "has no answers: start the server with `llamarec serve --answer",
        ),
        (
            lambda folder: write_log(folder, [shown(None, 0, ["a"])]),
            "none of the 1 answers in .* names a user: send USER_ID with the requests, and export the repository again",
        ),
    ],
)
def test_a_folder_that_is_no_log_is_refused(run, tmp_path, spoil, message):
    log = write_log(tmp_path / "log", LOG)
    events = write_events(tmp_path / "events.csv", HITS)
    spoil(log)
    refused(run("feedback", "--answers", log, "--events", events), message)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            [("stranger", "a", 1)],
            "none of the 100 users of the answers has an event in .*events.csv: give the events of",
        ),
        (
            [(user, item, second - 7200) for user, item, second in HITS],
            "all 50 events of these users are before the answers to them: the last event is of 2026-03-01T22:00:49.*"
            " the first answer of 2026-03-02T00:00:00.* set the clocks",
        ),
        (
            [(user, item, second + 7200) for user, item, second in HITS],
            r"no event followed an answer within 3,600 s; the soonest came after 7,200 s: give a longer --window",
        ),
        (
            [(user, f"ASIN{place}", second) for place, (user, _, second) in enumerate(HITS)],
            "none of the 50 items of the events was ever shown: give the events of data set 'ml'",
        ),
        (HITS[:4], "4 of the 100 answers of r1 showed .* too few to tell anything: about 10 are needed, .* about 250"),
        ([("1", "z", 2)], "0 of the 100 answers of r1 .* collect at least 334 answers"),
    ],
)
def test_events_that_tell_nothing_are_refused(run, tmp_path, events, message):
    log = write_log(tmp_path / "log", LOG)
    refused(run("feedback", "--answers", log, "--events", write_events(tmp_path / "events.csv", events)), message)


def test_a_store_or_artifacts_of_another_data_set_are_refused(run, tmp_path):
    address = f"sqlite:///{tmp_path}/store"
    with closing(open_store(address, dataset="beauty")) as store:
        store.record([(b"1", [Event(b"a", START_MS + 1500)])])
    log = write_log(tmp_path / "log", LOG)
    message = "has the events of data set 'beauty', and the answers are of 'ml': name the events of the same data set"
    refused(run("feedback", "--answers", log, "--events", address), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answers", "/nowhere"], "/nowhere is not a folder: name the one that `llamarec serve --answers` was given"),
        (["--events", "/nowhere.csv"], "/nowhere.csv does not exist"),
        (["--events", "ftp://ann:secret@x"], "is not the address of a store"),
        (["--window", "0"], "--window is 0: give a number of seconds above 0"),
        (["--window", "nan"], "--window is nan"),
        (["--item-column", "asin"], "asin"),
    ],
)
def test_options_that_cannot_be_used_are_refused(run, tmp_path, arguments, message):
    log, events = write_log(tmp_path / "log", LOG), write_events(tmp_path / "events.csv", HITS)
    given = {"--answers": log, "--events": events} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    refused(run("feedback", *(part for pair in given.items() for part in pair)), message, secret="secret")


def test_times_that_only_order_are_refused(run, tmp_path):
    log = write_log(tmp_path / "log", LOG)
    (tmp_path / "events.csv").write_text("user,item,timestamp\n1,a,1\n1,a,2\n")
    refused(
        run("feedback", "--answers", log, "--events", tmp_path / "events.csv"),
        "the times of .*events.csv are numbers that only order its events: give times of the clock",
    )


def refused(result: tuple[int, str, str], message: str, secret: str = "no such text") -> None:
    """One sentence on standard error, nothing on standard output, and exit code 2."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert secret not in err
