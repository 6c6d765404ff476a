"""Scores the candidates of one ranker run: makes its inputs, finds the retriever's lists and keeps the scores."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from experiments.datasets import preprocessing_of
from experiments.kept import (
    SPLITS,
    Lists,
    RankerLists,
    Scores,
    lists_path,
    read_lists,
    read_scores,
    write_lists,
    write_scores,
)
from experiments.ranker_runs import PRESET, RETRIEVERS, Run
from experiments.title_likeness import TitleLikeness
from models.ranker.base import EMBEDDED, find_base
from models.ranker.examples.crossfit import FOLDER as CROSSFIT
from models.ranker.fusion import log_softmax
from models.ranker.inference.ranker import MODEL_FOLDER
from models.ranker.inference.runtimes import choose_runtime, load_scorer
from models.ranker.inference.verbalizer import VERBALIZER_FILE, LetterVerbalizer, Verbalizer, restore_verbalizer
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, letter_ids
from models.retriever.batches import Items
from models.retriever.options import RetrieverTraining
from models.retriever.titles import all_titles
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.signals.fitting import count_statistics
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data, load_data
from preprocessing.preprocess import preprocess
from preprocessing.progress import track

VALIDATION_USERS = 600
"""Most validation users to score, a fixed random sample; the retriever's weight is fitted on them."""
ORDERS = 4
"""Orders of the candidates that the way ``orders`` averages."""
SAVE_EVERY = 50
SETTLED_ON = 4
"""Number of prompts on which a scorer chooses its passes, as many as a ranker has probes."""
Score = Callable[[Items, Items], NDArray[np.float64]]
"""Maps a history and candidates to the model's log-probabilities [k], in the order of the candidates."""


def prepare(run: Run, work: Path, raw: Path) -> Path:
    """Make the preprocessed data and the retriever of a run where they are missing.

    Args:
        run: the run.
        work: folder for data, weights and checkpoints.
        raw: folder with the raw data sets.

    Returns:
        the folder for the run's artifacts, with links to both.
    """
    preprocess(preprocessing_of(run.dataset, raw), work / run.dataset)
    shared = work / f"{run.dataset}-{run.retriever}"
    _link(shared / "data", work / run.dataset / "data")
    train_retriever(RetrieverTraining(**RETRIEVERS[run.dataset][run.retriever]), shared)
    folder = work / run.name
    (shared / CROSSFIT).mkdir(exist_ok=True)
    for part in ("data", "retriever", CROSSFIT):
        _link(folder / part, shared / part)
    _link(folder / "base", work / "base")
    return folder


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(target.resolve())


def score_run(run: Run, folder: Path, work: Path, raw: Path) -> None:
    """Keep the scores of each way of a run that are not kept yet, and the retriever's lists if they are not.

    Args:
        run: the run.
        folder: artifacts with the trained ranker.
        work: see :func:`prepare`.
        raw: see :func:`prepare`.
    """
    data = load_data(folder)
    candidates = run.options().candidates
    path = lists_path(run.dataset, run.retriever, candidates)
    if not path.exists():
        write_lists(path, find_lists(prepare(run, work, raw) / "retriever", data, candidates))
    # Every run scores the kept lists, even if its retriever was trained again and differs in its last bits.
    lists = read_lists(path)
    for way, kept in run.files().items():
        if not kept.exists():
            keep_scores(kept, run, way, folder, data, lists)


def find_lists(retriever: Path, data: Data, candidates: int) -> RankerLists:
    """Return the retriever's lists that contain the true item."""
    trained = TrainedRetriever.load(retriever)
    likeness = TitleLikeness(data.catalogue)
    counts = np.array([0, *data.catalogue.counts], np.int32)
    statistics = count_statistics(data.training, all_titles(data), data.catalogue.trained)
    parts = {}
    for split, truth in zip(SPLITS, (data.validation, data.test), strict=True):
        histories = histories_of(data, split)
        retrieved = trained.retrieve(histories, candidates)
        places = [np.flatnonzero(row.items == item) for row, item in zip(retrieved, truth, strict=True)]
        users = np.flatnonzero([len(place) for place in places])
        if split == "validation":
            users = np.sort(np.random.default_rng(0).permutation(users)[:VALIDATION_USERS])
        parts[split] = lists = Lists()
        for user in users:
            items, shown = retrieved[user].items, histories[user][-PRESET["max_history"] :]
            lists.users.append(data.users[user])
            lists.truths.append(int(places[user][0]))
            lists.items.append(items)
            lists.scores.append(retrieved[user].scores)
            lists.popularity.append(counts[items])
            lists.likeness.append(likeness(items, shown).max(axis=1).astype(np.float32))
            lists.signals.append(statistics.signals(histories[user], items).astype(np.float32))
    return RankerLists(len(data.users), **parts)


def histories_of(data: Data, split: str) -> list[Items]:
    """Return each user's history at the time of the split's true item."""
    return data.test_histories() if split == "test" else data.training


def keep_scores(path: Path, run: Run, way: str, folder: Path, data: Data, lists: RankerLists) -> None:
    """Score every list of a run in one way; an earlier call that was stopped is resumed."""
    score = make_score(way, run, folder, data)
    progress = path.with_name(f".{path.name}")
    scores = read_scores(progress) if progress.exists() else Scores()
    seconds = float(scores.facts.get("seconds", 0.0))
    rows = list(_rows(lists, data))
    done = len(scores.users)
    for number, row in enumerate(track(rows[done:], f"{run.name} {way}", len(rows) - done), done + 1):
        split, user, history, items = row
        started = time.perf_counter()
        logprobs = score(history, items)
        seconds += time.perf_counter() - started
        scores.splits.append(split)
        scores.users.append(user)
        scores.logprobs.append(logprobs.astype(np.float32))
        if number % SAVE_EVERY == 0:
            scores.facts = {"seconds": seconds}
            write_scores(progress, scores)
    scores.facts = {
        "seconds": seconds,
        "seconds_a_request": seconds / max(len(rows), 1),
        "runtime": asdict(choose_runtime(run.device)),
        "run": asdict(run),
        "options": asdict(run.trained().options()),
        "way": way,
    }
    write_scores(path, scores)
    progress.unlink(missing_ok=True)


def _rows(lists: RankerLists, data: Data) -> Iterator[tuple[str, str, Items, Items]]:
    """Yield split, user, history and candidates of every list."""
    for split in SPLITS:
        part = lists.part(split)
        histories = dict(zip(data.users, histories_of(data, split), strict=True))
        for user, items in zip(part.users, part.items, strict=True):
            yield split, user, histories[user], items


def make_score(way: str, run: Run, folder: Path, data: Data) -> Score:
    """Return the function that scores candidates in one way.

    Args:
        way: see :class:`Run`.
        run: the run.
        folder: its artifacts, with the trained ranker.
        data: of the run.
    """
    model = find_base(EMBEDDED, folder / "base") if way == "untuned" else folder / "ranker" / MODEL_FOLDER
    tokenizer = Tokenizer.from_file(str(model / TOKENIZER_FILE))
    options = run.options()
    settings = (replace(options, read="letters") if way == "untuned" else options).prompt_settings()
    catalogue = permuted(data.catalogue, run.seed) if way == "permuted" else data.catalogue
    prompts = PromptBuilder(catalogue, tokenizer, settings)
    verbalizer: Verbalizer
    if way == "untuned":
        verbalizer = LetterVerbalizer(letter_ids(tokenizer, RESPONSE, options.candidates))
    else:
        verbalizer = restore_verbalizer(json.loads((folder / "ranker" / VERBALIZER_FILE).read_text(encoding="utf-8")))
    scorer = load_scorer(model, choose_runtime(run.device))
    shown = [data.catalogue.trained - number for number in range(options.candidates)]
    scorer.settle([prompts.build(history, shown) for history in data.training[:SETTLED_ON]])
    count = ORDERS if way == "orders" else 1

    def score(history: Items, items: Items) -> NDArray[np.float64]:
        total = np.zeros(len(items))
        for order in candidate_orders(len(items), count, run.seed):
            total[order] += log_softmax(verbalizer.logits(scorer, prompts.build(history, items[order])))
        return log_softmax(total / count)

    return score


def candidate_orders(k: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``count`` orders of k candidates: the retriever's first, then seeded random ones."""
    rng = np.random.default_rng(seed)
    yield np.arange(k)
    for _ in range(count - 1):
        yield rng.permutation(k)


def permuted(catalogue: Catalogue, seed: int) -> Catalogue:
    """Return the catalogue with its titles permuted: the model reads the same text, which now says nothing."""
    order = np.random.default_rng(seed).permutation(len(catalogue)) + 1
    numbers = range(1, len(catalogue) + 1)
    ids, titles = [catalogue.raw(n) for n in numbers], [catalogue.title(int(n)) for n in order]
    return Catalogue(ids, titles, catalogue.counts)
