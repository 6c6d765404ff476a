"""Rows and intervals of the rankers' tables, on users made up by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experiments.kept import RankerLists, Scores
from experiments.ranker_statistics import (
    ALL_SIGNALS,
    alone_row,
    averaged,
    combined_row,
    fused_row,
    gains,
    popularity_scores,
    reciprocals,
    retriever_row,
    signal_scores,
    similarity_scores,
)


def wrong(right: dict[str, Any]) -> dict[str, Any]:
    return {name: [-row for row in rows] for name, rows in right.items()}


def test_scores_that_know_the_answer_put_it_first(lists: RankerLists, right: Scores):
    """Every rank is 1, alone and fused, where the retriever gets hardly any weight."""
    seed = right.by_split()
    assert alone_row("", lists, [seed]).ranks[0].tolist() == [1, 1, 1, 1]
    row = fused_row("", lists, [seed])
    assert row.weights[0] < 0.05
    assert row.ranks[0].tolist() == [1, 1, 1, 1]


def test_each_seed_has_its_own_weight_from_validation(lists: RankerLists, right: Scores):
    """Scores that are always wrong leave all weight to the retriever; other test users change no weight."""
    seeds = [right.by_split(), wrong(right.by_split())]
    low, high = fused_row("", lists, seeds).weights
    assert low < 0.05
    assert high == 1.0
    others = replace(lists, test=replace(lists.test, truths=[2, 2, 2, 2]))
    assert fused_row("", others, seeds).weights == [low, high]


def test_popularity_takes_the_place_of_the_language_model(lists: RankerLists):
    """Counts of 1, 10 and 100: the third candidate comes first, then the second."""
    assert alone_row("", lists, [popularity_scores(lists)]).ranks[0].tolist() == [3, 2, 1, 3]


def test_similarity_takes_the_place_of_the_language_model(lists: RankerLists):
    """Similarities of 0, 1 and .5: the second candidate comes first, then the third."""
    assert alone_row("", lists, [similarity_scores(lists)]).ranks[0].tolist() == [3, 1, 2, 3]


def test_each_signal_is_a_score_source(lists: RankerLists):
    """Five signals are equal for all candidates and leave their order, 1, 2, 3, 1; the last one reverses it."""
    rows = [alone_row("", lists, [scores]).ranks[0].tolist() for scores in signal_scores(lists)]
    assert rows == [*[[1, 2, 3, 1]] * 5, [3, 2, 1, 3]]


def test_all_signals_are_fitted_together(lists: RankerLists, right: Scores):
    """Two of three validation users have the first candidate, which the last signal puts last: its weight is small."""
    row = combined_row(lists, [right.by_split()], ["retriever", ALL_SIGNALS])
    assert row.label == "retriever, all signals of the retrieval stage"
    assert row.ranks[0].tolist() == [1, 2, 3, 1]


def test_combined_score_sources_have_weights_from_validation(lists: RankerLists, right: Scores):
    """With scores that name every true item all are first; the retriever alone has ranks 1, 2, 3 and 1."""
    sources = ["retriever", "popularity", "language model"]
    row = combined_row(lists, [right.by_split()], sources)
    assert row.label == "retriever, popularity, language model"
    assert row.ranks[0].tolist() == [1, 1, 1, 1]
    alone = combined_row(lists, [right.by_split()], ["retriever"])
    assert alone.ranks[0].tolist() == retriever_row(lists).ranks[0].tolist() == [1, 2, 3, 1]


def test_gains_are_averaged_over_the_seeds_for_each_user():
    """Ranks 1 and 3: NDCG 1 and 1/2, reciprocal ranks 1 and 1/3; rank 11 counts 0."""
    ranks = [np.array([1, 11]), np.array([3, 11])]
    assert gains(ranks).tolist() == [0.75, 0.0]
    assert reciprocals(ranks).tolist() == pytest.approx([2 / 3, 0.0])


def test_metrics_are_averaged_over_the_seeds():
    """Recall@5 of ranks (1, 11) is 1/2, of (3, 2) it is 1."""
    assert averaged([np.array([1, 11]), np.array([3, 2])])["Recall@5"] == 0.75
