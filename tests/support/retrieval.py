"""Small retrieval stages of random models and signals, for tests of what selects, orders and exports candidates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.retriever.architectures.build import build_model
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.signals.fitting import count_statistics
from models.signals.signals import RETRIEVERS, SIGNALS, ItemStatistics, Signals

WORDS = ("amber", "birch", "cedar", "daisy", "elder", "fern", "gorse", "hazel", "iris", "juniper")


def random_model(options: RetrieverTraining, items: int, seed: int = 7) -> TrainedModel:
    """Return an untrained model whose weights are larger than at the start of a training, so that scores differ."""
    torch.manual_seed(seed)
    model: Any = build_model(options, items).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return TrainedModel(model, options, items)


def alone(model: TrainedModel) -> TrainedRetriever:
    """Return a stage of one retriever without signals."""
    return TrainedRetriever([model], RetrievalStage())


def random_statistics(items: int, seed: int = 0) -> ItemStatistics:
    """Return the statistics of 80 random sequences over items whose titles are one to four of ten words, or empty."""
    rng = np.random.default_rng(seed)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) if item % 7 else "" for item in range(1, items + 1)]
    sequences = [rng.integers(1, items + 1, rng.integers(1, 20)).astype(np.int32) for _ in range(80)]
    return count_statistics(sequences, titles, items)


def weights(retrievers: Sequence[float], **signals: float) -> dict[str, float]:
    """Return the weights of one or two retrievers and of the named signals; the other signals have weight 0."""
    return {**dict(zip(RETRIEVERS, retrievers, strict=False)), **dict.fromkeys(SIGNALS, 0.0), **signals}


def random_signals(items: int, retrievers: int, pool: int, seed: int = 0) -> Signals:
    """Return signals of random statistics, each with a random weight."""
    rng = np.random.default_rng(seed + 1)
    names = (*RETRIEVERS[:retrievers], *SIGNALS)
    drawn = dict(zip(names, rng.uniform(0.2, 1.0, len(names)).tolist(), strict=True))
    return Signals(random_statistics(items, seed), drawn, pool)


def log_softmax(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the logarithm of the softmax [k] of scores [k], by its definition."""
    exact = np.asarray(scores, np.float64)
    return exact - np.log(np.exp(exact).sum())
