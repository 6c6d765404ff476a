"""The benchmark of the stores runs, and its figures are of the events that it made up."""

import json

import pyarrow.parquet as pq
import pytest

from benchmarks import state


def test_made_up_users_have_fifty_events_each_in_the_order_of_time(tmp_path):
    state.made_up_events(["a", "b"], 7, tmp_path / "events.parquet")
    table = pq.read_table(tmp_path / "events.parquet")
    assert table["user"].to_pylist() != sorted(table["user"].to_pylist())
    assert table["timestamp"].to_pylist() == sorted(table["timestamp"].to_pylist())
    assert {row["counts"] for row in table["user"].value_counts().to_pylist()} == {50}
    assert set(table["item"].to_pylist()) == {"a", "b"}


@pytest.mark.thorough
def test_the_benchmark_measures_a_store(repository, tmp_path, monkeypatch, capsys):
    """Each rate counts at least one request; 60 users of 50 events take more bytes than 8 an event."""
    monkeypatch.setattr(state, "SECONDS", 0.5)
    monkeypatch.setattr(state, "CLIENTS", 2)
    monkeypatch.setenv("LLAMAREC_STORE", "")
    arguments = ["--repository", str(repository), "--users", "60", "--requests", "10", "--json"]
    monkeypatch.setattr("sys.argv", ["state", *arguments, "--store", f"sqlite:///{tmp_path}/store"])
    state.main()
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["store"], row["users"]) == ("sqlite", 60)
    assert row["bytes_a_user"] > 8 * 50
    assert min(row["bulk_events_a_second"], row["events_a_second_of_100"], row["requests_a_second_of_1"]) > 0
    assert {name for name in row if name in state.FLOORS} == set(state.FLOORS)
