"""What every retriever architecture offers to training, evaluation and export."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Retriever(Protocol):
    """A sequential recommender: states of a history, and their scores of every item.

    Besides the methods that are documented here it is a ``torch.nn.Module``, of which those that are used are listed.
    """

    training: bool

    def __call__(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width]; the last predicts the next."""
        ...

    def last_state(self, items: Tensor) -> Tensor:
        """Return the last of the states [batch, width], without the work that only the others need."""
        ...

    def states_at(self, items: Tensor, kept: Tensor) -> Tensor:
        """Return the states of some places only, without the work of the padding before them.

        Args:
            items: item numbers [batch, length], left-padded.
            kept: [batch, length]; in each row the last places.

        Returns:
            [kept, width], in the order of ``padded[kept]``: row by row.
        """
        ...

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the items' vectors [items + 1, width] and biases [items + 1], if any, that score a state."""
        ...

    def score(self, states: Tensor) -> Tensor:
        """Map states [..., width] to logits of every item number, the padding's included [..., items + 1]."""
        ...

    def eval(self) -> Any:
        """See ``torch.nn.Module``, as for the methods below."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def cpu(self) -> Any: ...

    def to(self, device: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
