"""Ranks the catalogue for every user: places for the metrics, candidates for the ranker, never all scores at once."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import Items, pad_left
from models.retriever.candidates import CandidateWriter, mask, place_of, top_candidates

USERS_AT_ONCE = 256
SCORES_AT_ONCE = 1 << 24
"""Largest batch of scores, unless one user's are more: 64 MiB, so 16 users at once over a million items."""


@torch.inference_mode()
def score_histories(model: Retriever, length: int, histories: Sequence[Items]) -> Iterator[NDArray[np.float32]]:
    """Yields for each history the logits [items + 1] of what comes next; rows are computed in batches.

    Args:
        model: a retriever; it is put in evaluation mode.
        length: most recent items that it reads.
        histories: item numbers of each user, oldest first.
    """
    model.eval()
    weight, _ = model.head()
    size = max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // len(weight)))
    for start in range(0, len(histories), size):
        some = histories[start : start + size]
        # No more padding than the batch needs; one place more, for BERT4Rec's mask.
        places = min(length, max(map(len, some)) + 1)
        items = torch.from_numpy(pad_left(some, places)).to(weight.device)
        yield from model.score(model.last_state(items)).cpu().numpy()


def rank_users(
    model: Retriever, length: int, histories: Sequence[Items], truth: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The place among all items [users] of what came next, everything in the history masked; 0 when it was masked."""
    # A row at a time: it stays in the processor's cache, which makes this five times faster than comparing a batch.
    ranks = np.empty(len(histories), np.int32)
    # Users with histories of like length share a batch, so that little of it is padding.
    users = np.argsort([len(items) for items in histories], kind="stable")
    rows = score_histories(model, length, [histories[user] for user in users])
    for user, scores in zip(users, rows, strict=True):
        mask(scores, histories[user])
        ranks[user] = place_of(scores, int(truth[user]))
    return ranks


def write_candidates(
    path: Path,
    model: Retriever,
    length: int,
    users: Sequence[str],
    histories: Sequence[Items],
    truth: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Writes every user's top 20 and the place of what came next to Parquet, some users at a time.

    Returns:
        the places [users], as of :func:`rank_users`.
    """
    ranks = np.empty(len(users), np.int32)
    rows = score_histories(model, length, histories)
    with CandidateWriter(path) as writer:
        for start in range(0, len(users), USERS_AT_ONCE):
            candidates = []
            for user, scores in enumerate(islice(rows, USERS_AT_ONCE), start):
                candidates.append(top_candidates(scores, histories[user], MAX_CANDIDATES))
                ranks[user] = place_of(scores, int(truth[user]))
            some = slice(start, start + USERS_AT_ONCE)
            writer.write(users[some], candidates, truth[some], ranks[some])
    return ranks
