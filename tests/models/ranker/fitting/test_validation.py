"""Validation in batches: the scores of prompts that share a pass, and what shares one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranker_artifacts import CATALOGUE
from tiny import tiny_base
from tokenizers import Tokenizer

from models.ranker.examples.sampling import Example
from models.ranker.fitting import validation
from models.ranker.fitting.objective import new_objective
from models.ranker.fitting.qlora import add_adapters, load_base
from models.ranker.fitting.validation import grouped, score_examples, tokens_at_once
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt, PromptBuilder

LETTERS = list(range(49, 69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("read", ["letters", "lines", "independent-lines"])
def test_prompts_that_share_a_pass_have_the_scores_that_they_have_alone(
    folder: Path, read: str, monkeypatch: pytest.MonkeyPatch
):
    """The reference is one prompt at a time, as on a processor; candidates differ in number, histories in length."""
    options = RankerTraining(read=read, threads=1)  # type: ignore[arg-type]
    model = load_base(folder, quantisation="none", dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))
    objective = new_objective(options, model, LETTERS)
    for tensor in (*objective.trained, *(p for p in model.parameters() if p.requires_grad)):
        torch.nn.init.normal_(tensor, std=0.1)
    prompts = PromptBuilder(CATALOGUE, Tokenizer.from_file(str(folder / "tokenizer.json")), options.prompt_settings())
    examples = [
        Example(np.arange(1, 2 + number), np.arange(5, 15 + number), 0, np.zeros(10 + number, np.float32))
        for number in range(5)
    ]
    alone = score_examples(model, objective, prompts, examples)
    scored: list[int] = []
    monkeypatch.setattr(validation, "tokens_at_once", lambda device: 500)
    together = score_examples(model, objective, prompts, examples, scored.append)
    assert sum(scored) == 5
    assert 1 < max(scored) < 5
    for ours, theirs in zip(together, alone, strict=True):
        assert np.ptp(theirs) > 1e-3
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_pass_has_a_limited_number_of_tokens():
    """10 + 10 fit into 25 tokens, a third 10 do not, and 40 get a pass of their own; on a processor each does."""
    prompts = [Prompt([0] * count, [0]) for count in (10, 10, 10, 40, 5)]
    assert [[len(one.tokens) for one in group] for group in grouped(prompts, 25)] == [[10, 10], [10], [40], [5]]
    assert [len(group) for group in grouped(prompts, tokens_at_once(torch.device("cpu")))] == [1] * 5
    assert tokens_at_once(torch.device("cuda:1")) == validation.TOKENS_AT_ONCE
