"""What `llamarec refresh` prints and how it exits."""

import errno
import json

import pytest

from llamarec.commands.release import controls
from llamarec.refresh import run as stage
from serving.errors import ServerUnreachable

FIGURES = {"candidate": 0.5, "serving": 0.4, "mean": 0.1, "low": -0.1, "high": 0.3}
REPORT = {
    "dataset": "shop",
    "artifacts": "artifacts/shop-2",
    "serving": "r1",
    "new_events": 1200,
    "unknown_to_serving": 7,
    "comparisons": [{"stage": "retrieval", "users": 300, "ndcg": FIGURES, "recall": FIGURES, "worse": False}],
    "accepted": True,
    "release": "r2",
    "promoted": "current",
}
WORSE = {"accepted": False, "release": None, "promoted": None, "artifacts": "artifacts/shop-refused"}
WORSE["comparisons"] = [{**REPORT["comparisons"][0], "worse": True}]


@pytest.mark.parametrize(
    ("changed", "code", "sentence"),
    [
        ({}, 0, "r2 is not worse than r1 and is served now; its artifacts are artifacts/shop-2"),
        ({"promoted": "canary"}, 0, "r2 is not worse than r1 and is the canary now"),
        ({"promoted": None}, 0, "no server runs: `llamarec release promote r2 --repository releases` promotes it"),
        (WORSE, 3, "the candidate is worse than r1 in retrieval: it is not released, r1 is still served"),
    ],
    ids=["promoted", "canary", "built", "refused"],
)
def test_a_verdict_is_printed_and_is_the_exit_code(run, monkeypatch, changed, code, sentence):
    """The table has both metrics with their intervals; --json prints the report."""
    given = []

    def refresh(options, *_):
        given.append(options)
        return {**REPORT, **changed}

    monkeypatch.setattr(stage, "refresh", refresh)
    found, printed, _ = run("refresh", "--events", "new.csv", "--canary", "--least-users", 30)
    assert found == code
    assert sentence in printed
    assert "1,200 new events" in printed
    assert "7 times is an item that r1 does not know" in printed
    assert printed.count("+0.1000 [-0.1000, +0.3000]") == 2
    assert (given[0].canary, given[0].least_users, given[0].judge_users) == (True, 30, 200)
    assert str(given[0].source.events) == "new.csv"
    found, printed, _ = run("refresh", "--store", "sqlite:///x", "--json")
    assert (found, json.loads(printed)) == (code, {**REPORT, **changed})
    assert (given[1].source.events, given[1].source.store) == (None, "sqlite:///x")


def test_without_events_nothing_is_done(run, monkeypatch):
    monkeypatch.delenv("LLAMAREC_STORE", raising=False)
    code, _, errors = run("refresh")
    assert code == 2
    assert "give a file with --events, or the address of a store" in errors


def test_a_full_disk_is_one_sentence(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "artifacts/.shop.refresh/data")

    monkeypatch.setattr(stage, "refresh", full)
    code, _, errors = run("refresh", "--events", "new.csv")
    assert code == 2
    assert "No space left on device: 'artifacts/.shop.refresh/data': make room" in errors


def test_servers_may_be_all_addresses_of_a_name(monkeypatch, tmp_path):
    """A headless service has one address for each server; a name without any is an error that names it."""
    monkeypatch.setenv("LLAMAREC_ADMIN_KEY", "key")
    monkeypatch.setattr("llamarec.commands.release.resolve", lambda name: [f"10.0.0.1:{name[-4:]}", "10.0.0.2:8000"])
    found = [control.url for control in controls(tmp_path, "dns:///shop:8000,10.0.0.3:8000")]
    assert found == ["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]
    monkeypatch.undo()
    with pytest.raises(ServerUnreachable, match=r"dns:///nobody.invalid:8000 cannot be resolved"):
        controls(tmp_path, "dns:///nobody.invalid:8000")
