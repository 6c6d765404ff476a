"""One forward pass of a merged ranker: logits of the index letters behind a prompt.

Only the last position is projected, and only onto the letters' rows of the head, in fp32 whatever the precision of
the layers below. Prompts run one at a time, so that a prompt's scores never depend on who shares its batch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from preprocessing.errors import InputError

disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a ranker is run. Rankings are reproducible for one runtime on one kind of processor."""

    runtime: Literal["torch"] = "torch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the layers; the letters' rows are fp32 in any case."""
    threads: int = 1
    """Threads within one forward pass on the processor."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.runtime != "torch" or self.dtype not in DTYPES or self.threads < 1:
            raise InputError(f"{self} is no runtime of this version: run `llamarec export` again")


def choose_runtime(device: str | None = None) -> Runtime:
    """The fastest accurate runtime here: bf16 where the hardware multiplies it natively, else fp32.

    Args:
        device: ``cpu`` or ``cuda``; without it, a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else _processor_has_bf16()
    threads = len(os.sched_getaffinity(0))
    return Runtime(dtype="bfloat16" if native else "float32", threads=threads, device=device)


def _processor_has_bf16() -> bool:
    """Emulated bf16 is slower than fp32, so the processor's own word is asked."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class LetterScorer:
    """The merged model with all but the letters' rows of its head left out."""

    def __init__(self, folder: Path, letter_ids: Sequence[int], runtime: Runtime) -> None:
        """Args:
        folder: a Hugging Face folder of a Llama-architecture model.
        letter_ids: token id of each letter.
        runtime: see :class:`Runtime`; its thread count is set for the whole process.
        """
        torch.set_num_threads(runtime.threads)
        model = LlamaForCausalLM.from_pretrained(str(folder), dtype="auto", local_files_only=True).eval()
        device = torch.device(runtime.device)
        # Taken before the layers are rounded to the runtime's precision.
        self._rows = model.lm_head.weight[list(letter_ids)].detach().to(device, torch.float32)  # [letters, hidden]
        self._layers = model.model.to(device, DTYPES[runtime.dtype])

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the letters [letters] behind one prompt."""
        tokens = torch.tensor([list(token_ids)], device=self._rows.device)  # [1, length]
        hidden = self._layers(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]  # [hidden]
        logits: NDArray[np.float32] = (self._rows @ hidden.float()).cpu().numpy()
        return logits
