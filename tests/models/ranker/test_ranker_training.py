"""The ranker's stage on a tiny base and made-up data: what it writes, when it refuses, and that it learns."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from tiny import tiny_base

from models.ranker import train, tuning
from models.ranker.examples import Example
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import PromptSettings
from models.ranker.scoring import Runtime
from models.ranker.serving import Ranker, write_runtime
from models.ranker.train import train_ranker, validation_examples
from models.retriever.candidates import Candidates, CandidateTable
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError

ITEMS = 30
BRIEF = RankerTraining(max_prompts=8, batch_size=4, micro_batch_size=2, validation_users=3, validate_every=1, threads=1)


CATALOGUE = Catalogue(
    [f"{item}".encode() for item in range(ITEMS)], [f"Film number {item}" for item in range(ITEMS)], [1] * ITEMS
)


def candidate_table(truths: list[int]) -> CandidateTable:
    """Items 1 to 20 for every user, in that order."""
    scores = np.linspace(2, 0, 20, dtype=np.float32)
    row = Candidates(np.arange(1, 21, dtype=np.int32), scores, np.arange(1, 21, dtype=np.int32))
    users = [f"u{place}" for place in range(len(truths))]
    return CandidateTable(users, [row] * len(truths), np.array(truths, np.int32), np.array(truths, np.int32))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts of four users: the true item of two is among their candidates."""
    truths = [3, 5, 25, 26]
    with new_artifact(tmp_path / "data", "data", options={}, inputs={}) as folder:
        (folder / "made-up").write_text("")
    fingerprint = read_manifest(tmp_path / "data", "data", "").fingerprint
    with new_artifact(tmp_path / "retriever", "retriever", options={}, inputs={"data": fingerprint}) as folder:
        candidate_table(truths).write(folder / "candidates-validation.parquet")
    data = SimpleNamespace(
        name="made-up",
        catalogue=CATALOGUE,
        users=[f"u{place}" for place in range(4)],
        training=[np.arange(20, 30, dtype=np.int32)] * 4,
    )
    monkeypatch.setattr(train, "load_data", lambda artifacts: data)
    return tmp_path


def test_the_stage_writes_a_ranker_that_serves(artifacts: Path, base: str):
    """Everything the export needs is there, and the merged model passes its own probes in the served runtime."""
    metrics = train_ranker(BRIEF, artifacts, base)
    folder = artifacts / "ranker"
    files = {f"{name}.json" for name in ("fusion", "letters", "manifest", "metrics", "probes", "prompt")}
    assert {path.name for path in folder.iterdir()} == {"adapter", "merged", *files}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert [row["step"] for row in metrics["training"]] == [0, 1, 2]
    assert metrics["validation"]["users"] == 2
    assert json.loads((folder / "prompt.json").read_text())["max_history"] == 20
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 2 * 2 * 2  # two matrices for each of two projections in each of two layers
    write_runtime(folder, Runtime())
    ranker = Ranker.load(folder)
    assert ranker.weight == metrics["weight"]
    assert set(read_manifest(folder, "ranker", "").inputs) == {"data", "retriever", "base"}


def test_a_finished_stage_is_recognised_and_other_options_are_not(
    artifacts: Path, base: str, monkeypatch: pytest.MonkeyPatch
):
    """The second run tunes nothing and answers the same; with another seed it starts again."""
    first = train_ranker(BRIEF, artifacts, base)

    def tuned_again(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", tuned_again)
    assert train_ranker(BRIEF, artifacts, base) == first
    with pytest.raises(KeyboardInterrupt):
        train_ranker(RankerTraining(seed=1), artifacts, base)
    assert read_manifest(artifacts / "ranker", "ranker", "").options["seed"] == BRIEF.seed
    assert [path.name for path in artifacts.glob(".ranker*")] == []


def test_a_retriever_of_other_data_is_refused(artifacts: Path, base: str):
    """Item numbers of one data set mean other titles in another."""
    with new_artifact(artifacts / "data", "data", options={}, inputs={}) as folder:
        (folder / "made-up").write_text("other")
    with pytest.raises(InputError, match="trained on other data"):
        train_ranker(BRIEF, artifacts, base)


def test_missing_stages_name_their_command(tmp_path: Path):
    """Each stage before this one is asked for by its command."""
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        train_ranker(BRIEF, tmp_path)
    with new_artifact(tmp_path / "data", "data", options={}, inputs={}) as folder:
        (folder / "made-up").write_text("")
    with pytest.raises(InputError, match="run `llamarec train-retriever` first"):
        train_ranker(BRIEF, tmp_path)


def test_validation_keeps_users_whose_item_was_found_in_retriever_order():
    """Items 3 and 20 are among candidates 1 to 20, item 25 is not: places 2 and 19 (from 0), nothing shuffled."""
    histories = {f"u{place}": np.array([29, place], np.int32) for place in range(3)}
    examples, scores = validation_examples(candidate_table([3, 25, 20]), histories, count=None, seed=0)
    assert sorted((example.truth, example.history.tolist()) for example in examples) == [(2, [29, 0]), (19, [29, 2])]
    assert all(example.candidates.tolist() == list(range(1, 21)) for example in examples)
    assert len(scores) == 2
    assert len(validation_examples(candidate_table([3, 25, 20]), histories, count=1, seed=0)[0]) == 1


def test_a_retriever_that_found_nobody_is_refused():
    """No user to validate on: an early stop and a weight would be arbitrary."""
    with pytest.raises(InputError, match="none of 1 users"):
        validation_examples(candidate_table([25]), {}, count=None, seed=0)


def test_tuning_learns_a_letter(base: str):
    """The same answer "C" everywhere, learned within 30 steps: its place among 20 letters rises to the first."""
    prompts = train.PromptBuilder(CATALOGUE, tokenizer_of(base), PromptSettings())
    examples = [Example(np.array([1]), np.arange(1, 21), 2)] * 60
    options = RankerTraining(
        batch_size=2, learning_rate=2e-2, warmup_steps=0, validate_every=30, targets=("q_proj", "v_proj"), threads=1
    )
    tuned = tuning.tune(options, Path(base), prompts, list(range(49, 69)), examples, examples[:1])
    assert tuning.letter_ranks(tuned.untuned, examples[:1]).tolist() != [1]
    assert tuning.letter_ranks(tuned.letters, examples[:1]).tolist() == [1]
    assert tuned.log[-1]["loss"] < 9  # guessing among 49,152 tokens costs 10.8


def test_a_loss_that_is_no_number_stops_with_step_and_rate(base: str):
    """A step size of 1e37 throws the adapters to infinity: the second step says so instead of saving them."""
    prompts = train.PromptBuilder(CATALOGUE, tokenizer_of(base), PromptSettings())
    examples = [Example(np.array([1]), np.arange(1, 21), 2)] * 4
    options = RankerTraining(batch_size=1, learning_rate=1e37, warmup_steps=0, threads=1, targets=("down_proj",))
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step [23], learning rate [\d.e+]+: lower it"):
        tuning.tune(options, Path(base), prompts, list(range(49, 69)), examples, examples[:1])


def test_a_prompt_longer_than_the_bases_context_is_refused(base: str):
    """The tiny base reads 2,048 tokens: positions beyond were never trained."""
    prompts = train.PromptBuilder(CATALOGUE, tokenizer_of(base), PromptSettings(max_tokens=4096))
    with pytest.raises(InputError, match="max_tokens 4096 exceeds the base's context of 2048"):
        tuning.tune(RankerTraining(), Path(base), prompts, [], [], [])


def test_presets_are_valid_options():
    """Each preset builds, and the paper's is the default."""
    built = {name: RankerTraining(**preset) for name, preset in PRESETS.items()}
    assert built["paper"] == RankerTraining()
    assert (built["demo"].learning_rate, built["demo"].rank, built["demo"].targets) == (1e-4, 8, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"max_prompts": 0}, "max_prompts must be at least 1"),
        ({"quantisation": "int3"}, "no quantisation 'int3': choose nf4 or none"),
        ({"negatives": "easy"}, "no negatives 'easy'"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"learning_rate": float("nan")}, "learning_rate and clip must be above 0"),
    ],
)
def test_options_that_cannot_train_are_refused(options: dict[str, object], message: str):
    """Each with a sentence that names the option."""
    with pytest.raises(InputError, match=message):
        RankerTraining(**options)  # type: ignore[arg-type]


def tokenizer_of(base: str) -> train.Tokenizer:
    return train.Tokenizer.from_file(f"{base}/tokenizer.json")
