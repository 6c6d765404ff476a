"""The table of base models in docs/bases.md, compared with real trainings from tiny models of each architecture.

``LLAMAREC_WRITE_DOCS=1 pytest -m "thorough or not thorough" tests/models/ranker/test_architectures.py`` rewrites it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, base_of
from ranker_artifacts import write_artifacts
from transformers import AutoModelForCausalLM

from models.ranker import training
from models.ranker.fitting import loop
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import Prompt
from models.ranker.training import train_ranker
from preprocessing.errors import InputError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "bases.md"
WRITE = "LLAMAREC_WRITE_DOCS" in os.environ
BEGIN, END = "<!-- written by tests/models/ranker/test_architectures.py -->\n", "<!-- end -->\n"
SUPPORTED = "yes"
BRIEF = {"max_prompts": 4, "batch_size": 2, "validation_users": 2, "validate_every": 2, "threads": 1}
READS: dict[str, dict[str, Any]] = {
    "lines": {**PRESETS["quick"], "depth": 2, **BRIEF},
    "letters": {**PRESETS["paper"], **BRIEF, "learning_rate": 1e-3},
}
"""Options of a training that reads the lines, as the preset ``quick``, and the letters, in NF4 as the paper's."""
IN_DEFAULT_TIER = ("Phi-3", "GPT-J")
Outcome = tuple[str, str]
"""What happens with lines and with letters: :data:`SUPPORTED`, or the sentence of the refusal."""


def outcome(name: str, read: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what becomes of a training from this architecture."""
    architecture = ARCHITECTURES[name]
    given = READS[read] | ({"targets": architecture.targets} if architecture.targets else {})
    fitted = []
    write = training._write
    monkeypatch.setattr(training, "_write", lambda *args: fitted.append(args[4]) or write(*args))
    monkeypatch.setattr(loop, "plot_curves", lambda log, path: path.write_bytes(b""))  # half of the time
    try:
        train_ranker(RankerTraining(**given), folder, str(base_of(name, folder / "base")))
    except InputError as refusal:
        assert not (folder / "ranker").exists()
        return str(refusal).replace(architecture.kind, "…").replace(str(folder), "…")
    assert_merged_is_tuned(folder / "ranker", fitted[0], read)
    return SUPPORTED


def assert_merged_is_tuned(folder: Path, fitted: Any, read: str) -> None:
    """Compare the tuned model's scores with those of the merged folder, loaded and read by transformers alone."""
    merged = AutoModelForCausalLM.from_pretrained(str(folder / "merged"), dtype=torch.float32)
    verbalizer = fitted.objective.verbalizer()
    for probe, tuned in zip(training.json.loads((folder / "probes.json").read_text()), fitted.logprobs, strict=True):
        prompt = Prompt(probe["tokens"], probe["line_ends"])
        with torch.inference_mode():
            found = merged(input_ids=torch.tensor([prompt.tokens]), output_hidden_states=True)
        if read == "letters":
            logits = found.logits[0, -1, verbalizer.letter_ids]
        else:
            logits = found.hidden_states[-1][0, prompt.line_ends] @ torch.from_numpy(verbalizer.direction)
        change = logits.log_softmax(0).numpy() - tuned
        assert np.sqrt(np.mean(change**2)) < 0.05 * max(1.0, np.std(tuned))


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Outcome]]:
    """Yield a place for the outcomes, from which the page is rewritten if that is asked for."""
    outcomes: dict[str, Outcome] = {}
    yield outcomes
    if WRITE and outcomes.keys() == ARCHITECTURES.keys():
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}{written(outcomes)}{END}{after}", encoding="utf-8")


def written(outcomes: dict[str, Outcome]) -> str:
    """Return the table, and the sentences that it refers to by number."""
    sentences = list(dict.fromkeys(text for row in outcomes.values() for text in row if text != SUPPORTED))
    lines = ["", "| base | class in transformers | `lines` | `letters` |", "|---|---|---|---|"]
    for name, row in outcomes.items():
        architecture = ARCHITECTURES[name]
        cells = [text if text == SUPPORTED else f"no ({sentences.index(text) + 1})" for text in row]
        targets = f", `--targets {','.join(architecture.targets)}`" if architecture.targets else ""
        lines.append(f"| {name}{targets} | `{architecture.kind}` | {cells[0]} | {cells[1]} |")
    numbered = (f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
    return "\n".join([*lines, "", *numbered, ""])


def documented() -> dict[str, Outcome]:
    """Return the outcomes that the page states."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows = re.findall(r"^\| ([^|,]+?)(?:, `--targets [^`]+`)? \| `\w+` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    said = {cell: sentences[number] for number in sentences for cell in [f"no ({number})"]}
    return {name: (said.get(lines, lines), said.get(letters, letters)) for name, lines, letters in rows}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_DEFAULT_TIER else pytest.mark.thorough) for name in ARCHITECTURES],
)
def test_the_documentation_says_what_happens_with_this_base(
    name: str, found: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A base is trained, merged and loaded with the scores of the tuned model, or refused with the page's sentence."""
    for read in READS:
        write_artifacts(tmp_path / read, monkeypatch)
    found[name] = tuple(outcome(name, read, tmp_path / read, monkeypatch) for read in READS)
    assert WRITE or found[name] == documented()[name]


def test_the_documentation_has_every_architecture():
    """The table has a row for each architecture that is tried, in the same order."""
    assert WRITE or list(documented()) == list(ARCHITECTURES)
