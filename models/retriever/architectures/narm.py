"""NARM: a GRU whose last state attends to all states before it.

Source: Li et al., "Neural Attentive Session-based Recommendation" (CIKM 2017), sections 3.3 to 3.6.
"""

import torch
from torch import Tensor, nn

from models.retriever.architectures.dropout import Dropout
from models.retriever.architectures.item_embedding import ItemEmbedding
from models.retriever.architectures.packing import PaddedModel


class NARM(PaddedModel):
    """A model that scores every item as the next one of a sequence.

    Args:
        items: size of the catalogue; item numbers are 1..items and 0 is the padding.
        width: size of the item embeddings and of the GRU's state.
        blocks: number of layers of the GRU.
        dropout: share of the embeddings and of the session's representation that is dropped in training.
        titles: see :class:`ItemEmbedding`.
    """

    def __init__(
        self, items: int, width: int = 64, blocks: int = 1, dropout: float = 0.25, titles: Tensor | None = None
    ) -> None:
        super().__init__()
        self.embedding = ItemEmbedding(items + 1, width, titles)
        self.dropout = Dropout(dropout)
        self.gru = nn.GRU(width, width, blocks, batch_first=True)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)
        self.project = nn.Linear(2 * width, width, bias=False)
        nn.init.trunc_normal_(self.embedding.weight, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def forward(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width]."""
        count = items.shape[1]
        order = torch.arange(count, device=items.device)
        padding = (items == 0).sum(dim=1, keepdim=True)  # [batch, 1]
        # The GRU has no mask, so items are moved to the left for it and their states back to the right.
        to_left = ((order + padding) % count).unsqueeze(-1)  # [batch, length, 1]
        to_right = ((order - padding) % count).unsqueeze(-1)
        embedded = self.dropout(self.embedding(items))
        states, _ = self.gru(embedded.gather(1, to_left.expand_as(embedded)))
        states = states.gather(1, to_right.expand_as(states))
        # Equation 8: energies of every pair of a state and one before it [batch, length, length].
        energies = self.energy(torch.sigmoid(self.query(states).unsqueeze(2) + self.key(states).unsqueeze(1))).squeeze(
            -1
        )
        seen = (order.unsqueeze(0) <= order.unsqueeze(1)) & (items > 0).unsqueeze(1)
        local = (energies * seen) @ states  # equation 6
        output: Tensor = self.project(self.dropout(torch.cat((states, local), dim=-1)))  # equation 9
        return output

    def head(self, items: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the vectors [n, width] of some items, by default of all with the padding first, and no biases."""
        return self.embedding.table() if items is None else self.embedding(items), None
