"""Ranks the catalogue for every user, a batch of users at a time: places for metrics, candidates for the ranker.

Nothing here holds more scores than one batch's. Masks and ties are those of :mod:`models.retriever.candidates`, which
answers one request; ``tests/models/retriever/test_ranking.py`` holds the two equal.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.contract import MAX_CANDIDATES
from models.retriever.batches import Items, pad_left
from models.retriever.candidates import CandidateWriter, place_of, top_candidates

USERS_AT_ONCE = 256
SCORES_AT_ONCE = 1 << 24
"""Largest batch of scores, unless one user's are more: 64 MiB, so 16 users at once over a million items."""


class Batch(NamedTuple):
    """Scores of some users, in the order of the users."""

    users: slice
    scores: Tensor
    """[users, items + 1] logits; the padding's and those of items in the history are -inf."""


@torch.inference_mode()
def score_histories(model: Any, length: int, histories: Sequence[Items]) -> Iterator[Batch]:
    """Scores what comes after each history, a batch of users at a time, with everything in the history masked.

    Args:
        model: a retriever; it is put in evaluation mode.
        length: most recent items that it reads.
        histories: item numbers of each user, oldest first.
    """
    model.eval()
    weight = model.embedding.weight
    size = max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // len(weight)))
    for start in range(0, len(histories), size):
        some = histories[start : start + size]
        # No more padding than the batch needs; one place more, for BERT4Rec's mask.
        places = min(length, max(map(len, some)) + 1)
        scores = model.score(model(torch.from_numpy(pad_left(some, places)).to(weight.device))[:, -1])
        yield Batch(slice(start, start + len(some)), mask(scores, some))


def mask(scores: Tensor, histories: Sequence[Items]) -> Tensor:
    """Sets the padding and everything in each user's history to -inf, in place.

    Args:
        scores: [users, items + 1].
        histories: item numbers of each user.
    """
    rows = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
    scores[:, 0] = -torch.inf
    if len(rows):
        columns = np.concatenate(histories).astype(np.int64)
        scores[torch.from_numpy(rows).to(scores.device), torch.from_numpy(columns).to(scores.device)] = -torch.inf
    return scores


def top_of_each(scores: Tensor, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best ``k`` items of each user, as :func:`top_candidates` finds them for one.

    Args:
        scores: masked [users, items + 1].
        k: how many.

    Returns:
        item numbers and scores [users, k]; 0 and -inf where a user has fewer items left.
    """
    k = min(k, scores.shape[1] - 1)
    # One more than asked for, to see where ties at the edge leave a choice, which topk makes as it likes.
    best, items = scores.topk(k + 1)  # each [users, k + 1]
    items, by_number = items.sort()
    best, by_score = best.gather(1, by_number).sort(descending=True, stable=True)
    items = items.gather(1, by_score).masked_fill(best.isneginf(), 0)
    chosen, values = items[:, :k].int().cpu().numpy(), best[:, :k].cpu().numpy()
    undecided = (best[:, k - 1] == best[:, k]) & best[:, k].isfinite()
    for user in undecided.nonzero().flatten().tolist():
        chosen[user] = top_candidates(scores[user].cpu().numpy(), np.empty(0, np.int32), k).items
    return chosen, values


def places_of(scores: Tensor, truth: NDArray[np.int32]) -> NDArray[np.int32]:
    """The place of each user's item [users] among all, from 1; 0 when it is masked.

    Args:
        scores: masked [users, items + 1].
        truth: [users] item numbers.
    """
    # A row stays in the processor's cache for both comparisons: ten times faster than comparing the whole batch.
    rows = zip(scores.cpu().numpy(), truth.tolist(), strict=True)
    return np.array([place_of(row, item) for row, item in rows], np.int32)


def rank_users(model: Any, length: int, histories: Sequence[Items], truth: NDArray[np.int32]) -> NDArray[np.int32]:
    """The place among all items [users] of what came next, everything in the history masked; 0 when it was masked."""
    # Users with histories of like length share a batch, so that little of it is padding.
    order = np.argsort([len(items) for items in histories], kind="stable")
    ranks = np.empty(len(histories), np.int32)
    for batch in score_histories(model, length, [histories[user] for user in order]):
        users = order[batch.users]
        ranks[users] = places_of(batch.scores, truth[users])
    return ranks


def write_candidates(
    path: Path, model: Any, length: int, users: Sequence[str], histories: Sequence[Items], truth: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Writes every user's top 20 and the place of what came next to Parquet, batch by batch.

    Returns:
        the places [users], as of :func:`rank_users`.
    """
    ranks = []
    with CandidateWriter(path) as writer:
        for batch in score_histories(model, length, histories):
            items, scores = top_of_each(batch.scores, MAX_CANDIDATES)
            ranks.append(places_of(batch.scores, truth[batch.users]))
            writer.write(users[batch.users], items, scores, truth[batch.users], ranks[-1])
    return np.concatenate(ranks)
