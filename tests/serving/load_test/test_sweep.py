"""Ranges of load, the comparison of two measurements, and the report of a load test."""

from dataclasses import replace

import pytest

from preprocessing.errors import InputError
from serving.load_test.perf_analyzer import Row, write_csv
from serving.load_test.report import Measured, write_report
from serving.load_test.sweep import Bench, bench, compare
from serving.server.step_times import StepTime

STEPS = {"features": StepTime(0.1, 1.0), "ranker": StepTime(2.0, 500.0)}
ROWS = [
    Row("concurrency", 1, 2.0, 500, 510, 520, 530, 0.02, STEPS),
    Row("concurrency", 2, 2.2, 900, 910, 920, 930, 0.30, STEPS),
]


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({"concurrency": "1:4"}, [1, 2, 3, 4]),
        ({"concurrency": "3"}, [3]),
        ({"concurrency": "1:9:4"}, [1, 5, 9]),
        ({"rate": "0.5:1.5:0.5"}, [0.5, 1, 1.5]),
    ],
)
def test_ranges(options, loads):
    """A range is FIRST:LAST, FIRST:LAST:STEP or one number, and includes both ends."""
    assert Bench(**options).loads() == loads


@pytest.mark.parametrize("text", ["", "0:4", "4:1", "a:b", "1:2:0", "1:2:3:4", "1.5", "-1"])
def test_no_ranges(text):
    """The error for an invalid range names the option and the notation."""
    with pytest.raises(InputError, match=r"--concurrency .* FIRST:LAST"):
        Bench(concurrency=text).loads()


def test_a_gateway_has_an_address_and_a_server(tmp_path):
    """The address is that of plain HTTP, and the servers are needed for the times of the steps."""
    assert Bench(gateway="http://127.0.0.1:8090/").gateway_address() == "127.0.0.1:8090"
    for wrong in ("127.0.0.1:8090", "https://a:1", "http://a", "http://a:1/v1"):
        with pytest.raises(InputError, match="is no address of a gateway"):
            Bench(gateway=wrong).gateway_address()
    with pytest.raises(InputError, match="--gateway needs --servers"):
        bench(Bench(gateway="http://127.0.0.1:8090"), tmp_path, tmp_path, (), tmp_path)


def test_a_difference_counts_only_beyond_the_noise(tmp_path):
    """A difference is reported only if it exceeds the spread of the windows.

    At load 1 latency fell by 20 % with a spread of 2 %; at load 2 it fell by 10 % with a spread of 30 %.
    """
    write_csv(ROWS, tmp_path / "a.csv")
    faster = [replace(ROWS[0], p50_ms=400, throughput=2.5), replace(ROWS[1], p50_ms=810)]
    write_csv([*faster, replace(ROWS[0], load=9)], tmp_path / "b.csv")
    first, second = compare(tmp_path / "a.csv", tmp_path / "b.csv")
    assert first == ["1", 2.0, 2.5, 1.25, 500, 400, 0.8, "better"]
    assert second[-1] == "within the noise of 30%"
    assert compare(tmp_path / "b.csv", tmp_path / "a.csv")[0][-1] == "worse"
    write_csv([replace(ROWS[0], load=7)], tmp_path / "c.csv")
    with pytest.raises(InputError, match="no load in common"):
        compare(tmp_path / "a.csv", tmp_path / "c.csv")


@pytest.mark.thorough
def test_the_report_stands_alone_and_says_what_is_unstable(tmp_path):
    """The report loads nothing from outside the file, names the unstable load, and escapes markup in a name."""
    write_report(Measured("a<b", "llamarec", ROWS, [3, 10, 200]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 4
    assert "a&lt;b" in text
    assert 'src="http' not in text
    assert "<link" not in text
    assert "<script" not in text
    assert "At requests in flight 2 the three windows" in text
    write_report(Measured("a", "llamarec", ROWS[:1], [3]), tmp_path / "stable.html")
    assert "Not stable" not in (tmp_path / "stable.html").read_text()
