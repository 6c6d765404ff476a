"""What each candidate's line is taught at a middle layer, so that the letter behind the prompt has something to read.

The answer alone is one label for twenty candidates, and to give it a model must do two things at once: see which
candidate fits the history, and say the letter that stands before it. A small base that does neither gets no signal for
either. So, in training only, a middle layer is asked at the end of each candidate's line for its letter and, through a
direction that is learned with the adapters, for whether it is the one that came next. The
layers above find both and only have to pick; the ranker that is served is as it would be without. What the lines say is
stored beside it, for :class:`LineReader` to measure how much of it the letters pass on.

Source: supervision of intermediate layers as in Lee et al. 2015 (deeply-supervised nets); of steps on the way to an
answer as in Lightman et al. 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from preprocessing.errors import InputError


@dataclass(frozen=True)
class Lines:
    """The candidates' lines of one prompt."""

    places: Sequence[int]
    """Of the token behind each candidate's title, which has read all of its line and nothing below."""
    truth: int
    """Which candidate came next, from 0."""


class LineTeacher:
    """The loss of the candidates' lines at one layer of a model."""

    def __init__(self, model: Any, layer: int, letter_ids: Sequence[int], weight: float) -> None:
        """Args:
        model: of :func:`models.ranker.qlora.add_adapters`; what the layer gives is caught from its forward passes.
        layer: behind how many layers the lines are read, 1 to all.
        letter_ids: token id of each letter.
        weight: of the loss.

        Raises:
            InputError: the model's layers are not where Llama has them.
        """
        base = model.get_base_model()
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
            raise InputError(f"{base.config.architectures} has no layers like Llama's to teach: set line_weight to 0")
        self._norm = decoder.norm
        self._letters = head.weight[list(letter_ids)].float()  # [letters, hidden]
        self._weight = weight
        self._layer = layer
        self._hidden: Tensor | None = None
        self.direction = torch.zeros_like(self._letters[0], requires_grad=True)
        """[hidden] along which a line says that its candidate came next."""
        decoder.layers[layer - 1].register_forward_hook(self._catch)

    def save(self, path: Path) -> None:
        """Writes the direction and its layer for :class:`LineReader`."""
        save_file({"direction": self.direction.detach().cpu()}, path, metadata={"layer": str(self._layer)})

    def _catch(self, module: Any, given: Any, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output

    def loss(self, ends: Sequence[Any], lines: Sequence[Lines]) -> Tensor:
        """Of the latest forward pass, summed over its prompts: for each the cross-entropy of the candidates' own
        letters, averaged over the lines, and that of the true candidate, as one of all and as each line's yes or no.

        Args:
            ends: for each prompt [candidates] the places in the packed sequence at which its lines are read.
            lines: of each prompt.
        """
        assert self._hidden is not None, "no forward pass to read"
        hidden = self._hidden.flatten(0, -2)
        total = self.direction.new_zeros(())
        for places, line in zip(ends, lines, strict=True):
            read = self._norm(hidden[torch.as_tensor(places, device=hidden.device)]).float()  # [candidates, hidden]
            its_own = torch.arange(len(read), device=read.device)
            says = read @ self.direction  # [candidates]
            came_next = functional.one_hot(its_own[line.truth], len(read)).to(says)
            total = total + functional.cross_entropy(read @ self._letters[: len(read)].T, its_own)
            total = total + functional.cross_entropy(says, came_next)
            total = total + functional.binary_cross_entropy_with_logits(says, came_next, reduction="sum")
        return self._weight * total


class LineReader:
    """Ranks by what the candidates' lines say, through the layers up to the taught one and no further."""

    def __init__(self, model: Path, lines: Path) -> None:
        """Args:
        model: folder of the merged model.
        lines: what :meth:`LineTeacher.save` wrote.
        """
        with safe_open(str(lines), "pt") as stored:
            self._direction = stored.get_tensor("direction")
            layer = int(stored.metadata()["layer"])
        whole = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32, local_files_only=True)
        self._decoder = whole.get_decoder().eval()
        self._decoder.layers = self._decoder.layers[:layer]
        self._decoder.config.num_hidden_layers = layer

    def score(self, tokens: Sequence[int], ends: Sequence[int]) -> NDArray[np.float32]:
        """How much each line [candidates] says that its candidate came next, in logits.

        Args:
            tokens: of a prompt.
            ends: places of the tokens behind the candidates' titles.
        """
        with torch.inference_mode():
            hidden = self._decoder(input_ids=torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]
            scores: NDArray[np.float32] = (hidden[list(ends)] @ self._direction).numpy()
        return scores
