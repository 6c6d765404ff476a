"""Runs the merged ranker in the packed forward: several prompts share a pass, whose shape is one of a few."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from models.ranker.forward.attention import attention_for
from models.ranker.forward.batch import BUCKET_ROWS, Bucket, Item, bucket_for, cut, grouped, pack
from models.ranker.forward.float8 import check_float8
from models.ranker.forward.graphs import COLUMNS, Passes
from models.ranker.forward.model import Forward, without_split_k
from models.ranker.forward.shape import ForwardShape, shape_of
from models.ranker.forward.weights import fuse, head_of
from models.ranker.inference.promise import COMPANY_TOLERANCE, Settled, settle_buckets
from models.ranker.inference.scorer import Runtime, Scorer
from models.ranker.loading import load_causal_lm
from models.ranker.memory import check_gpu_memory, serving_bytes
from models.ranker.precision import DTYPES
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

PROCESSOR_ROWS = BUCKET_ROWS[:2]
"""Numbers of rows of the passes on a processor."""
SHARE_OF_FREE = 0.9
"""Share of the free GPU memory that a pass may take."""


class PackedScorer(Scorer):
    """A scorer that runs in the packed forward.

    Until :meth:`settle` has checked that prompts may share a pass, each gets one of its own.

    Args:
        folder: the merged model's Hugging Face folder.
        runtime: see :class:`Runtime`; the thread count is set for the whole process.
        sizes: numbers of rows of the passes, in ascending order. Default: :data:`.BUCKET_ROWS` on a GPU, and on a
            processor, where larger products are hardly faster, those of :data:`PROCESSOR_ROWS`. On a GPU, those that
            its memory does not hold are left out.

    Raises:
        UnsupportedBaseError: the forward does not compute the model; nothing is loaded then.
        InputError: the folder's weights are not those of its architecture, the GPU has too little free memory, or it
            does not multiply fp8 and the runtime asks for that.
    """

    packs = True

    def __init__(self, folder: Path, runtime: Runtime, sizes: Sequence[int] | None = None) -> None:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        self.shape = shape_of(config)
        self._dtype, device = DTYPES[runtime.dtype], torch.device(runtime.device)
        float8 = runtime.dtype == "float8"
        if float8:
            check_float8(device, self.shape)
        if device.type == "cuda":
            needed = serving_bytes(folder, self._dtype, matrix_bytes=1 if float8 else None)
            check_gpu_memory(folder, needed, runtime.device, "export with --device cpu, or train a smaller base")
        torch.set_num_threads(runtime.threads)
        without_split_k()
        state = load_causal_lm(folder, "run `llamarec train-ranker` again", dtype="auto").state_dict()
        self._head = head_of(state, self.shape)  # [vocabulary, hidden], as stored
        weights = fuse(state, self.shape, self._dtype, device, float8=float8)
        forward = Forward(config, self.shape, weights, attention_for(device, self._dtype, self.shape.width))
        self._passes = Passes(forward, device)
        self._runtime = runtime
        self._read: tuple[int, ...] | bytes = ()
        if sizes is None:
            sizes = BUCKET_ROWS if device.type == "cuda" else PROCESSOR_ROWS
        if device.type == "cuda":
            free = int(SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
            sizes = sizes_in(self.shape, sizes, self._dtype, free)
        self.settled = Settled(tuple(sizes), "prompt")

    def settle(self, prompts: Sequence[Prompt]) -> None:
        """Choose the passes, and what may share them; see :class:`Scorer`. On a GPU they are captured as graphs."""
        generator = torch.Generator().manual_seed(0)
        self._set_readout(torch.randn(COLUMNS, self.shape.hidden, generator=generator), b"probes")
        tolerance = COMPANY_TOLERANCE[self._runtime.dtype] if self._runtime.batching == "tolerant" else 0.0
        for rows in reversed(self.settled.rows):  # the largest first: the others take their memory from its
            self._passes.capture(Bucket(rows, bool(prompts[0].prefix)))
        self.settled = settle_buckets(self._probe, self.settled.rows, prompts, tolerance)
        logging.getLogger(__name__).info("the ranker computes %s in passes of %s tokens", *self._named())

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the head's rows for these tokens [labels, hidden]; see :class:`Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].float().numpy()
        return rows

    def prefix_bytes(self, token_ids: Sequence[int]) -> int:
        """Return the memory that a runtime which keeps a prefix takes for it; see :class:`Scorer`."""
        return 2 * self.shape.layers * self.shape.key_heads * self.shape.width * len(token_ids) * self._dtype.itemsize

    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """Return the normalised hidden states at these positions [places, hidden]; see :class:`Scorer`."""
        return self._run([Item.whole(token_ids, places)], scores=False)[0]

    def independent_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """Return the normalised hidden states at the lines' ends [lines, hidden]; see :class:`Scorer`."""
        return self._run([_lines(prompt)], scores=False)[0]

    def score(self, token_ids: Sequence[Sequence[int]], label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of the letters after each prompt [batch, letters]; see :class:`Scorer`.

        Prompts share passes, as far as :meth:`settle` allowed it.
        """
        self._read_labels(tuple(label_ids))
        items = [Item.whole(tokens, [len(tokens) - 1]) for tokens in token_ids]
        return np.stack([scores[0, : len(label_ids)] for scores in self._run(items)])

    def score_lines(
        self, token_ids: Sequence[int], places: Sequence[int], direction: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the projection of the state at each position onto ``direction`` [places]; see :class:`Scorer`."""
        self._read_direction(direction)
        return self._run([Item.whole(token_ids, places)])[0][:, 0]

    def score_independent(self, prompt: Prompt, direction: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the projection of each independent line's state onto ``direction`` [k]; see :class:`Scorer`."""
        return self.score_prompts([prompt], direction)[0]

    def score_prompts(self, prompts: Sequence[Prompt], direction: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the projections of the candidates of several prompts, which share passes; see :class:`Scorer`."""
        self._read_direction(direction)
        found: dict[int, NDArray[np.float32]] = {}
        for lines in (False, True):
            numbers = [number for number, prompt in enumerate(prompts) if bool(prompt.prefix) == lines]
            given = [prompts[number] for number in numbers]
            items = [_lines(prompt) if lines else Item.whole(prompt.tokens, prompt.line_ends) for prompt in given]
            found |= zip(numbers, [scores[:, 0] for scores in self._run(items)], strict=True) if items else {}
        return [found[number] for number in range(len(prompts))]

    def _run(self, items: Sequence[Item], *, scores: bool = True) -> list[NDArray[np.float32]]:
        """Return the scores of each item [reads, columns], or its states [reads, hidden]."""
        for item in items:
            self._check(item)
        lines, sizes = bool(items[0].lines), self.settled.rows
        largest = Bucket(sizes[-1], lines)
        parts: list[Item] = []
        owners: list[int] = []
        for number, item in enumerate(items):
            cuts = _single_lines(item) if self.settled.together == "line" else cut(item, largest)
            parts += cuts
            owners += [number] * len(cuts)
        alone = self.settled.together != "prompts"
        groups = [[number] for number in range(len(parts))] if alone else grouped(parts, largest)
        found: list[list[NDArray[np.float32]]] = [[] for _ in items]
        for group in groups:
            held = [parts[number] for number in group]
            need = held[0].need
            for item in held[1:]:
                need = need.plus(item.need)
            (values,) = self._pass(held, bucket_for(need, sizes, lines=lines), scores=scores, states=not scores)
            for number, part in zip(group, _split(values, held), strict=True):
                found[owners[number]].append(part)
        return [np.concatenate(rows) for rows in found]

    def _pass(self, items: Sequence[Item], bucket: Bucket, *, scores: bool, states: bool) -> list[NDArray[np.float32]]:
        """Return what a pass computes at all rows that are read: states [reads, hidden], scores [reads, columns]."""
        outcome = self._passes(pack(items, bucket), bucket)
        wanted = ([outcome.states] if states else []) + ([outcome.scores] if scores else [])
        return [tensor.cpu().numpy() for tensor in wanted]

    def _probe(self, items: Sequence[Item], bucket: Bucket) -> list[NDArray[np.float32]]:
        """Return states and scores of each item side by side; see :data:`models.ranker.inference.promise.Run`."""
        return _split(np.concatenate(self._pass(items, bucket, scores=True, states=True), axis=1), items)

    def _check(self, item: Item) -> None:
        """Check that the tables have a row for each token and each position; a GPU would end the process.

        Raises:
            InputError: one is outside.
        """
        for tokens in (item.prefix, *item.lines):
            if tokens and not (min(tokens) >= 0 and max(tokens) < self.shape.vocabulary):
                raise InputError(f"token ids must be 0 to {self.shape.vocabulary - 1}, the vocabulary of the model")
        if item.need.longest > self.shape.positions:
            raise InputError(
                f"a prompt of {item.need.longest} tokens is longer than the model's context of {self.shape.positions}:"
                " train with a smaller --max-tokens"
            )

    def _read_labels(self, label_ids: tuple[int, ...]) -> None:
        """Let the first columns of the readout be the head's rows for these tokens."""
        # A prompt with fewer candidates reads fewer letters of the same list.
        if not isinstance(self._read, tuple) or self._read[: len(label_ids)] != label_ids:
            self._set_readout(torch.from_numpy(self.rows(label_ids)), label_ids)

    def _read_direction(self, direction: NDArray[np.float32]) -> None:
        """Let the first column of the readout be a direction [hidden]."""
        if self._read != (key := direction.tobytes()):
            self._set_readout(torch.from_numpy(np.asarray(direction, np.float32))[None], key)

    def _set_readout(self, rows: Tensor, key: tuple[int, ...] | bytes) -> None:
        """Multiply the states with these rows [n, hidden] from now on.

        Raises:
            InputError: there are more than the readout's columns.
        """
        if len(rows) > COLUMNS:
            raise InputError(f"{len(rows)} letters: the packed forward reads at most {COLUMNS}")
        readout = torch.zeros(COLUMNS, self.shape.hidden)
        readout[: len(rows)] = rows
        self._passes.readout.copy_(readout.t())
        self._read = key

    def _named(self) -> tuple[str, str]:
        units = {"prompts": "several prompts at once", "prompt": "one prompt", "line": "one prompt or line"}
        return units[self.settled.together], ", ".join(map(str, self.settled.rows))


def pass_bytes(shape: ForwardShape, bucket: Bucket, dtype: torch.dtype) -> int:
    """Return the memory in bytes that the tensors of a pass take at a time, at most."""
    row = 3 * shape.hidden + 2 * (shape.fused_heads + shape.heads) * shape.width + 4 * shape.inner
    values = row * bucket.rows + 2 * shape.key_heads * shape.width * bucket.keys
    return values * dtype.itemsize + 4 * bucket.reads * (shape.hidden + COLUMNS) + 4 * sum(bucket.parts)


def sizes_in(shape: ForwardShape, sizes: Sequence[int], dtype: torch.dtype, free: int) -> tuple[int, ...]:
    """Return the numbers of rows of which a pass fits into memory.

    Args:
        shape: the model's shape.
        sizes: numbers of rows, in ascending order.
        dtype: precision of the layers.
        free: memory in bytes.

    Raises:
        InputError: none does.
    """
    needs = {rows: pass_bytes(shape, Bucket(rows, lines=True), dtype) for rows in sizes}
    kept = tuple(rows for rows in sizes if needs[rows] <= free)
    if not kept:
        raise InputError(
            f"the smallest pass, of {sizes[0]} tokens, takes {needs[sizes[0]] >> 20:,} MiB of GPU memory beside the"
            f" model, and {free >> 20:,} are free: free some, use another GPU, or train a smaller base"
        )
    return kept


def _lines(prompt: Prompt) -> Item:
    return Item.of_lines(prompt.tokens[: prompt.prefix], prompt.lines())


def _single_lines(item: Item) -> list[Item]:
    """Return an item of each line with the prefix; a whole prompt stays whole."""
    return [Item.of_lines(item.prefix, [line]) for line in item.lines] or [item]


def _split(values: NDArray[np.float32], items: Sequence[Item]) -> list[NDArray[np.float32]]:
    """Return the rows of each item, without those that are left over."""
    ends = np.cumsum([len(item.places) for item in items])
    return np.split(values, ends)[: len(items)]
