"""What candidates' lines are taught at a middle layer: the loss, what learns from it, and what stays as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_base
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2LMHeadModel

from models.ranker.lines import LineReader, Lines, LineTeacher
from models.ranker.merge import save_merged
from models.ranker.packing import SHORTEST_SHARED
from models.ranker.qlora import add_adapters, answer_loss, load_base
from preprocessing.errors import InputError

LETTERS = list(range(49, 69))
STEM = list(range(100, 100 + 2 * SHORTEST_SHARED))
PROMPTS = [[*STEM, 7, 8, 9, 10, 11], [*STEM, 8, 8, 6], [11, 12, 13, 14]]
ANSWERS = [[50, 2], [49, 2], [51, 2]]
LINES = [Lines([33, 34, 36], 1), Lines([33, 34], 0), Lines([1, 2, 3], 2)]
WEIGHT = 0.5


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Two layers with adapters that do something."""
    model = load_base(tiny_base(tmp_path), quantisation="none", dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def hidden_behind(model: Any, layer: int, prompt: list[int]) -> torch.Tensor:
    """Transformers' own hidden states of one prompt behind a layer, normalised as at the end."""
    states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return model.get_base_model().get_decoder().norm(states[layer][0])


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_that_of_each_prompt_read_alone(model: Any, share: bool):
    """Written out by the definition from transformers' hidden states of one unpacked prompt at a time."""
    teacher = LineTeacher(model, 1, LETTERS, WEIGHT)
    with torch.no_grad():
        teacher.direction.normal_()
    ours = answer_loss(model, PROMPTS, ANSWERS, share=share, teacher=teacher, lines=LINES)
    expected = answer_loss(model, PROMPTS, ANSWERS)
    rows = model.get_base_model().get_output_embeddings().weight
    for prompt, line in zip(PROMPTS, LINES, strict=True):
        read = hidden_behind(model, 1, prompt)[list(line.places)]
        letters = read @ rows[LETTERS[: len(read)]].T
        expected = expected - WEIGHT * letters.log_softmax(1).diagonal().mean()
        says = read @ teacher.direction
        expected = expected - WEIGHT * says.log_softmax(0)[line.truth]
        for place, said in enumerate(says):
            expected = expected - WEIGHT * logsigmoid(said if place == line.truth else -said)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_lines_teach_the_layers_below_and_the_direction_only(model: Any):
    """Behind the first of two layers: the second's adapters learn from the answer alone, so get nothing from this."""
    teacher = LineTeacher(model, 1, LETTERS, WEIGHT)
    with torch.no_grad():
        teacher.direction.normal_()
    with_lines = answer_loss(model, PROMPTS, ANSWERS, teacher=teacher, lines=LINES)
    (with_lines - answer_loss(model, PROMPTS, ANSWERS)).backward()
    assert teacher.direction.grad is not None
    assert float(teacher.direction.grad.abs().max()) > 1e-3
    learned = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    below = [change for name, change in learned.items() if "layers.0." in name]
    above = [change for name, change in learned.items() if "layers.1." in name]
    assert min(below) > 1e-4
    assert max(above) < 1e-6


def test_stored_lines_say_what_the_trained_model_says(model: Any, tmp_path: Path):
    """Read through the merged model's first layer alone, fp16 as stored, without the second."""
    teacher = LineTeacher(model, 1, LETTERS, WEIGHT)
    with torch.no_grad():
        teacher.direction.normal_()
    teacher.save(tmp_path / "lines.safetensors")
    save_merged(model, tmp_path, tmp_path / "merged")
    reader = LineReader(tmp_path / "merged", tmp_path / "lines.safetensors")
    for prompt, line in zip(PROMPTS, LINES, strict=True):
        expected = hidden_behind(model, 1, prompt)[list(line.places)] @ teacher.direction
        assert np.ptp(expected.detach().numpy()) > 0.1
        assert reader.score(prompt, line.places) == pytest.approx(expected.detach().numpy(), abs=0.05)


def test_layers_that_are_elsewhere_are_refused(tmp_path: Path):
    """GPT-2 calls its layers `h`: the error names it and what to set."""
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_base(tmp_path, quantisation="none", dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("c_attn",))
    with pytest.raises(
        InputError, match=r"GPT2LMHeadModel.* has no layers like Llama's to teach: set line_weight to 0"
    ):
        LineTeacher(model, 1, LETTERS, WEIGHT)
