"""BERT4Rec: a bidirectional encoder that predicts masked items; a mask at the end stands for the next item.

Source: Sun et al., "BERT4Rec" (CIKM 2019), sections 3.2 to 3.6.
"""

import torch
from torch import Tensor, nn

from models.retriever.architectures.dropout import Dropout
from models.retriever.architectures.item_embedding import ItemEmbedding
from models.retriever.architectures.packing import PaddedModel


class BERT4Rec(PaddedModel):
    """A model that scores every item as the next one of a sequence.

    Args:
        items: size of the catalogue; item numbers are 1..items, 0 is the padding and ``items + 1`` the mask.
        length: maximum length of a sequence, including the mask at the end.
        width: size of the item embeddings.
        blocks: number of encoder layers.
        heads: number of attention heads, among which the width is divided.
        dropout: share of activations that are dropped in training.
        titles: see :class:`ItemEmbedding`.
    """

    def __init__(
        self,
        items: int,
        length: int,
        width: int = 64,
        blocks: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        titles: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.mask = items + 1
        self.heads = heads
        self.embedding = ItemEmbedding(items + 2, width, titles)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.embedding_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True)
            for _ in range(blocks)
        )
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(items + 1))
        for name, parameter in self.named_parameters():
            if "norm" not in name and not name.endswith("bias") and parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width]; the last predicts the next."""
        masks = torch.full_like(items[:, :1], self.mask)
        return self.encode(torch.cat((items[:, 1:], masks), dim=1))

    def encode(self, items: Tensor) -> Tensor:
        """Map item numbers and masks [batch, length] to states [batch, length, width]."""
        count = items.shape[1]
        x = self.dropout(self.embedding_norm(self.embedding(items) + self.position[-count:]))
        same = torch.eye(count, dtype=torch.bool, device=items.device)
        hidden = (items == 0).unsqueeze(1) & ~same  # [batch, length, length]: padding is visible only to itself
        hidden = hidden.repeat_interleave(self.heads, dim=0)
        for block in self.blocks:
            x = block(x, src_mask=hidden)
        states: Tensor = self.transform(x)
        return states

    def head(self, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the vectors [n, width] and biases [n] of some items, by default of all with the padding first."""
        if items is not None:
            return self.embedding(items), self.bias[items]
        return self.embedding.table()[:-1], self.bias
