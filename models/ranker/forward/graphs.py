"""Runs the forward at fixed shapes: on a GPU as CUDA graphs, on a processor the same passes without them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.ranker.forward.attention import Sequences
from models.ranker.forward.batch import Bucket
from models.ranker.forward.model import Forward, Rows

COLUMNS = 64
"""Number of vectors with which every state that is read is multiplied, used or not: a product's shape never depends on
how many candidates are read."""
ROWS_AT_ONCE = 64
"""Number of states in one product with the readout, the reads of the smallest pass: in fp32 cuBLAS may split the sums
of a product, by its shape, so all passes multiply in this one."""
WARM_UPS = 2
"""Number of passes before a capture, in which libraries choose kernels and reserve their memory."""


@dataclass(frozen=True)
class Outcome:
    """What a pass computes, on the device."""

    states: Tensor
    """Normalised hidden states at the rows that are read, in fp32 [reads, hidden]."""
    scores: Tensor
    """Their dot products with the readout's columns, in fp32 [reads, columns]."""


class Captured:
    """A pass as a CUDA graph, with the memory for its arrays.

    Args:
        passes: what runs it.
        bucket: its shape.
        pool: memory that the graphs share; they run one after the other.
    """

    def __init__(self, passes: "Passes", bucket: Bucket, pool: Any) -> None:
        size = sum(bucket.parts)
        self._given = torch.zeros(size, dtype=torch.int32).pin_memory()
        self._arrays = torch.zeros(size, dtype=torch.int32, device=passes.device)
        stream = torch.cuda.Stream(passes.device)
        stream.wait_stream(torch.cuda.current_stream(passes.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                passes.compute(self._arrays, bucket)
        torch.cuda.current_stream(passes.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outcome = passes.compute(self._arrays, bucket)

    def __call__(self, arrays: NDArray[np.int32]) -> Outcome:
        """Return the outcome for these arrays; the next pass overwrites it."""
        # The copy of the pass before has ended: its scores have been read.
        self._given.numpy()[:] = arrays
        self._arrays.copy_(self._given, non_blocking=True)
        self._graph.replay()
        return self._outcome


class Passes:
    """The passes of one model, whose outcomes must be read before the next pass.

    Args:
        forward: the layers.
        device: their device.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self.device = device
        self._forward = forward
        self._captured: dict[Bucket, Captured] = {}
        self._pool: Any = None
        self.readout = torch.zeros(forward.shape.hidden, COLUMNS, device=device)
        """Vectors with which states are multiplied [hidden, columns], in fp32; write into it to change them."""

    @torch.inference_mode()
    def __call__(self, arrays: NDArray[np.int32], bucket: Bucket) -> Outcome:
        """Return what a pass computes.

        Args:
            arrays: what :func:`models.ranker.forward.batch.pack` returned.
            bucket: the shape that it was packed for.
        """
        if captured := self._captured.get(bucket):
            with torch.cuda.device(self.device):
                return captured(arrays)
        return self.compute(torch.from_numpy(arrays).to(self.device), bucket)

    @torch.inference_mode()
    def capture(self, bucket: Bucket) -> None:
        """Capture the pass of this shape, unless the attention cannot be captured: on a processor, and in fp32."""
        if self._forward.attention.captures and bucket not in self._captured:
            with torch.cuda.device(self.device):
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._captured[bucket] = Captured(self, bucket, self._pool)

    def compute(self, arrays: Tensor, bucket: Bucket) -> Outcome:
        """Return what a pass over these arrays on the device computes."""
        tokens, positions, places, queries, keys, key_rows = arrays.split(bucket.parts)
        sequences = Sequences(queries, keys if bucket.lines else queries, bucket.longest)
        rows = Rows(tokens, positions, places, sequences, key_rows if bucket.lines else None)
        states = self._forward(rows).float()
        return Outcome(states, torch.cat([part @ self.readout for part in states.split(ROWS_AT_ONCE)]))
