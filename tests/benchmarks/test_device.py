"""The checks of the GPU path, with tiny shapes on the processor, and the program that runs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import embedded_base, tiny_base
from transformers import AutoModelForCausalLM

from benchmarks.device import __main__ as device
from benchmarks.device import correctness, ensemble, forward, llama_7b, machine, small_models, trainer
from benchmarks.device.reference import Reference, adapted, losses_and_gradients, scores_of
from benchmarks.device.section import Section
from benchmarks.device.shapes import LLAMA_2_7B, TINY, write_model
from experiments import all_prompts
from experiments.kept import read_scores
from experiments.ranker_runs import Run
from models.ranker.inference.ranker import FUSION_FILE
from models.ranker.inference.scorer import Runtime
from models.ranker.inference.torch_scorer import TorchScorer


@pytest.fixture
def section(artifacts: Path, tmp_path: Path) -> Section:
    """Return the inputs of a dry run."""
    return Section(tmp_path / "found.json", tmp_path / "work", embedded_base().parent, artifacts, dry_run=True)


def findings(section: Section) -> Any:
    """Return what a section wrote."""
    return json.loads(section.result.read_text())


@pytest.mark.thorough
def test_the_machine_is_measured(section: Section):
    """Every rate is a positive number; packages that are not installed have no version."""
    machine.measure(section)
    found = findings(section)
    assert found["versions"]["torch"] == torch.__version__
    rates = [*found["copy_bytes_a_second"].values(), *found["matmul_flops"].values(), found["write_bytes_a_second"]]
    assert len(rates) == 5
    assert min(rates) > 0


@pytest.mark.thorough
def test_the_processor_agrees_with_itself(section: Section):
    """In fp32 nothing deviates, since the reference is the same computation; bf16 is within its tolerance."""
    correctness.measure(section)
    found = findings(section)
    rows = [*found["scores"].values(), *(row[part] for row in found["training"].values() for part in row)]
    rows += [found[name] for name in ("after an evaluation", "merged", "resumed")]
    assert len(rows) == 6 + 2 * 8 + 3
    assert all(row["within"] for row in rows)
    exact = {name: row["deviation"] for name, row in found["scores"].items() if name.startswith("float32")}
    assert exact == {"float32 letters": 0, "float32 lines": 0, "float32 independent lines": 0}
    assert found["scores"]["bfloat16 lines"]["deviation"] > 0


def test_a_deviation_is_not_within_its_tolerance():
    """Log-probabilities of two equal logits are -ln 2; of 1 and 0 they are -.3133 and -1.3133: .62 apart at most."""
    value = correctness.deviation(np.array([[1.0, 0.0]]), [[0.0, 0.0]])
    assert value == pytest.approx(1.3133 - 0.6931, abs=1e-4)
    assert correctness.checked(value, 0.1) == {"deviation": 0.62, "tolerance": 0.1, "within": False}
    assert not correctness.checked(float("nan"), 0.1)["within"]
    assert correctness.distance([[3.0, 0.0]], [[0.0, 4.0]]) == pytest.approx(5 / 4)


@pytest.mark.thorough
def test_small_models_are_measured(section: Section):
    small_models.measure(section)
    (rows,) = findings(section).values()
    assert rows["float32"]["bit_equal_when_repeated"]
    assert rows["float32"]["seconds"] > 0
    independent = rows["independent lines, float32"]
    assert independent["slab_rows"]
    assert independent["seconds"].keys() == {"20", "200"}
    for micro_batch in (4, 16):
        step = rows[f"QLoRA, micro-batch {micro_batch}"]
        assert step["prompts_a_second"] == pytest.approx(4 / step["seconds_a_step"])


def test_the_lean_forward_takes_few_operations_a_layer():
    """The goal is 16; transformers takes twice as many at least. Fewer than 10 would be a counter that misses some."""
    counts = forward.operations_a_layer()
    assert 10 <= counts["lean, letters"] < counts["lean, independent lines"] <= forward.GOAL
    assert counts["transformers"] > 2 * counts["lean, independent lines"]


@pytest.mark.thorough
def test_the_trainer_takes_fewer_operations():
    """The goal is a tenth, which independent lines reach; letters have few segments, and four micro-batches become one.

    Fewer than 20 a layer would be a counter that misses some.
    """
    counts = trainer.operations_a_layer()
    for read, less in {"letters": 5, "independent-lines": 10}.items():
        assert 20 < counts[f"{read}, now"] <= counts[f"{read}, before"] / less


@pytest.mark.thorough
def test_the_trainer_is_measured(section: Section):
    """Both ways of each part have a time; on a processor no GPU memory is taken."""
    trainer.measure(section)
    found = findings(section)
    assert found["tiny, letters"]["prompts"] == 4
    for read in trainer.READS:
        for name in ("step, before", "step, now", "validation, before", "validation, now"):
            assert found[f"tiny, {read}"][name]["seconds"] > 0
            assert found[f"tiny, {read}"][name]["peak_bytes"] == 0
    assert found["LRURec, beauty"].keys() == {"gradient, before", "gradient, now"}


@pytest.mark.thorough
def test_the_lean_forward_is_measured(section: Section):
    """In fp32 its scores are those of transformers; in fp8 they are near them. Packed prompts have their bits."""
    forward.measure(section)
    found = findings(section)
    for name in ("letters", "independent lines"):
        assert found["tiny"][f"{name}, float8"]["bit_equal"]
        assert 1e-4 < found["tiny"][f"{name}, float8"]["deviation"] < 0.5
        row = found["tiny"][f"{name}, float32"]
        assert row["bit_equal"]
        assert row["passes"] == {"rows": [512], "together": "prompts"}
        assert row["deviation"] < 1e-4
        assert row["prompts_a_second"] == pytest.approx(1 / row["seconds"]["packed, together"])


@pytest.mark.thorough
def test_the_shape_of_llama_2_7b_is_measured(section: Section):
    """The dry run takes the tiny shape and the first title length, 5 tokens: 20 titles of 6 tokens each."""
    llama_7b.measure(section)
    found = findings(section)
    assert found["figure_3"][0]["generated_tokens"] == 120
    assert found["merge_seconds"] > 0
    assert found["qlora"]["prompts_a_step"] == 4


@pytest.mark.thorough
@pytest.mark.parametrize("read", all_prompts.VARIANTS)
def test_all_prompts_are_trained_and_scored(section: Section, tmp_path: Path, read: str):
    """The scores have the format of the kept files, and the adapter is there to be merged elsewhere."""
    run = Run("ml-latest-small", variant=all_prompts.VARIANTS[read])
    base = tiny_base(tmp_path / "tiny")
    result = all_prompts.execute(
        run, section.artifacts, section.bases, section.work, tmp_path, dry_run=True, base=str(base)
    )
    scores = read_scores(tmp_path / f"{run.name}-tuned.parquet")
    assert scores.splits == ["validation"] * 2 + ["test"] * 2
    assert np.exp(scores.logprobs[0]).sum() == pytest.approx(1, abs=1e-5)
    assert (tmp_path / f"{run.name}-adapter" / "adapter_model.safetensors").exists()
    assert result["test"]["NDCG@10, retriever"] > 0
    assert result["options"]["max_prompts"] == 12
    assert run.options().max_prompts is None


@pytest.mark.slow
def test_the_ensemble_answers_as_offline_and_heals(section: Section):
    """All 8 users' answers are bit-identical at both concurrencies; the language model has half of the weight."""
    ensemble.measure(section, "embedded")
    found = findings(section)
    assert [(row["identical"], row["users"]) for row in found["served_equals_offline"]] == [(8, 8), (8, 8)]
    assert found["perf_analyzer"][0]["throughput"] > 0
    assert found["healing_seconds"] > 0
    assert json.loads((section.work / "embedded-artifacts" / "ranker" / FUSION_FILE).read_text())["weight"] == 0.5


def test_the_weights_of_a_shape_are_counted(tmp_path: Path):
    """The written model loads without missing weights; Llama 2 7B has 6,738,415,616 parameters (its model card).

    Those are its layers, embedding and head of 32,000 tokens, and 65 norms.
    """
    folder = write_model(TINY, embedded_base(), tmp_path, "cpu")
    model, loaded = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    assert matrices == TINY.layers * TINY.layer_weights()
    layers = LLAMA_2_7B.layers * LLAMA_2_7B.layer_weights()
    assert layers + 2 * 32000 * 4096 + 65 * 4096 == 6_738_415_616


@pytest.mark.slow
def test_the_kept_reference_is_what_the_processor_computes():
    """Scores, losses and gradients of the embedded base in fp32; other processors sum in other orders."""
    kept = Reference.read()
    scorer = TorchScorer(embedded_base(), Runtime(threads=torch.get_num_threads()))
    for name, rows in scores_of(scorer, kept.given, 576).items():
        assert correctness.deviation(rows, kept.scores[name]) < 1e-4
    model = adapted(embedded_base(), "none", torch.float32, "cpu")
    for name, loss, sketch in losses_and_gradients(model, kept.given):
        assert loss == pytest.approx(kept.losses[f"none {name}"], rel=1e-5)
        assert correctness.distance(sketch, kept.gradients[f"none {name}"]) < 1e-3


def test_a_section_that_fails_keeps_its_findings_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Three programs record a finding: one then fails, one is stopped at its deadline, and one ends."""
    record = "import pathlib, sys, time\npathlib.Path(sys.argv[sys.argv.index('--result') + 1]).write_text('[1]')\n"
    endings = {"failing": "sys.exit('no such kernel')", "hanging": "time.sleep(60)", "ending": ""}
    for name, ending in endings.items():
        (tmp_path / f"{name}.py").write_text(f"{record}{ending}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    programs = {name: device.Program(name, 1 if name == "hanging" else 30, "") for name in endings}
    monkeypatch.setattr(device, "SECTIONS", programs)
    output = tmp_path / "out"
    assert device.main([*endings, "--dry-run", "--output", str(output)]) == 1
    kept = {name: json.loads((output / f"{name}.json").read_text()) for name in programs}
    assert [row["status"] for row in kept.values()] == ["failed", "stopped at its deadline of 1 s", "finished"]
    assert [row["findings"] for row in kept.values()] == [[1]] * 3
    assert "no such kernel" in kept["failing"]["output"]
    assert kept["ending"]["commit"]
    assert sorted(path.name for path in output.iterdir()) == ["ending.json", "failing.json", "hanging.json"]
    assert "no such kernel" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["machine"], "; --dry-run runs the sections on the processor"),
        (["no-such"], "there is no section no-such: choose from machine, correctness"),
    ],
)
def test_wrong_calls_get_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str):
    with pytest.raises(SystemExit):
        device.main(arguments)
    assert sentence in capsys.readouterr().err


def test_without_a_section_the_program_lists_them(capsys: pytest.CaptureFixture[str]):
    assert device.main([]) == 0
    assert capsys.readouterr().out.count("\n") == len(device.SECTIONS)
