"""The items' vectors: an embedding by number, and a projection of each item's frozen title vector."""

from torch import Tensor, nn
from torch.nn import functional as F


class ItemEmbedding(nn.Embedding):
    """An embedding of item numbers to which a learned projection of the items' title vectors may be added.

    The sum is used both at the input and in the head. :meth:`table` returns it for all items, so that a trained model
    can be served as one without titles.

    Args:
        rows: number of rows; row 0 is the padding, and rows without a title vector have only their own vector.
        width: size of a vector.
        titles: vectors [at most ``rows``, dimensions] of the items' titles, with zeros for the padding; they are not
            trained. None for an embedding by number alone.
    """

    titles: Tensor

    def __init__(self, rows: int, width: int, titles: Tensor | None = None) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.projection: nn.Linear | None = None
        if titles is not None:
            # Not part of the state: the vectors are an input of the training, like the sequences.
            self.register_buffer("titles", F.pad(titles, (0, 0, 0, rows - len(titles))), persistent=False)
            self.projection = nn.Linear(titles.shape[1], width, bias=False)
            nn.init.trunc_normal_(self.projection.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, items: Tensor) -> Tensor:
        """Map item numbers [...] to vectors [..., width]."""
        own = super().forward(items)
        if self.projection is None:
            return own
        projected: Tensor = self.projection(F.embedding(items, self.titles))
        return own + projected

    def table(self) -> Tensor:
        """Return the vectors of all rows [rows, width]."""
        if self.projection is None:
            return self.weight
        projected: Tensor = self.projection(self.titles)
        return self.weight + projected
