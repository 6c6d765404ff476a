"""Builds the training and the validation examples of one training."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from llamarec_client.contract import MAX_CANDIDATES
from models.ranker.examples.sampling import Example, RandomPools, RetrievedPools, sample_examples
from models.ranker.options import RankerTraining
from models.retriever.batches import Items
from models.retriever.candidates import CandidateTable
from preprocessing.data import Data
from preprocessing.errors import InputError

WIDE_POOL = 200
"""Number of retrieved items from which the negatives ``pool`` are drawn."""


def training_examples(options: RankerTraining, artifacts: Path, data: Data) -> list[Example]:
    """Return the training examples for these options, in the order of training.

    For the negatives ``retriever`` and ``pool`` the retriever is cross-fitted first.

    Args:
        options: see :class:`RankerTraining`.
        artifacts: folder that holds ``data`` and ``retriever``.
        data: the data set in ``artifacts/data``.
    """
    pools: RandomPools | RetrievedPools
    if options.negatives in ("random", "popular"):
        counts = data.catalogue.counts if options.negatives == "popular" else None
        pools = RandomPools(data.catalogue.trained, options.candidates, options.pools, counts)
    else:
        from models.ranker.examples.crossfit import cross_fit

        drawn = options.candidates if options.negatives == "pool" else None
        length = WIDE_POOL if drawn else options.candidates
        fitted = cross_fit(artifacts, data, folds=options.folds, candidates=length)
        pools = RetrievedPools(fitted.lists, options.order, options.pools, drawn)
    sample = partial(sample_examples, data.training, per_user=options.max_user_prompts)
    first: list[Example] = []
    if options.random_prompts:
        random = RandomPools(data.catalogue.trained, options.candidates, options.pools)
        first = sample(random, count=options.random_prompts, seed=(options.seed, 1))
    return [*first, *sample(pools, count=options.max_prompts, seed=options.seed)]


def validation_table(artifacts: Path, data: Data, candidates: int) -> CandidateTable:
    """Return the retriever's candidates for every user's validation item.

    They are read from the retriever's artifact, or retrieved again if the artifact stores a different number of them.
    """
    table = CandidateTable.read(artifacts / "retriever" / "candidates-validation.parquet")
    if candidates == MAX_CANDIDATES:
        return table
    from models.retriever.trained import TrainedRetriever

    rows = TrainedRetriever.load(artifacts / "retriever").retrieve(data.training, candidates)
    return CandidateTable(data.users, rows, data.validation, table.ranks, table.model_ranks)


def validation_examples(table: CandidateTable, data: Data) -> list[Example]:
    """Return an example in the retriever's order for each user whose true item is among the candidates.

    Args:
        table: the retriever's candidates for validation.
        data: the data set, for the histories.

    Raises:
        InputError: the retriever found the true item of no user.
    """
    histories: Mapping[str, Items] = dict(zip(data.users, data.training, strict=True))
    examples = []
    for user, row, item in zip(table.users, table.candidates, table.truth, strict=True):
        found = np.flatnonzero(row.items == item)
        if len(found):
            examples.append(Example(histories[user], row.items, int(found[0]), row.scores))
    if not examples:
        raise InputError(
            f"the retriever's candidates contain the next item for none of {len(table.users)} users, so there is"
            " nothing to validate the ranker on: train the retriever longer"
        )
    return examples
