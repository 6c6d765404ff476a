"""Runs the merged ranker in PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.ranker.inference.scorer import Runtime, Scorer
from models.ranker.loading import load_causal_lm
from models.ranker.memory import check_gpu_memory, serving_bytes
from models.ranker.precision import DTYPES


class TorchScorer(Scorer):
    """A scorer that runs in PyTorch; in fp32 it is the reference for every other runtime."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Load the merged model in ``folder``, and set PyTorch's thread count for the whole process.

        Raises:
            InputError: the folder's weights are not those of its architecture, or the GPU has too little free memory;
                nothing is loaded then.
        """
        if runtime.device != "cpu":
            needed = serving_bytes(folder, DTYPES[runtime.dtype])
            check_gpu_memory(folder, needed, runtime.device, "export with --device cpu, or train a smaller base")
        torch.set_num_threads(runtime.threads)
        model = load_causal_lm(folder, "run `llamarec train-ranker` again", dtype="auto")
        self._device = torch.device(runtime.device)
        # Kept as stored, before the layers, to which the head may be tied, are converted to the runtime's precision.
        self._head = model.get_output_embeddings().weight.detach()  # [vocabulary, hidden]
        self._layers = model.get_decoder()
        for parameter in self._layers.parameters():
            # Parameters only: the frequencies of the rotary embedding are a buffer, and rounded to bf16 they would turn
            # position 600 by a quarter of a radian.
            parameter.data = parameter.data.to(DTYPES[runtime.dtype])
        self._layers.to(self._device)

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the head's rows for these tokens [labels, hidden]; see :class:`Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].float().cpu().numpy()
        return rows

    @torch.inference_mode()
    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """Return the normalised hidden states at these positions [places, hidden]; see :class:`Scorer`."""
        tokens = torch.tensor([list(token_ids)], device=self._device)  # [1, length]
        hidden = self._layers(input_ids=tokens, use_cache=False).last_hidden_state[0]  # [length, hidden]
        states: NDArray[np.float32] = hidden[list(places)].float().cpu().numpy()
        return states
