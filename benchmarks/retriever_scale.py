"""Measures a retriever's training, validation and candidates on generated data of many users and items.

    python -m benchmarks.retriever_scale --json    # 10 million interactions of a million users and 200,000 items

LRURec of width 64 reads the words of the titles, and the signals reorder its best items. The data is held in memory as
in a training. Steps of the full softmax and of the sampled one take turns on the same batches, and figures are medians.
Candidates of some users are ranked and streamed to Parquet as after a training. Peak memory is that of the process so
far, with the data, the model, the optimiser and the statistics of the signals.

An item belongs to one of many groups, and a user's items mostly come from one group, by a Zipf distribution. Titles are
words of the group and random ones.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.memory import peak_memory
from models.retriever.architectures.build import build_model
from models.retriever.batches import inputs_and_targets, training_windows
from models.retriever.fitting.loop import loss_of, make_optimizer
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.signals.fitting import count_statistics, fit_weights
from models.signals.signals import Signals
from models.titles.fit_words import fit_words

GROUP = 500
"""Number of items in a group."""
OUTSIDE = 0.2
"""Share of a user's items that come from any group."""
WORDS, WORDS_OF_A_GROUP, VOCABULARY = 8, 20, 30_000
CANDIDATES = 20


def sequences_of(users: int, items: int, interactions: int, rng: np.random.Generator) -> list[NDArray[np.int32]]:
    """Return a sequence of item numbers for each user; lengths are geometric above 3."""
    lengths = 3 + rng.geometric(1 / max(interactions / users - 2, 1), users) - 1
    total = int(lengths.sum())
    groups = max(1, items // GROUP)
    group = np.repeat(rng.integers(0, groups, users), lengths)
    group = np.where(rng.random(total) < OUTSIDE, rng.integers(0, groups, total), group)
    # The place in the group is log-uniform, which is Zipf's distribution with exponent 1.
    place = np.exp(rng.random(total) * np.log(GROUP)).astype(np.int64) - 1
    numbers = (1 + np.minimum(group * GROUP + place, items - 1)).astype(np.int32)
    return np.split(numbers, np.cumsum(lengths)[:-1])


def titles_of(items: int, rng: np.random.Generator) -> list[str]:
    """Return a title for each item: half of its words are those of its group."""
    theirs = rng.integers(0, VOCABULARY, (1 + items // GROUP, WORDS_OF_A_GROUP))
    group = theirs[np.arange(items) // GROUP]
    shared = np.take_along_axis(group, rng.integers(0, WORDS_OF_A_GROUP, (items, WORDS // 2)), axis=1)
    words = np.concatenate((shared, rng.integers(0, VOCABULARY, (items, WORDS // 2))), axis=1)
    return [" ".join(f"word{word}" for word in row) for row in words.tolist()]


class Scale:
    """One measurement; its parts are measured one after another in this process.

    Args:
        users: number of users.
        items: number of items.
        interactions: number of interactions, on average.
        options: the retriever's options; ``negatives`` are those of the sampled softmax.
    """

    def __init__(self, users: int, items: int, interactions: int, options: RetrieverTraining) -> None:
        rng = np.random.default_rng(options.seed)
        sequences = sequences_of(users, items, interactions, rng)
        self.options, self.items = options, items
        self.training = [sequence[:-2] for sequence in sequences]
        self.truth = np.array([sequence[-2] for sequence in sequences], np.int32)
        self.titles = titles_of(items, rng)
        self.encoder = fit_words(self.titles)
        vectors = self.encoder.vectors(self.encoder.rows(["", *self.titles]))
        torch.manual_seed(options.seed)
        self.model = build_model(options, items, torch.from_numpy(vectors))
        self.found: dict[str, object] = {
            "users": users,
            "items": items,
            "interactions": sum(map(len, sequences)),
            "batch_size": options.batch_size,
            "negatives": options.negatives,
        }

    def step(self, steps: int) -> None:
        """Measure steps of the full and of the sampled softmax, in turn."""
        windows = training_windows(self.training, self.options.max_length)
        inputs, targets = (torch.from_numpy(part) for part in inputs_and_targets(windows, self.options.max_length))
        counts = torch.from_numpy(np.bincount(np.concatenate(windows), minlength=self.items + 1))
        full = loss_of(RetrieverTraining(model=self.options.model), counts)
        losses = {"full": full, "sampled": loss_of(self.options, counts)}
        optimizer = make_optimizer(self.model, self.options)
        order = np.random.default_rng(0).permutation(len(inputs))
        taken: dict[str, list[float]] = {name: [] for name in losses}
        for turn in range(steps + 1):
            rows = order[turn * self.options.batch_size :][: self.options.batch_size]
            for name, loss in losses.items():
                started = time.perf_counter()
                self.model.train()
                optimizer.zero_grad(set_to_none=True)
                total, count = loss(self.model, inputs[rows], targets[rows])
                torch.autograd.backward(total / count)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
                optimizer.step()
                if turn:  # after a step of warm-up
                    taken[name].append(time.perf_counter() - started)
        seconds = {name: statistics.median(values) for name, values in taken.items()}
        self.found |= {f"{name}_softmax_steps_a_second": round(1 / value, 2) for name, value in seconds.items()}
        self.found["sampled_times_faster"] = round(seconds["full"] / seconds["sampled"], 1)
        self.found["minutes_an_epoch_sampled"] = round(
            len(inputs) / self.options.batch_size * seconds["sampled"] / 60, 1
        )
        self.found["training_peak_memory_mib"] = round(peak_memory())

    def validate(self, users: int) -> None:
        """Measure the ranking of some users' validation items, as it stops a training."""
        started = time.perf_counter()
        rank_users(self.model, self.options.max_length, self.training[:users], self.truth[:users])
        self.found["validation_users_a_second"] = round(users / (time.perf_counter() - started))

    def retrieve(self, users: int) -> None:
        """Measure the candidates of some users with signals, streamed to Parquet."""
        started = time.perf_counter()
        counted = count_statistics(self.training, self.titles, self.items, self.encoder)
        self.found["seconds_to_count_statistics"] = round(time.perf_counter() - started, 1)
        signals = Signals(counted, fit_weights([], [], 1), self.options.pool)
        trained = TrainedRetriever([TrainedModel(self.model, self.options, self.items)], RetrievalStage(signals))
        histories, names = self.training[:users], [str(user) for user in range(users)]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "candidates.parquet"
            trained.write_candidates(path, names, histories, self.truth[:users], CANDIDATES)
        self.found["candidates_users_a_second"] = round(users / (time.perf_counter() - started))
        self.found["peak_memory_mib"] = round(peak_memory())


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000, help="Number of users.")
    parser.add_argument("--items", type=int, default=200_000, help="Number of items.")
    parser.add_argument("--interactions", type=int, default=10_000_000, help="Number of interactions, on average.")
    parser.add_argument("--batch-size", type=int, default=256, help="Training windows per step.")
    parser.add_argument("--negatives", type=int, default=8192, help="Random items of the sampled softmax.")
    parser.add_argument("--steps", type=int, default=7, help="Steps of each softmax; medians are printed.")
    parser.add_argument("--ranked", type=int, default=5000, help="Users that are validated and given candidates.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    given = parser.parse_args()
    options = RetrieverTraining(titles="words", batch_size=given.batch_size, negatives=given.negatives)
    scale = Scale(given.users, given.items, given.interactions, options)
    scale.step(given.steps)
    scale.validate(given.ranked)
    scale.retrieve(given.ranked)
    lines = (f"{name.replace('_', ' ')}: {value}" for name, value in scale.found.items())
    print(json.dumps(scale.found, indent=1) if given.json else "\n".join(lines))


if __name__ == "__main__":
    main()
