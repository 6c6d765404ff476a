"""The interface of a ranker's runtime: one forward pass over a prompt, read at the positions a verbalizer needs.

Only those positions are projected, onto the letters' rows of the head or along the lines' direction, and always in
fp32, whatever the precision of the layers. On a processor, prompts run one at a time and without padding, so that a
prompt's scores never depend on the other prompts of a batch; on two cores, batching prompts would gain nothing. On a
GPU they share passes whose shapes are fixed (:mod:`models.ranker.inference.packed_scorer`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.ranker.inference.prefixes import Prefix, PrefixCache
from models.ranker.inference.slabs import SLAB_ROWS, Slab, slabs_of
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

RuntimeName = Literal["torch", "openvino"]
ForwardName = Literal["auto", "packed", "transformers"]
Batching = Literal["exact", "tolerant"]
Dtype = Literal["float32", "bfloat16", "float16", "float8"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Settings that a ranker runs with. Rankings are reproducible for one runtime on one kind of processor."""

    runtime: RuntimeName = "torch"
    """PyTorch on any device, or OpenVINO on the processor (`pip install llamarec[openvino]`)."""
    dtype: Dtype = "float32"
    """Precision of the layers; ``float16`` on a GPU only. ``float8`` multiplies the layers' matrices in fp8, computes
    all else in bf16, and is for the packed forward only. The letters' rows are always fp32."""
    threads: int = 1
    """Number of processor threads in one forward pass."""
    device: str = "cpu"
    """PyTorch's name of the device. ``cuda`` is the GPU of the Triton instance, and elsewhere the first one."""
    forward: ForwardName = "auto"
    """Layers that PyTorch computes with: transformers', or the packed forward of :mod:`models.ranker.forward`. ``auto``
    takes the packed forward on a GPU if it computes the model, and transformers' layers elsewhere."""
    batching: Batching = "exact"
    """What the packed forward promises about prompts that share a pass: that they do not change a bit of each other's
    scores, or (``tolerant``) that they change them by no more than rounding does."""

    def __post_init__(self) -> None:
        on_cpu = self.device == "cpu"
        known = self.runtime in get_args(RuntimeName) and self.dtype in get_args(Dtype) and self.threads >= 1
        known &= self.forward in get_args(ForwardName) and self.batching in get_args(Batching)
        known &= self.runtime == "torch" or self.forward != "packed"
        if self.dtype == "float8" and (self.runtime != "torch" or self.forward == "transformers"):
            raise InputError(
                "fp8 is computed in the packed forward of PyTorch only, which keeps no prefixes: use --runtime torch"
                " without --prefix-cache and --forward transformers, or another --dtype"
            )
        if not known or (on_cpu and self.dtype == "float16") or (not on_cpu and self.runtime == "openvino"):
            raise InputError(f"{self} is not a runtime of this version: run `llamarec export` again")


class Scorer(ABC):
    """A language model whose hidden states can be read at chosen positions of a prompt."""

    packs: ClassVar[bool] = False
    """Whether several prompts share a pass, so that scoring them together takes less time."""

    @abstractmethod
    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """Return the hidden states at these positions, normalised as the head expects them [places, hidden].

        Args:
            token_ids: the prompt.
            places: positions in the prompt, from 0.
        """

    @abstractmethod
    def independent_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """Return the hidden states at the ends of independent lines [k, hidden].

        Args:
            prompt: a prompt with a prefix.
        """

    @abstractmethod
    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the head's rows for these tokens [labels, hidden], with the stored values."""

    @abstractmethod
    def settle(self, prompts: Sequence[Prompt]) -> None:
        """Choose shapes of passes at which a score does not depend on what else a pass computes, if there is a choice.

        Args:
            prompts: the prompts of the probes.
        """

    @abstractmethod
    def prefix_bytes(self, token_ids: Sequence[int]) -> int:
        """Return the memory in bytes that the keys and values of a prefix take."""

    def score(self, token_ids: Sequence[Sequence[int]], label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of the letters after each prompt [batch, letters].

        Args:
            token_ids: token ids of each prompt.
            label_ids: token id of each letter.
        """
        rows = self.rows(label_ids)
        return np.stack([_dots(rows, self.states(prompt, [len(prompt) - 1])[0]) for prompt in token_ids])

    def score_lines(
        self, token_ids: Sequence[int], places: Sequence[int], direction: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the projection of the hidden state at each position onto ``direction`` [places].

        Args:
            token_ids: the prompt.
            places: positions at which the candidates' lines end.
            direction: the direction [hidden].
        """
        return _dots(self.states(token_ids, places), direction)

    def score_independent(self, prompt: Prompt, direction: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the projection of each independent line's state onto ``direction`` [k].

        A line's score depends on the prefix and on the line alone; see :meth:`settle`.
        """
        return _dots(self.independent_states(prompt), direction)

    def score_prompts(self, prompts: Sequence[Prompt], direction: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the projections of the candidates of several prompts, one array [k] for each.

        Args:
            prompts: prompts, with independent lines or without.
            direction: the direction [hidden].
        """
        return [
            self.score_independent(prompt, direction)
            if prompt.prefix
            else self.score_lines(prompt.tokens, prompt.line_ends, direction)
            for prompt in prompts
        ]


class SlabScorer(Scorer):
    """A scorer that runs prompts one at a time, and independent lines in slabs after their prefix."""

    def __init__(self) -> None:
        self.slab_rows: Sequence[int] = SLAB_ROWS
        """Numbers of rows of a slab of independent lines, see :func:`models.ranker.inference.slabs.slabs_of`."""
        self.prefixes = PrefixCache()
        """The prefixes of independent lines that are kept."""

    @abstractmethod
    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Return the keys and values of the tokens that independent lines continue, in a pass of their own."""

    @abstractmethod
    def slab_states(self, prefix: Prefix, slab: Slab) -> NDArray[np.float32]:
        """Return the hidden states at the ends of a slab's lines, normalised as the head expects them [lines, hidden].

        Args:
            prefix: what the lines continue.
            slab: the lines; those that fill it up have states too.
        """

    def prefix_bytes(self, token_ids: Sequence[int]) -> int:
        """Return the memory in bytes that the keys and values of a prefix take; see :class:`Scorer`."""
        return self.prefix(token_ids).nbytes

    def independent_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """Return the hidden states at the ends of independent lines [k, hidden]; see :class:`Scorer`.

        Prefix and lines are computed by the same calls whether the prefix is kept or not.
        """
        prefix = self.prefixes.get(prompt.tokens[: prompt.prefix], self.prefix)
        found: dict[int, NDArray[np.float32]] = {}
        for slab in slabs_of(prompt.lines(), prompt.prefix, self.slab_rows):
            found.update(zip(slab.numbers, self.slab_states(prefix, slab), strict=False))
        return np.stack([found[number] for number in range(len(found))])


def _dots(rows: NDArray[np.float32], vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the dot products [n] of rows [n, hidden] with a vector [hidden].

    ``rows @ vector`` is no alternative: BLAS splits it over its threads, so the last bits of a score would depend on
    their number.
    """
    products: NDArray[np.float32] = np.einsum("nh,h->n", rows, vector)
    return products
