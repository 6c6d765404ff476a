"""Scores and ranks the catalogue for every user with one retriever, without holding all scores."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import Items, pad_left
from models.retriever.candidates import mask, place_of

USERS_AT_ONCE = 256
"""Maximum number of users in a batch."""
SCORES_AT_ONCE = 1 << 24
"""Maximum number of scores in a batch of several users: 64 MiB, or 16 users over a million items."""


@torch.inference_mode()
def score_histories(model: Retriever, length: int, histories: Sequence[Items]) -> Iterator[NDArray[np.float32]]:
    """Yield the logits [items + 1] of the next item for each history; they are computed in batches.

    Args:
        model: the retriever; it is put into evaluation mode.
        length: maximum number of history items that the model reads.
        histories: item numbers of each history, oldest first.
    """
    model.eval()
    weight, bias = model.head()
    size = max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // len(weight)))
    for start in range(0, len(histories), size):
        some = histories[start : start + size]
        # Pad to the longest history of the batch, with one more position for BERT4Rec's mask.
        places = min(length, max(map(len, some)) + 1)
        items = torch.from_numpy(pad_left(some, places)).to(weight.device)
        yield from F.linear(model.last_state(items), weight, bias).cpu().numpy()


def rank_users(
    model: Retriever, length: int, histories: Sequence[Items], truth: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the rank of each user's true item among the items outside the history [users]; 0 if it is in the history.

    Args:
        model: the retriever.
        length: maximum number of history items that the model reads.
        histories: item numbers of each history, oldest first; they are masked.
        truth: number of each user's true item [users].
    """
    # Ranking row by row is five times faster than ranking a batch, because a row stays in the processor's cache.
    ranks = np.empty(len(histories), np.int32)
    # Users with histories of similar length share a batch, which keeps the padding small.
    users = np.argsort([len(items) for items in histories], kind="stable")
    rows = score_histories(model, length, [histories[user] for user in users])
    for user, scores in zip(users, rows, strict=True):
        mask(scores, histories[user])
        ranks[user] = place_of(scores, int(truth[user]))
    return ranks
