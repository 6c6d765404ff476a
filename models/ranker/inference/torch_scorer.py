"""Runs the merged ranker in PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.ranker.inference.prefixes import Prefix
from models.ranker.inference.scorer import Runtime, SlabScorer
from models.ranker.inference.slab_check import settle_slabs
from models.ranker.inference.slabs import Slab
from models.ranker.inference.torch_lines import LinesDecoder, LinesPass, Part, PrefixPass
from models.ranker.loading import load_causal_lm
from models.ranker.memory import check_gpu_memory, serving_bytes
from models.ranker.precision import DTYPES
from models.ranker.prompt import Prompt


class TorchScorer(SlabScorer):
    """A scorer that runs in PyTorch; in fp32 it is the reference for every other runtime."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Load the merged model in ``folder``, and set PyTorch's thread count for the whole process.

        Raises:
            InputError: the folder's weights are not those of its architecture, or the GPU has too little free memory;
                nothing is loaded then.
        """
        super().__init__()
        self._lines: LinesDecoder | None = None
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

    def settle(self, prompts: Sequence[Prompt]) -> None:
        """Choose the slabs of independent lines; see :class:`Scorer`."""
        if prompts[0].prefix:
            settle_slabs(self, prompts[0])

    @torch.inference_mode()
    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Return the keys and values of each layer; see :class:`SlabScorer`."""
        part = PrefixPass(torch.empty(0, dtype=torch.int64, device=self._device))
        self._run(torch.tensor(list(token_ids), device=self._device), None, part)
        return Prefix(part.layers)

    @torch.inference_mode()
    def slab_states(self, prefix: Prefix, slab: Slab) -> NDArray[np.float32]:
        """Return the normalised hidden states at the lines' ends [lines, hidden]; see :class:`SlabScorer`."""
        arrays = (slab.tokens, slab.positions, slab.members, slab.slots, slab.ends)
        tokens, positions, members, slots, ends = (torch.from_numpy(array).to(self._device) for array in arrays)
        hidden = self._run(tokens, positions, LinesPass(ends, iter(prefix.layers), members, slots))
        states: NDArray[np.float32] = hidden.float().cpu().numpy()
        return states

    def _run(self, tokens: Tensor, positions: Tensor | None, part: Part) -> Tensor:
        """Return the normalised hidden states of the rows that are read [n, hidden]."""
        if self._lines is None:
            self._lines = LinesDecoder(self._layers)
        return self._lines(tokens, positions, part)
