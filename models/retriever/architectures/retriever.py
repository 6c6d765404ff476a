"""The interface of the retriever architectures, for training, evaluation and export."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Retriever(Protocol):
    """A sequential recommender that maps a history to states, and states to scores of every item.

    It is a ``torch.nn.Module``, of which the methods in use are listed too.
    """

    training: bool

    def __call__(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width], each for the next item."""
        ...

    def last_state(self, items: Tensor) -> Tensor:
        """Return the last states [batch, width], without computation that only the other states need."""
        ...

    def states_at(self, items: Tensor, kept: Tensor) -> Tensor:
        """Return the states at the marked positions only, without computing the padding before them.

        Args:
            items: item numbers [batch, length], left-padded, on the processor.
            kept: mask [batch, length] of the positions, on the processor; in each row it marks the last ones.

        Returns:
            the states [kept, width] in the order of ``padded[kept]``, that is row by row.
        """
        ...

    def head(self, items: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`score` multiplies the states with, for all items or for some.

        Args:
            items: item numbers [n]; by default all, with the padding first.

        Returns:
            the items' vectors [n, width] and biases [n]; biases may be None.
        """
        ...

    def score(self, states: Tensor) -> Tensor:
        """Map states [..., width] to the logits of every item number, including the padding's [..., items + 1]."""
        ...

    def eval(self) -> Any:
        """Set evaluation mode; see ``torch.nn.Module`` for this and the following methods."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def cpu(self) -> Any: ...

    def to(self, device: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
