"""The page of the GPU checks, from files written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import gpu_page


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty page, whose kept files are in a temporary folder."""
    path = tmp_path / "gpu.md"
    path.write_text("<!-- sections --><!-- end of sections -->\n")
    monkeypatch.setattr(gpu_page, "PAGE", path)
    monkeypatch.setattr(gpu_page, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(gpu_page, "RANKERS", tmp_path / "rankers")
    return path


def written(folder: Path, section: str, findings: dict[str, Any], **changed: Any) -> None:
    """Write a section's file as `python -m benchmarks.device` does."""
    folder.mkdir(exist_ok=True)
    facts = {"card": "NVIDIA H100", "driver": "580.1", "date": "2026-12-01", "commit": "abc", "status": "finished"}
    (folder / f"{section}.json").write_text(json.dumps({"section": section, **facts, **changed, "findings": findings}))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_page", *arguments])
    gpu_page.main()


def test_a_section_without_a_file_is_not_run(page: Path, monkeypatch: pytest.MonkeyPatch):
    """The page never leaves a section out: twelve of them, twelve times "not run"."""
    run(monkeypatch)
    assert page.read_text().count("| not run |") == len(gpu_page.SECTIONS) == 12


def test_the_figures_name_card_driver_date_and_commit(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Deviations are shown with their tolerance and verdict: .00002 is within .0001, .2 is not within .1."""
    within = {"deviation": 0.00002, "tolerance": 0.0001, "within": True}
    beyond = {"deviation": 0.2, "tolerance": 0.1, "within": False}
    findings = {
        "scores": {"float32 letters": within, "bfloat16 lines": beyond},
        "training": {"nf4 letters, float32": {"loss": within, "gradient": within}},
        **dict.fromkeys(("after an evaluation", "merged", "resumed"), within),
    }
    written(tmp_path / "new", "correctness", findings)
    run(monkeypatch, "--from", str(tmp_path / "new"))
    text = page.read_text()
    assert "NVIDIA H100, driver 580.1, 2026-12-01, commit abc." in text
    assert "| scores, float32 letters | 2e-05 (at most 0.0001: met) |" in text
    assert "| scores, bfloat16 lines | 0.2 (at most 0.1: **not met**) |" in text
    assert text.count("| not run |") == 11


def test_the_lean_forward_stands_beside_transformers(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """.002 s a prompt in transformers, .001 alone and .0005 packed, which is 2,000 prompts a second."""
    row = {
        "seconds": {"transformers": 0.002, "packed, alone": 0.001, "packed, together": 0.0005},
        "prompts_a_second": 2000.0,
        "share_of_matmul": 0.7,
        "passes": {"rows": [512, 1024], "together": "prompts"},
        "bit_equal": True,
    }
    found = {"operations_a_layer": {"transformers": 34}, "tiny": {"letters, float16": row}}
    written(tmp_path / "new", "forward", found)
    run(monkeypatch, "--from", str(tmp_path / "new"))
    text = page.read_text()
    assert "| operations a layer, transformers | 34 |" in text
    assert "| tiny, letters, float16: transformers | 2.0 ms a prompt |" in text
    assert "| tiny, letters, float16: lean, packed | 2000 prompts/s, 0.70 of the matrix product's rate |" in text
    assert "| tiny, letters, float16: passes | 512, 1024 tokens; bits equal those alone |" in text


def test_the_trainer_stands_beside_what_it_was(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """16 prompts in .4 s are 40 a second."""
    now = {"seconds": 0.4, "peak_bytes": 3 << 30}
    found = {
        "operations_a_layer": {"letters, now": 90},
        "tiny, letters": {"tokens": 900, "prompts": 16, "step, now": now},
        "LRURec, beauty": {"gradient, before": 0.0123},
    }
    written(tmp_path / "new", "training", found)
    run(monkeypatch, "--from", str(tmp_path / "new"))
    text = page.read_text()
    assert "| operations a layer, 16 prompts, letters, now | 90 |" in text
    assert "| tiny, letters: step, now | 400 ms, 40.0 prompts/s, 3.0 GiB |" in text
    assert "| LRURec, beauty: gradient, before | 12.3 ms |" in text


def test_a_section_that_was_stopped_says_so(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / "kept", "llama-7b", {"write_seconds": 1.0}, status="stopped at its deadline of 360 s")
    run(monkeypatch)
    assert "The section stopped at its deadline of 360 s; its findings until then are in `llama-7b.json`." in (
        page.read_text()
    )


def test_files_of_a_dry_run_are_refused(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Their figures say nothing about a GPU. Nothing is kept then."""
    written(tmp_path / "new", "machine", {}, driver="")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--from", str(tmp_path / "new"))
    assert "is of a dry run: keep files of a GPU only" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
