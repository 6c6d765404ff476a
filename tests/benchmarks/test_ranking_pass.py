"""What the hardware's limit of a ranking request is computed from."""

import json
from pathlib import Path

import pytest

from benchmarks import ranking_pass


def test_operations_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Width 4, one of two heads for keys and values, inner width 6: 2 * 16 + 2 * 8 + 3 * 24 = 120 weights a layer.

    Three layers over five tokens: 3 * (2 * 120 * 5 + 2 * 4 * 5 * 5), products of the weights and half of attention.
    """
    config = {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(ranking_pass, "embedded_base", lambda: tmp_path)
    assert ranking_pass.operations([1] * 5) == 3 * (2 * 120 * 5 + 2 * 4 * 5 * 5)
