"""Packs the tensors that a step hands on into one: each tensor of a request costs the server and both processes time.

The steps know nothing of it: :mod:`serving.steps.worker` packs and unpacks. A packed tensor holds a header of int64 (a
mark of the packing, then the number of elements and of bytes of each tensor) and the tensors one after the other.
"""

import zlib
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamarec_client.contract import TensorSpec
from serving.contract import HANDED_ON, PACKED

DTYPES: Mapping[str, type] = {"STRING": object, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
ALIGNED = 8
"""Number of bytes of whose multiples every tensor starts at one."""


class Packing:
    """What one step packs.

    Args:
        specs: the tensors, in the order in which they are packed.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        described = ",".join(f"{spec.name}:{spec.data_type}" for spec in specs)
        self._mark = zlib.crc32(described.encode())
        self._header = 1 + 2 * len(specs)

    def holds(self, tensors: Container[TensorSpec]) -> bool:
        """Return whether all the tensors are there: not if a caller asks a step alone and gives its inputs only."""
        return all(spec in tensors for spec in self._specs)

    def pack(self, tensors: Mapping[TensorSpec, ArrayLike]) -> NDArray[np.uint8]:
        """Return the packed tensors [bytes].

        Args:
            tensors: inputs and outputs of the step.

        Raises:
            KeyError: a tensor is not among them.
        """
        header, parts = [self._mark], [b""]
        for spec in self._specs:
            count, content = _encoded(spec, tensors[spec])
            header += (count, len(content))
            parts += (content, bytes(-len(content) % ALIGNED))
        parts[0] = np.array(header, np.int64).tobytes()
        return np.frombuffer(b"".join(parts), np.uint8)

    def unpack(self, packed: NDArray[np.uint8]) -> dict[TensorSpec, NDArray[Any]]:
        """Return the arrays [n] of packed tensors; those of numbers share the packed memory.

        Raises:
            RuntimeError: the step that packed them packs other tensors.
        """
        buffer = packed.data
        mark, *sizes = np.frombuffer(buffer, np.int64, self._header).tolist()
        if mark != self._mark:
            raise RuntimeError("two steps of the release run different versions of llamarec: restart the server")
        place, tensors = 8 * self._header, {}
        for spec, count, size in zip(self._specs, sizes[::2], sizes[1::2], strict=True):
            tensors[spec] = _decoded(spec, buffer[place : place + size], count)
            place += size + -size % ALIGNED
        return tensors


PACKINGS: Mapping[str, Packing] = {PACKED[step].name: Packing(specs) for step, specs in HANDED_ON.items()}
"""The packing of each packed tensor, by its name."""


def _encoded(spec: TensorSpec, values: ArrayLike) -> tuple[int, bytes]:
    """Return the number of elements, and their bytes."""
    array: NDArray[Any] = np.asarray(values, DTYPES[spec.data_type])
    if array.dtype != object:
        return len(array), array.tobytes()
    if not len(array):
        return 0, b""
    texts: list[bytes] = array.tolist()
    return len(texts), np.array([len(text) for text in texts], np.int32).tobytes() + b"".join(texts)


def _decoded(spec: TensorSpec, content: memoryview, count: int) -> NDArray[Any]:
    """Return an array of the elements [count]."""
    dtype = DTYPES[spec.data_type]
    if dtype is not object:
        return np.frombuffer(content, dtype)
    texts = np.empty(count, dtype=object)
    if count:
        lengths = np.frombuffer(content, np.int32, count).tolist()
        ends = accumulate(lengths, initial=4 * count)
        texts[:] = [bytes(content[start:end]) for start, end in pairwise(ends)]
    return texts
