"""The paper's figures are copied by hand; its tables say some of them twice."""

from experiments.paper import METRICS, TABLE_1, TABLE_3, TABLE_4, TABLE_4_METRICS
from models.metrics import summary


def test_columns_are_those_of_the_metrics():
    assert list(METRICS) == list(summary([1]))
    for table in (TABLE_1, TABLE_3):
        assert all(len(figures) == len(METRICS) for rows in table.values() for figures in rows.values())


def test_table_4_repeats_llamarec_from_table_1():
    row = dict(zip(METRICS, TABLE_1["amazon-2014-beauty"]["llamarec"], strict=True))
    assert TABLE_4["LlamaRec, 7B"] == tuple(f"{row[name]:.4f}" for name in TABLE_4_METRICS)
