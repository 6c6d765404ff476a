"""Says which models the graph of :mod:`models.ranker.inference.openvino_scorer` computes, without OpenVINO."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNSUPPORTED = "OpenVINO runs LlamaForCausalLM without biases and rope scaling only: export with --runtime torch"


def openvino_runs(folder: Path) -> bool:
    """Return whether OpenVINO's graph computes the model in a Hugging Face folder."""
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        config["architectures"] == ["LlamaForCausalLM"]
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
        and config.get("hidden_act", "silu") == "silu"
        and rope.get("rope_type", rope.get("type", "default")) == "default"
    )
