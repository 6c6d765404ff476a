"""SASRec: causal self-attention over the history.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018), section III; layer normalisation is
applied before the attention's queries and before the feed-forward layer, as in their code.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.retriever.architectures.dropout import Dropout
from models.retriever.architectures.item_embedding import ItemEmbedding
from models.retriever.architectures.packing import PaddedModel


class SASRecBlock(nn.Module):
    """A block of causal self-attention and a point-wise feed-forward layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, width), Dropout(dropout), nn.ReLU(), nn.Linear(width, width), Dropout(dropout)
        )
        self.dropout = dropout

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map x [batch, length, width] and the mask visible [batch, 1, length, length] to [batch, length, width]."""
        normed = self.attention_norm(x)
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, width / heads]
            for layer, source in ((self.query, normed), (self.key, x), (self.value, x))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        x = normed + self.project(attended.transpose(1, 2).flatten(2))
        normed = self.feed_forward_norm(x)
        output: Tensor = normed + self.feed_forward(normed)
        return output


class SASRec(PaddedModel):
    """A model that scores every item as the next one of a sequence.

    Args:
        items: size of the catalogue; item numbers are 1..items and 0 is the padding.
        length: maximum length of a sequence.
        width: size of the item embeddings.
        blocks: number of blocks.
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
        heads: int = 1,
        dropout: float = 0.2,
        titles: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.embedding = ItemEmbedding(items + 1, width, titles)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(SASRecBlock(width, heads, dropout) for _ in range(blocks))
        self.last_norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if "norm" not in name and not name.endswith("bias"):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def forward(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width]."""
        count = items.shape[1]
        is_item = items > 0  # [batch, length]
        x = self.embedding(items) * math.sqrt(self.embedding.embedding_dim) + self.position[-count:]
        x = self.dropout(x) * is_item.unsqueeze(-1)
        order = torch.arange(count, device=items.device)
        before = order.unsqueeze(0) <= order.unsqueeze(1)  # [length, length]
        # A padded position attends to itself; with nothing to attend to, its attention would be 0 / 0.
        visible = (before & is_item.unsqueeze(1)) | torch.eye(count, dtype=torch.bool, device=items.device)
        for block in self.blocks:
            x = block(x, visible.unsqueeze(1)) * is_item.unsqueeze(-1)
        states: Tensor = self.last_norm(x)
        return states

    def head(self, items: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the vectors [n, width] of some items, by default of all with the padding first, and no biases."""
        return self.embedding.table() if items is None else self.embedding(items), None
