"""What the processes of one training exchange under ``accelerate launch``; a single process exchanges nothing."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

Row = TypeVar("Row")

LONGEST_WAIT = timedelta(days=1)
"""How long the processes of a training wait for the one that writes the result. PyTorch's own limit is ten minutes on
GPUs, and the candidates of a million users, or a merged 7B, can take longer."""


def processes_on(device: Any) -> PartialState:
    """Return the processes of a training on a device; without ``accelerate launch`` there is one."""
    return PartialState(cpu=torch.device(device).type == "cpu", timeout=LONGEST_WAIT)


def share_of(rows: Sequence[Row], processes: PartialState) -> Sequence[Row]:
    """Return this process's share of some rows, which are neighbours: neighbours may have common prefixes."""
    rank, count = processes.process_index, processes.num_processes
    return rows[len(rows) * rank // count : len(rows) * (rank + 1) // count]


def gathered(rows: list[Row], processes: PartialState) -> list[Row]:
    """Return the rows of all processes, those of the first process first."""
    return rows if processes.num_processes == 1 else list(gather_object(rows))


def summed(values: Tensor, processes: PartialState) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if processes.num_processes == 1:
        return values
    total: Tensor = reduce(values, "sum")
    return total


def decided_by_first(decision: bool, processes: PartialState) -> bool:
    """Return what the first process decides."""
    return decision if processes.num_processes == 1 else bool(broadcast_object_list([decision])[0])


def sum_gradients(parameters: Sequence[Tensor], processes: PartialState) -> None:
    """Replace each parameter's gradient by its sum over all processes, in one message."""
    if processes.num_processes == 1:
        return
    own = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    total = summed(torch.cat([grad.flatten() for grad in own]), processes)
    for parameter, grad in zip(parameters, total.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)


def device_of(device: str, processes: PartialState) -> str:
    """Return PyTorch's name of this process's device: the given one, or one GPU each if there are several processes."""
    return device if device == "cpu" or processes.num_processes == 1 else str(processes.device)
