"""The ranker's stage on a tiny base and made-up data: what it writes, when it refuses, and that it learns."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranker_artifacts import CATALOGUE, candidate_table, made_up, write_artifacts
from safetensors import safe_open
from tiny import tiny_base
from transformers import get_linear_schedule_with_warmup

from models.checkpoint import Checkpoint
from models.ranker import training
from models.ranker.examples.sampling import Example
from models.ranker.examples.sets import validation_examples
from models.ranker.fitting import loop
from models.ranker.fitting.qlora import load_base
from models.ranker.inference.ranker import Ranker, write_runtime
from models.ranker.inference.scorer import Runtime
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import Prompt, PromptSettings
from models.ranker.training import TRAINING_FOLDER, train_ranker
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError

LETTERS = list(range(49, 69))
BRIEF = RankerTraining(max_prompts=8, batch_size=4, micro_batch_size=2, validation_users=3, validate_every=1, threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_artifacts(tmp_path, monkeypatch)


def test_the_stage_writes_a_ranker_that_serves(artifacts: Path, base: str):
    """The stage writes all files for the export, and the merged model passes its own probes in the served runtime."""
    metrics = train_ranker(BRIEF, artifacts, base)
    folder = artifacts / "ranker"
    files = {f"{name}.json" for name in ("fusion", "manifest", "metrics", "probes", "prompt", "verbalizer")}
    assert {path.name for path in folder.iterdir()} == {"adapter", "curves.png", "merged", *files}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert [row["step"] for row in metrics["training"]] == [0, 1, 2]
    assert metrics["validation"]["users"] == metrics["sample"]["users"] == 2
    assert [path.name for path in (artifacts / TRAINING_FOLDER).iterdir()] == ["tensorboard", "curves.png"]
    assert json.loads((folder / "prompt.json").read_text())["max_history"] == 20
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 2 * 2 * 2  # two matrices for each of two projections in each of two layers
    write_runtime(folder, Runtime())
    ranker = Ranker.load(folder)
    assert ranker.weight == metrics["weight"]
    assert set(read_manifest(folder, "ranker", "").inputs) == {"data", "retriever", "base"}


def test_a_cut_base_that_reads_lines_is_stored_and_serves(artifacts: Path, base: str):
    """With one of the base's two layers, adapters, weights and configuration have no other, and the probes match."""
    metrics = train_ranker(replace(BRIEF, read="lines", depth=1, validate_by="fused"), artifacts, base)
    folder = artifacts / "ranker"
    assert json.loads((folder / "merged" / "config.json").read_text())["num_hidden_layers"] == 1
    with safe_open(folder / "merged" / "model.safetensors", "pt") as merged:
        assert {name.split(".")[2] for name in merged.keys() if ".layers." in name} == {"0"}  # noqa: SIM118
    assert len(json.loads((folder / "verbalizer.json").read_text())["direction"]) == 64
    write_runtime(folder, Runtime())
    ranker = Ranker.load(folder)
    probe = json.loads((folder / "probes.json").read_text())[0]
    logits = ranker.logits(Prompt(probe["tokens"], probe["line_ends"]))
    assert logits - logits.mean() == pytest.approx(np.array(probe["logprobs"]) - np.mean(probe["logprobs"]), abs=1e-4)
    assert metrics["sample"]["untuned"] == metrics["validation"]["retriever"]  # a direction of zeros keeps the order


def test_a_finished_stage_is_recognised_and_other_options_are_not(
    artifacts: Path, base: str, monkeypatch: pytest.MonkeyPatch
):
    """The second run does not train and returns the same metrics; another seed starts a new training."""
    first = train_ranker(BRIEF, artifacts, base)

    def tuned_again(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", tuned_again)
    assert train_ranker(BRIEF, artifacts, base) == first
    with pytest.raises(KeyboardInterrupt):
        train_ranker(RankerTraining(seed=1), artifacts, base)
    assert read_manifest(artifacts / "ranker", "ranker", "").options["seed"] == BRIEF.seed
    assert [path.name for path in artifacts.glob(".ranker*")] == []


def test_a_retriever_of_other_data_is_refused(artifacts: Path, base: str):
    """An item number of one data set means another title in another data set."""
    with new_artifact(artifacts / "data", "data", options={}, inputs={}) as folder:
        (folder / "made-up").write_text("other")
    with pytest.raises(InputError, match="trained on other data"):
        train_ranker(BRIEF, artifacts, base)


def test_missing_stages_name_their_command(tmp_path: Path):
    """The error names the command of the earlier stage that is missing."""
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        train_ranker(BRIEF, tmp_path)
    with new_artifact(tmp_path / "data", "data", options={}, inputs={}) as folder:
        (folder / "made-up").write_text("")
    with pytest.raises(InputError, match="run `llamarec train-retriever` first"):
        train_ranker(BRIEF, tmp_path)


def test_validation_keeps_users_whose_item_was_found_in_retriever_order():
    """Items 3 and 20 are among candidates 1 to 20, at places 2 and 19 (from 0), item 25 is not; nothing is shuffled."""
    data = made_up([np.array([29, place], np.int32) for place in range(3)])
    found = validation_examples(candidate_table([3, 25, 20]), data)
    assert [(example.truth, example.history.tolist()) for example in found] == [(2, [29, 0]), (19, [29, 2])]
    assert all(example.candidates.tolist() == list(range(1, 21)) for example in found)
    assert all((np.diff(example.scores) < 0).all() for example in found)


@pytest.mark.thorough
def test_the_best_adapters_are_validated_on_everyone_once(artifacts: Path, base: str):
    """A sample of one user stops the training; the final validation has both users whose item was found."""
    metrics = train_ranker(replace(BRIEF, validation_users=1), artifacts, base)
    assert (metrics["sample"]["users"], metrics["validation"]["users"]) == (1, 2)
    metrics = train_ranker(replace(BRIEF, validation_users=1, full_validation=False), artifacts, base)
    assert (metrics["sample"]["users"], metrics["validation"]["users"]) == (1, 1)


def test_a_retriever_that_found_nobody_is_refused():
    """Without a user to validate on, early stopping and the fusion weight would be arbitrary."""
    with pytest.raises(InputError, match="none of 1 users"):
        validation_examples(candidate_table([25]), made_up([np.array([29], np.int32)]))


def tuned(base: str, folder: Path, options: RankerTraining, examples: list[Example]) -> loop.FittedRanker:
    """Train on ``examples`` and validate on the first one."""
    prompts = training.PromptBuilder(CATALOGUE, tokenizer_of(base), PromptSettings())
    model = loaded(base, options)
    return loop.fit(options, model, prompts, LETTERS, examples, examples[:1], checkpoint_in(folder), folder)


def loaded(base: str, options: RankerTraining) -> Any:
    """Return the base as training loads it, without the checks."""
    torch.set_num_threads(1)
    return load_base(Path(base), quantisation=options.quantisation, dtype=torch.float32, device="cpu")


def checkpoint_in(folder: Path) -> Checkpoint:
    """Return the checkpoint of a training whose options and inputs stay the same."""
    return Checkpoint(folder / "checkpoint.pt", {}, {"data": "made-up"})


def example(truth: int, candidates: np.ndarray | None = None) -> Example:
    """Return an example of items 1 to 20, or of ``candidates``, after item 1, without scores of the retriever."""
    items = np.arange(1, 21) if candidates is None else candidates
    return Example(np.array([1]), items, truth, np.zeros(len(items), np.float32))


def test_tuning_learns_a_letter(base: str, tmp_path: Path):
    """The answer is "C" in every example; within 30 steps, its rank among 20 letters rises to the first."""
    examples = [example(2)] * 60
    options = RankerTraining(batch_size=2, learning_rate=2e-2, warmup_steps=0, validate_every=30, threads=1)
    found = tuned(base, tmp_path, options, examples)
    assert loop.ranks_alone(found.untuned, examples[:1]).tolist() != [1]
    assert loop.ranks_alone(found.logprobs, examples[:1]).tolist() == [1]
    assert found.log[-1]["loss"] < 9  # guessing among 49,152 tokens costs 10.8


def test_tuning_learns_a_title_by_its_line(base: str, tmp_path: Path):
    """Item 3 is the answer at any place; after 40 steps on shuffled candidates, it is first in another order."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(np.arange(1, 21)) for _ in range(81)]
    examples = [example(int(np.flatnonzero(items == 3)[0]), items) for items in orders]
    options = RankerTraining(
        read="lines", batch_size=2, learning_rate=5e-3, warmup_steps=0, validate_every=20, threads=1
    )
    words = "apple bear car dog egg fish goat hat ink jam kite lamp moon nut owl pen queen rain ship tree".split()  # noqa: SIM905
    catalogue = Catalogue([word.encode() for word in words], words, [1] * 20)
    prompts = training.PromptBuilder(catalogue, tokenizer_of(base), PromptSettings())
    found = loop.fit(
        options,
        loaded(base, options),
        prompts,
        LETTERS,
        examples[:-1],
        examples[-1:],
        checkpoint_in(tmp_path),
        tmp_path,
    )
    assert loop.ranks_alone(found.untuned, examples[-1:]).tolist() == [examples[-1].truth + 1]  # all scores are equal
    assert loop.ranks_alone(found.logprobs, examples[-1:]).tolist() == [1]
    assert found.log[-1]["loss"] < 1.5  # guessing among 20 costs 3.0


@pytest.mark.parametrize(("validate_by", "best_step", "best"), [("alone", 0, 0.815), ("fused", 1, 1.0)])
def test_adapters_are_chosen_alone_or_as_served(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validate_by: str, best_step: int, best: float
):
    """Two users have true items in places 1 and 2; the retriever is sure of the first and nearly right on the second.

    A model that repeats the retriever's order ranks them 1 and 2, alone and fused: NDCG@10 is (1 + 1 / log2 3) / 2 =
    .815. A model that is right about the second user only ranks them 3 and 1, (1 / log2 4 + 1) / 2 = .75; fused, it
    ranks both first.
    """
    scores = [np.array([10, 0, 0], np.float32), np.array([1, 0.5, 0], np.float32)]
    validation = [Example(np.array([1]), np.arange(1, 4), truth, row) for truth, row in enumerate(scores)]
    found = iter([[np.array([2.0, 1, 0])] * 2, [np.array([0.0, 1, 2]), np.array([0.0, 3, 0])]])
    monkeypatch.setattr(loop, "score_examples", lambda *args: next(found))
    options = replace(BRIEF, validate_by=validate_by)
    prompts = training.PromptBuilder(CATALOGUE, tokenizer_of(base), PromptSettings())
    model = loaded(base, options)
    result = loop.fit(options, model, prompts, LETTERS, validation, validation, checkpoint_in(tmp_path), tmp_path)
    assert result.best_step == best_step
    chosen_by = {"alone": "NDCG@10", "fused": "fused NDCG@10"}[validate_by]
    assert result.log[best_step][chosen_by] == pytest.approx(best, abs=1e-3)
    assert [row["NDCG@10"] for row in result.log] == pytest.approx([0.815, 0.75], abs=1e-3)


@pytest.mark.parametrize(("killed_at", "read"), [(3, "letters"), pytest.param(5, "lines", marks=pytest.mark.thorough)])
def test_an_interrupted_training_ends_where_the_whole_one_does(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, read: str
):
    """Adapters, validations and losses of a resumed training are bit-identical to an uninterrupted one's.

    It is killed between checkpoints or at one, and uses dropout.
    """
    examples = [example(turn, np.roll(np.arange(1, 21), turn)) for turn in range(12)]
    options = RankerTraining(
        quantisation="none",
        batch_size=2,
        dropout=0.3,
        read=read,  # type: ignore[arg-type]
        learning_rate=1e-2,
        warmup_steps=0,
        validate_every=2,
        checkpoint_every=3,
        checkpoint_minutes=0,
        threads=1,
    )
    whole = tuned(base, tmp_path / "whole", options, examples)
    taken = loop._accumulate
    steps = []

    def killed(*args: object) -> float:
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        steps.append(1)
        return taken(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", killed)
        with pytest.raises(KeyboardInterrupt):
            tuned(base, tmp_path / "resumed", options, examples)
    monkeypatch.setattr(loop, "_accumulate", lambda *args: steps.append(1) or taken(*args))
    resumed = tuned(base, tmp_path / "resumed", options, examples)
    assert len(steps) < killed_at + 6  # the training resumed
    assert resumed.log == whole.log
    assert (resumed.logprobs[0] == whole.logprobs[0]).all()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("minutes", "saved"),
    [
        (3.0, [0, 4, 5, 8]),
        pytest.param(0.0, [0, 2, 4, 5, 6, 8], marks=pytest.mark.thorough),
        pytest.param(10.0, [0, 5, 8], marks=pytest.mark.thorough),
    ],
)
def test_checkpoints_follow_the_clock(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, saved: list[int]
):
    """A step takes a minute of this clock, which is looked at every second step; each validation has a checkpoint.

    Three minutes have passed at step 3, which the look after step 4 notices; the next ones begin at step 5.
    """
    clock, steps = [0.0], []
    taken, save = loop._accumulate, Checkpoint.save

    def timed(*given: Any) -> Any:
        clock[0] += 60
        return taken(*given)

    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop, "_accumulate", timed)
    monkeypatch.setattr(Checkpoint, "save", lambda *given: steps.append(given[1]["progress"]["step"]) or save(*given))
    options = RankerTraining(
        batch_size=2, validate_every=5, checkpoint_every=2, checkpoint_minutes=minutes, threads=1, quantisation="none"
    )
    tuned(base, tmp_path, options, [example(2)] * 16)
    assert steps == saved


def test_a_prompt_that_cannot_be_built_stops_the_training_with_its_reason(base: str, tmp_path: Path):
    """A thread builds the prompts; the error is that of the builder, and the thread ends."""
    examples = [*[example(2)] * 4, example(0, np.arange(1, 26))]
    options = RankerTraining(batch_size=2, threads=1, quantisation="none")
    with pytest.raises(InputError, match="a prompt takes 1 to 20 candidates, not 25"):
        tuned(base, tmp_path, options, examples)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepared-ahead")]


@pytest.mark.thorough
def test_what_changes_nothing_of_the_ranker_is_not_recorded(artifacts: Path, base: str, monkeypatch):
    """A ranker of other checkpoints is recognised; so is one of a version that had no such option."""
    train_ranker(replace(BRIEF, max_prompts=4), artifacts, base)
    assert "checkpoint_minutes" not in read_manifest(artifacts / "ranker", "ranker", "").options
    monkeypatch.setattr(loop, "fit", lambda *given: pytest.fail("it is trained again"))
    train_ranker(replace(BRIEF, max_prompts=4, checkpoint_minutes=1.0), artifacts, base)


def test_probes_are_computed_on_the_gpu_unless_it_is_too_small(
    artifacts: Path, base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The scorer is asked for the GPU first; refused, it is that of the processor, and a warning says why."""
    asked: list[str] = []
    small = iter((False, True))  # the GPUs

    def scorer(folder: Path, runtime: Runtime) -> str:
        asked.append(f"{runtime.device} {runtime.dtype}")
        if runtime.device != "cpu" and next(small):
            raise InputError("needs at least 27,000 MiB of GPU memory")
        return runtime.device

    monkeypatch.setattr("models.ranker.inference.torch_scorer.TorchScorer", scorer)
    found = [training._fp32_scorer(Path(), device) for device in ("cuda:0", "cuda:0", "cpu")]
    assert found == ["cuda:0", "cpu", "cpu"]
    assert asked == ["cuda:0 float32", "cuda:0 float32", "cpu float32", "cpu float32"]
    (warned,) = caplog.messages
    assert warned == "the probes are computed on the processor: needs at least 27,000 MiB of GPU memory"


def test_a_training_with_other_options_refuses_the_checkpoint(artifacts: Path, base: str, monkeypatch):
    """An interrupted training is not discarded silently: the error names the option and the file to delete."""

    def killed(*args: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", killed)
        with pytest.raises(KeyboardInterrupt):
            train_ranker(BRIEF, artifacts, base)
    path = artifacts / TRAINING_FOLDER / "checkpoint.pt"
    with pytest.raises(InputError, match=r"to a training with seed 42, not 1: finish that training .* or delete"):
        train_ranker(replace(BRIEF, seed=1), artifacts, base)
    path.unlink()
    assert train_ranker(replace(BRIEF, seed=1), artifacts, base)["training"][0]["step"] == 0


def test_training_leaves_events_and_curves(base: str, tmp_path: Path):
    """TensorBoard's events hold the loss of both steps (read back as raw records), and the curves are a PNG."""
    examples = [example(2)] * 4
    tuned(base, tmp_path, RankerTraining(batch_size=2, threads=1), examples)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"training/loss") == 2
    assert events.read_bytes().count(b"validation/NDCG_10") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.5), (99, 1 / 90)])
def test_the_learning_rate_rises_and_falls(step: int, share: float):
    """The reference is transformers' linear schedule, with 100 steps of which 10 are warm-up."""
    assert loop.learning_rate_share(step, warmup_steps=10, steps=100) == pytest.approx(share)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
    assert schedule.lr_lambdas[0](step) == pytest.approx(share)


def test_a_loss_that_is_no_number_stops_with_step_and_rate(base: str, tmp_path: Path):
    """A learning rate of 1e37 makes the adapters infinite; the second step raises an error instead of saving them."""
    examples = [example(2)] * 4
    options = RankerTraining(batch_size=1, learning_rate=1e37, warmup_steps=0, threads=1, targets=("down_proj",))
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step [23], learning rate [\d.e+]+: lower it"):
        tuned(base, tmp_path, options, examples)


def test_presets_are_valid_options():
    """Each preset gives valid options, and the paper's preset is the default."""
    built = {name: RankerTraining(**preset) for name, preset in PRESETS.items()}
    assert built["paper"] == built["llama2-7b"] == RankerTraining()
    assert built["smollm2-135m"].validate_every * built["smollm2-135m"].batch_size == 500
    assert built["demo"] == replace(
        built["smollm2-135m"],
        learning_rate=1e-3,
        depth=6,
        max_prompts=256,
        validation_users=48,
        validate_every=32,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"max_prompts": 0}, "max_prompts must be at least 1"),
        ({"random_prompts": -1}, "random_prompts must be at least 0, not -1"),
        ({"read": "tea leaves"}, "read must be letters, lines or independent-lines, not 'tea leaves'"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"quantisation": "int3"}, "quantisation must be nf4 or none, not 'int3'"),
        ({"negatives": "easy"}, "negatives must be random, popular, retriever or pool, not 'easy'"),
        ({"order": "alphabetical"}, "order must be shuffled or retriever, not 'alphabetical'"),
        ({"validate_by": "popularity"}, "validate_by must be alone or fused, not 'popularity'"),
        ({"order": "retriever"}, "set negatives to retriever and pools to 1"),
        ({"dtype": "int8"}, "dtype must be auto, bfloat16 or float32, not 'int8'"),
        ({"candidates": 53}, "candidates must be 2 to 52, not 53: with --read letters each has an index letter"),
        ({"read": "independent-lines", "candidates": 201}, "candidates must be 2 to 200, not 201"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be at least 0, not -1"),
        ({"checkpoint_minutes": float("nan")}, "checkpoint_minutes must be at least 0, not nan"),
        ({"learning_rate": float("nan")}, "learning_rate and clip must be above 0"),
    ],
)
def test_options_that_cannot_train_are_refused(options: dict[str, object], message: str):
    """The error is a sentence that names the option."""
    with pytest.raises(InputError, match=message):
        RankerTraining(**options)  # type: ignore[arg-type]


def tokenizer_of(base: str) -> training.Tokenizer:
    return training.Tokenizer.from_file(f"{base}/tokenizer.json")
