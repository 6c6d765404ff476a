"""The comparison with other libraries: their input, what is recorded of a training, and the tables."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.peers.__main__ import SYSTEMS, System, main, read_kept, read_training
from benchmarks.peers.report import markdown, seconds_an_epoch, seconds_to, times_longer
from benchmarks.peers.training import FACTS, PATIENCE, RANKS, Peer, Recorder, interactions, right_padded
from preprocessing.errors import InputError

OURS = [
    {"epochs": 4, "steps": 8, "seconds": 40.0, "recall": 0.02},
    {"epochs": 8, "steps": 16, "seconds": 80.0, "recall": 0.05},
    {"epochs": 12, "steps": 24, "seconds": 140.0, "recall": 0.04},
]
THEIRS = [
    {"epochs": 1, "steps": 4, "seconds": 300.0, "recall": 0.01},
    {"epochs": 2, "steps": 8, "seconds": 600.0, "recall": 0.03},
]


def test_interactions_regroup_to_the_sequences():
    """A library that groups the rows by user and sorts them by position reads our sequences."""
    sequences = [np.array(items, np.int32) for items in ([3, 1, 2], [2], [1, 3])]
    columns = interactions(sequences)
    shuffled = np.random.default_rng(0).permutation(6)
    user, item, position = (columns[name][shuffled] for name in ("user", "item", "position"))
    for number, items in enumerate(sequences):
        rows = user == number
        assert item[rows][np.argsort(position[rows])].tolist() == items.tolist()


def test_right_padding_keeps_the_order():
    """RecBole pads on the right and reads the state of the last item by the number of items."""
    rows, lengths = right_padded(torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]))
    assert rows.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert lengths.tolist() == [2, 4]


def test_a_peer_ranks_our_item_numbers():
    """A library numbers the items 3, 1 as 1, 2 and does not know item 2.

    A history's state is the vector of its last item. After item 1 (the library's 2: [0, 1]) item 3 scores 0.5; item 4
    (the library's 3: [1, 0]) scores 0, so item 3 has rank 1 and item 4 rank 2. Item 2 is never retrieved: rank 0.
    """
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.0, 1.0], [1.0, 0.0]])
    peer = Peer(
        torch.nn.Identity(), lambda items: vectors[items[:, -1]], lambda: vectors, torch.tensor([0, 2, 0, 1, 3])
    )
    histories = [np.array([1], np.int32)] * 3
    assert peer.rank(histories, np.array([3, 4, 2], np.int32)).tolist() == [1, 2, 0]


def test_training_time_is_that_of_the_steps_alone():
    """Four steps end at 10, 12, 14 and 16 s: 6 s for three of them are 8 s for all, whatever a validation takes."""
    times = iter([10.0, 12.0, 14.0, 16.0, 116.0, 118.0, 120.0, 122.0])
    recorder = Recorder("test", lambda: next(times), limit_s=15)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for reached, better, stopped in ((0.02, True, None), (0.01, False, "limit")):
        for _ in range(4):
            weight.grad = torch.ones(1)
            optimizer.step()
        assert recorder.validated(len(recorder.curve) + 1, reached) == better
        assert recorder.stopped == stopped
    assert [(point.steps, point.seconds) for point in recorder.curve] == [(4, 8.0), (8, 16.0)]
    times = iter(range(1_000_000))
    recorder = Recorder("test", lambda: float(next(times)), limit_s=1e9)
    for reached in (0.02, 0.02):
        for _ in range(PATIENCE):
            optimizer.step()
        recorder.validated(len(recorder.curve) + 1, reached)
    assert recorder.stopped == "patience"


def test_time_to_the_same_quality():
    """Ours reaches 0.03 at its second validation, after 80 s; theirs after 600 s, and 0.05 not within 600 s."""
    assert seconds_an_epoch(OURS) == 10  # of 10, 10 and 15
    assert (seconds_to(OURS, 0.03), seconds_to(THEIRS, 0.05)) == (80, None)
    assert times_longer(OURS, THEIRS, 0.03) == (7.5, True)
    assert times_longer(OURS, THEIRS, 0.05) == (7.5, False)
    assert times_longer(OURS, THEIRS, 0.06) is None


def test_the_tables_say_what_is_a_lower_bound():
    facts = {"peak_mib": 500, "stopped": "limit", "test": {"Recall@10": 0.04, "NDCG@10": 0.02}}
    table = markdown({"ours": {**facts, "curve": OURS}, "RecTools": {**facts, "curve": THEIRS}})
    assert "| RecTools | 4 | 300.0 | 500 MiB | 10.0 (the limit) | 0.0300 | 0.0400 | 0.0200 |" in table
    assert "| 0.0250 (50% of 0.0500) | 1.3 | 10.0 (7.5 times ours) |" in table
    assert "| 0.0500 (100% of 0.0500) | 1.3 | not within 10.0 (at least 7.5 times ours) |" in table
    assert "0.0600" in markdown({"RecTools": {**facts, "curve": THEIRS}}, target=0.06)


def test_ranks_become_our_metrics(tmp_path: Path):
    """Ranks 1, 10 and 0 (not ranked): Recall@10 is 2/3 and NDCG@10 (1 + 1 / log2(11)) / 3."""
    (tmp_path / FACTS).write_text(json.dumps({"stopped": "limit"}))
    pq.write_table(pa.table({"user": ["a", "b", "c"], "rank": np.array([1, 10, 0], np.int32)}), tmp_path / RANKS)
    read = read_training(tmp_path)
    assert read["stopped"] == "limit"
    assert read["test"]["Recall@10"] == pytest.approx(2 / 3, abs=1e-5)
    assert read["test"]["NDCG@10"] == pytest.approx((1 + 1 / np.log2(11)) / 3, abs=1e-5)


def test_results_of_other_settings_are_not_mixed(tmp_path: Path):
    kept: dict[str, Any] = {"settings": {"limit_minutes": 20}, "systems": {"ours": {}}}
    path = tmp_path / "peers.json"
    assert read_kept(path, {"limit_minutes": 20}, again=False) == {}
    path.write_text(json.dumps(kept))
    assert read_kept(path, {"limit_minutes": 20}, again=False) == {"ours": {}}
    with pytest.raises(InputError, match="other settings"):
        read_kept(path, {"limit_minutes": 30}, again=False)
    assert read_kept(path, {"limit_minutes": 30}, again=True) == {}


def test_a_missing_environment_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is found before the first training, not after hours."""
    monkeypatch.setitem(SYSTEMS, "RecBole", System("recbole", tmp_path / "python"))
    monkeypatch.setattr("benchmarks.peers.__main__.load_data", lambda _: SimpleNamespace(name="", fingerprint=""))
    monkeypatch.setattr("sys.argv", ["peers", "--artifacts", str(tmp_path), "--results", str(tmp_path / "new.json")])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "`make peers`" in said


def test_missing_data_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["peers", "--artifacts", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.count("\n") == 1
