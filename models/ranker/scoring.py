"""One forward pass of a merged ranker a prompt: what it has read at the places that a verbalizer looks at.

Only those are projected, and only onto the letters' rows of the head or along the lines' direction, in fp32 whatever
the precision of the layers below. Prompts run one at a time, without padding, so that a prompt's scores never depend on
who shares its batch; on two cores nothing is gained by running them together.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from preprocessing.errors import InputError

disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a ranker is run. Rankings are reproducible for one runtime on one kind of processor."""

    runtime: Literal["torch", "openvino"] = "torch"
    """PyTorch anywhere, or OpenVINO on the processor (`pip install llamarec[openvino]`)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the layers, fp16 on a GPU only; the letters' rows are fp32 in any case."""
    threads: int = 1
    """Threads within one forward pass on the processor."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        on_cpu = self.device == "cpu"
        known = self.runtime in ("torch", "openvino") and self.dtype in DTYPES and self.threads >= 1
        if not known or (on_cpu and self.dtype == "float16") or (not on_cpu and self.runtime == "openvino"):
            raise InputError(f"{self} is no runtime of this version: run `llamarec export` again")


class Scorer(ABC):
    """A language model that is read at places of a prompt."""

    @abstractmethod
    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """What the model has read up to each place, normalised as below its head [places, hidden].

        Args:
            token_ids: of a prompt.
            places: from 0.
        """

    @abstractmethod
    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """The head's rows of these tokens [labels, hidden], as they are stored."""

    def score(self, token_ids: Sequence[Sequence[int]], label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the letters behind each prompt [batch, letters].

        Args:
            token_ids: of each prompt.
            label_ids: token id of each letter.
        """
        rows = self.rows(label_ids)
        return np.stack([_dots(rows, self.states(prompt, [len(prompt) - 1])[0]) for prompt in token_ids])

    def score_lines(
        self, token_ids: Sequence[int], places: Sequence[int], direction: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """How far along ``direction`` the state at each place of a prompt is [places].

        Args:
            token_ids: of the prompt.
            places: where the candidates' lines end.
            direction: [hidden]
        """
        return _dots(self.states(token_ids, places), direction)


def _dots(rows: NDArray[np.float32], vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Dot products [n] of rows [n, hidden]. Not ``rows @ vector``: BLAS shares that among threads, whose number would
    decide the last bits of a score.
    """
    products: NDArray[np.float32] = np.einsum("nh,h->n", rows, vector)
    return products


def choose_runtime(device: str | None = None) -> Runtime:
    """The fastest accurate runtime here: bf16 where the hardware multiplies it natively, by OpenVINO on the processor
    where it is installed; else fp32 by PyTorch.

    Args:
        device: ``cpu`` or ``cuda``; without it, a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    native = has_native_bf16(device)
    installed = importlib.util.find_spec("openvino") is not None
    return Runtime(
        runtime="openvino" if native and installed and device == "cpu" else "torch",
        dtype="bfloat16" if native else "float32",
        threads=len(os.sched_getaffinity(0)),
        device=device,
    )


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 itself; emulated it is slower than fp32."""
    return torch.cuda.is_bf16_supported() if device.startswith("cuda") else _processor_has_bf16()


def _processor_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_scorer(folder: Path, runtime: Runtime) -> Scorer:
    """Opens a merged model.

    Args:
        folder: a Hugging Face folder.
        runtime: see :class:`Runtime`; PyTorch's thread count is set for the whole process.

    Raises:
        InputError: the runtime is not installed, or cannot run this model.
    """
    if runtime.runtime == "torch":
        return TorchScorer(folder, runtime)
    try:
        from models.ranker.openvino_scoring import OpenVinoScorer
    except ModuleNotFoundError as error:
        raise InputError(
            f"this ranker was exported for OpenVINO, which is not installed ({error}):"
            " pip install 'llamarec[openvino]', or export with --runtime torch"
        ) from None
    return OpenVinoScorer(folder, runtime)


class TorchScorer(Scorer):
    """The merged model in PyTorch; in fp32 the oracle of every other runtime."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Args: see :func:`load_scorer`."""
        torch.set_num_threads(runtime.threads)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", local_files_only=True).eval()
        self._device = torch.device(runtime.device)
        # As stored, before the layers, with which it may be tied, are rounded to the runtime's precision.
        self._head = model.get_output_embeddings().weight.detach()  # [vocabulary, hidden]
        self._layers = model.get_decoder().to(self._device, DTYPES[runtime.dtype])

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].float().cpu().numpy()
        return rows

    @torch.inference_mode()
    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`Scorer`."""
        tokens = torch.tensor([list(token_ids)], device=self._device)  # [1, length]
        hidden = self._layers(input_ids=tokens, use_cache=False).last_hidden_state[0]  # [length, hidden]
        states: NDArray[np.float32] = hidden[list(places)].float().cpu().numpy()
        return states
