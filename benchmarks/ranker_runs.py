"""The trainings behind docs/results/ranker.md, and the scores that are kept of them.

For each data set and retriever one file of candidate lists (the retriever's scores, the true item's place, how popular
each candidate is), and for each run and way of asking it one file of the language model's log-probabilities: of every
test user and a sample of the validation users whose item is among the candidates. From these every figure is computed
(:mod:`benchmarks.rankers`).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.titles import TitleNearness
from models.ranker.base import EMBEDDED, find_base
from models.ranker.examples.crossfit import FOLDER as CROSSFIT
from models.ranker.examples.crossfit import retrieve
from models.ranker.fusion import log_softmax
from models.ranker.inference.ranker import MODEL_FOLDER
from models.ranker.inference.scorer import choose_runtime, load_scorer
from models.ranker.inference.verbalizer import VERBALIZER_FILE, LetterVerbalizer, Verbalizer, restore_verbalizer
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings, letter_ids
from models.ranker.training import train_ranker
from models.retriever.options import RetrieverTraining
from models.retriever.training import load_retriever, train_retriever
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess
from preprocessing.progress import track

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results" / "data" / "ranker"
DATA = {
    "ml-latest-small": Preprocessing(dataset="movielens", raw=ROOT / "../shared/data/ml-latest-small"),
    "amazon-2014-beauty": Preprocessing(dataset="amazon", raw=ROOT / "../shared/data/amazon-2014-beauty"),
}
SHORT = {"validate_every": 200, "patience": 8}
RETRIEVERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ml-latest-small": {
        "lrurec": {"dropout": 0.5, "weight_decay": 0.0, "max_length": 200, "batch_size": 16, **SHORT},
    },
    "amazon-2014-beauty": {
        "lrurec": {"dropout": 0.5, **SHORT},
        "sasrec": {"model": "sasrec", "dropout": 0.6, "batch_size": 512, **SHORT},
    },
}
"""What differs from the defaults of :class:`RetrieverTraining`: the settings that docs/results/retrievers.md chose."""
PRESET = {
    **PRESETS["smollm2-135m"],
    "validation_users": 300,
    "validate_every": 750,
    "full_validation": False,
}
"""The preset, validated less often; what is kept of every run is a fuller validation."""
FEWER = {"max_prompts": 2400, "warmup_steps": 30}
LISTS = {**FEWER, "negatives": "retriever", "order": "retriever"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "main": {},
    "fewer-prompts": FEWER,
    "large-steps": {**FEWER, "learning_rate": 1e-3},
    "popular": {"negatives": "popular"},
    "lists-only": LISTS,
    "lists-shuffled": {**LISTS, "order": "shuffled"},
    "lists-behind": {**LISTS, "random_prompts": 1600, "max_prompts": 800},
    "letters": {**FEWER, "read": "letters", "depth": None, "layers": 12},
    "deep": {**FEWER, "depth": 24, "layers": 12},
    "fifty-candidates": {"candidates": 50},
}
"""What differs from the preset ``smollm2-135m``; ``main`` is the chosen configuration."""
VALIDATION_USERS = 600
"""On whom the retriever's weight is chosen: at most so many, a fixed random sample."""
SPLITS = ("validation", "test")
ORDERS = 4
"""Orders of the candidates that the way ``orders`` averages."""
SAVE_EVERY = 50


@dataclass(frozen=True)
class Run:
    """One training and the ways it is read."""

    dataset: str
    retriever: str = "lrurec"
    variant: str = "main"
    seed: int = 42
    ways: tuple[str, ...] = ("tuned",)
    """``tuned``: as served; ``permuted``: with titles permuted over the catalogue; ``orders``: scores averaged over
    four orders of the candidates; ``untuned``: the base's letters."""
    hours: float = 1.0
    """After which the run is stopped, to go on at the next call."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.dataset}-{self.retriever}-{self.variant}-seed{self.seed}"

    def options(self) -> RankerTraining:
        """Of its training."""
        return RankerTraining(**{**PRESET, **VARIANTS[self.variant], "seed": self.seed})

    def trained(self) -> "Run":
        """Whose ranker is read: random negatives know no retriever, so that LRURec's ranker is that of any other, and
        lines are read one by one, so that the main ranker reads any number of them.
        """
        if self.variant == "fifty-candidates":
            return replace(self, variant="main")
        return self if self.options().negatives == "retriever" else replace(self, retriever="lrurec")

    def files(self) -> dict[str, Path]:
        """Where the letter scores of each way are kept."""
        return {way: KEPT / f"{self.name}-{way}.parquet" for way in self.ways}


MAIN_WAYS = ("tuned", "permuted")
EVERY_WAY = (*MAIN_WAYS, "untuned", "orders")
RUNS = [
    *(
        Run(dataset, seed=seed, ways=EVERY_WAY if seed == 42 else ("tuned",), hours=6)
        for dataset in ("amazon-2014-beauty", "ml-latest-small")
        for seed in (42, 43, 44)
    ),
    *(
        Run("amazon-2014-beauty", variant="large-steps", seed=seed, ways=MAIN_WAYS if seed == 42 else ("tuned",))
        for seed in (42, 43, 44)
    ),
    Run("amazon-2014-beauty", variant="fewer-prompts", seed=44),
    *(Run("amazon-2014-beauty", retriever="sasrec", seed=seed, hours=6) for seed in (42, 43, 44)),
    *(Run(dataset, variant="popular", ways=MAIN_WAYS, hours=6) for dataset in DATA),
    *(
        Run(dataset, variant=name)
        for name in ("fifty-candidates", "lists-only", "lists-shuffled", "lists-behind", "letters", "deep")
        for dataset in DATA
    ),
]
"""In the order of training: the main rows, earlier settings of theirs, the best retriever where that is another one,
one-seed ablations of an hour at most."""


def lists_path(dataset: str, retriever: str, candidates: int) -> Path:
    """Where the retriever's lists are kept."""
    return KEPT / f"{dataset}-{retriever}-top{candidates}.parquet"


@dataclass
class Lists:
    """Candidates of the users of one split whose true item is among them."""

    users: list[str] = field(default_factory=list)
    histories: list[NDArray[np.int32]] = field(default_factory=list)
    items: list[NDArray[np.int32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    truths: list[int] = field(default_factory=list)


def prepare(run: Run, work: Path) -> Path:
    """Data and retriever of a run, made where they are missing; the folder for its artifacts, linked to them."""
    preprocess(DATA[run.dataset], work / run.dataset)
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


def execute(run: Run, work: Path) -> None:
    """Trains a run, unless it is trained, and keeps the letter scores of each way that are not kept yet."""
    trained = run.trained()
    folder = prepare(trained, work)
    train_ranker(trained.options(), folder)
    data = load_data(folder)
    candidates = run.options().candidates
    path = lists_path(run.dataset, run.retriever, candidates)
    if not path.exists():
        retriever = prepare(run, work) / "retriever"
        keep_lists(path, {split: found_lists(retriever, data, split, candidates) for split in SPLITS}, data)
    splits = read_lists(path, data)
    for way, kept in run.files().items():
        if not kept.exists():
            keep_letters(kept, run, way, folder, data, splits)


def found_lists(retriever: Path, data: Data, split: str, candidates: int) -> Lists:
    """The retriever's lists that hold the true item, and the history that each was made from."""
    histories, truth = data.training, data.validation
    if split == "test":
        histories, truth = [*map(np.append, data.training, data.validation)], data.test
    model, options = load_retriever(retriever)
    retrieved = retrieve(model, options.max_length, histories, candidates)
    places = [np.flatnonzero(row.items == item) for row, item in zip(retrieved, truth, strict=True)]
    users = np.flatnonzero([len(place) for place in places])
    if split == "validation":
        users = np.sort(np.random.default_rng(0).permutation(users)[:VALIDATION_USERS])
    lists = Lists()
    for user in users:
        lists.users.append(data.users[user])
        lists.histories.append(histories[user])
        lists.items.append(retrieved[user].items)
        lists.scores.append(retrieved[user].scores)
        lists.truths.append(int(places[user][0]))
    return lists


def keep_lists(path: Path, splits: Mapping[str, Lists], data: Data) -> None:
    """Writes the retriever's candidates and scores, the true places, the candidates' popularity in training and how
    near the nearest title of the history is to each.
    """
    counts = np.array([0, *data.catalogue.counts])
    near = TitleNearness(data.catalogue)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("split", "user", "truth", "items", "scores", "popularity", "nearness")
    }
    for split, lists in splits.items():
        columns["split"] += [split] * len(lists.users)
        columns["user"] += lists.users
        columns["truth"] += lists.truths
        columns["items"] += lists.items
        columns["scores"] += lists.scores
        columns["popularity"] += [counts[items].astype(np.int32) for items in lists.items]
        shown = [history[-PRESET["max_history"] :] for history in lists.histories]
        columns["nearness"] += [
            near(items, history).max(axis=1).astype(np.float32)
            for items, history in zip(lists.items, shown, strict=True)
        ]
    _write(path, pa.table(columns), {"users": len(data.users)})


def read_lists(path: Path, data: Data) -> dict[str, Lists]:
    """What :func:`keep_lists` wrote: every run is read on the same candidates, also one whose retriever was trained
    anew on another machine and differs in its last bits.
    """
    if "items" not in pq.read_schema(path).names:
        raise InputError(f"{path} does not say which items it lists: remove it and the letters that go with it")
    rows = pq.read_table(path).to_pylist()
    place = {user: row for row, user in enumerate(data.users)}
    splits = {split: Lists() for split in SPLITS}
    for row in rows:
        lists, user = splits[row["split"]], place[row["user"]]
        history = data.training[user]
        lists.users.append(row["user"])
        lists.histories.append(np.append(history, data.validation[user]) if row["split"] == "test" else history)
        lists.items.append(np.array(row["items"], np.int32))
        lists.scores.append(np.array(row["scores"], np.float32))
        lists.truths.append(row["truth"])
    return splits


def keep_letters(path: Path, run: Run, way: str, folder: Path, data: Data, splits: Mapping[str, Lists]) -> None:
    """Scores every list of a run in one way, going on where an earlier call was stopped."""
    score = _reader(way, run, folder, data)
    columns: dict[str, list[Any]] = {"split": [], "user": [], "letters": []}
    partial = path.with_name(f".{path.name}")
    seconds = 0.0
    if partial.exists():
        table = pq.read_table(partial)
        columns = {name: table[name].to_pylist() for name in columns}
        seconds = json.loads(table.schema.metadata[b"facts"])["seconds"]
    rows = [(split, lists, row) for split, lists in splits.items() for row in range(len(lists.users))]
    done = len(columns["user"])
    for number, (split, lists, row) in enumerate(track(rows[done:], f"{run.name} {way}", len(rows) - done), done + 1):
        started = time.perf_counter()
        letters = score(lists.histories[row], lists.items[row])
        seconds += time.perf_counter() - started
        columns["split"].append(split)
        columns["user"].append(lists.users[row])
        columns["letters"].append(letters.astype(np.float32))
        if number % SAVE_EVERY == 0:
            _write(partial, pa.table(columns), {"seconds": seconds})
    runtime = asdict(choose_runtime("cpu"))
    facts = {"seconds": seconds, "seconds_a_request": seconds / max(len(rows), 1), "runtime": runtime}
    _write(
        path, pa.table(columns), {**facts, "run": asdict(run), "options": asdict(run.trained().options()), "way": way}
    )
    partial.unlink(missing_ok=True)


def _reader(way: str, run: Run, folder: Path, data: Data) -> Any:
    """The function from history and candidates to the model's log-probabilities [k], in the candidates' order."""
    model = find_base(EMBEDDED, folder / "base") if way == "untuned" else folder / "ranker" / MODEL_FOLDER
    tokenizer = Tokenizer.from_file(str(model / TOKENIZER_FILE))
    options = run.options()
    limits = {name: getattr(options, name) for name in ("max_history", "title_tokens", "max_tokens", "candidates")}
    catalogue = permuted(data.catalogue, run.seed) if way == "permuted" else data.catalogue
    prompts = PromptBuilder(catalogue, tokenizer, PromptSettings(**limits))
    verbalizer: Verbalizer
    if way == "untuned":
        verbalizer = LetterVerbalizer(letter_ids(tokenizer, RESPONSE, options.candidates))
    else:
        verbalizer = restore_verbalizer(json.loads((folder / "ranker" / VERBALIZER_FILE).read_text(encoding="utf-8")))
    scorer = load_scorer(model, choose_runtime("cpu"))

    def score(history: NDArray[np.int32], items: NDArray[np.int32]) -> NDArray[np.float64]:
        total = np.zeros(len(items))
        for order in candidate_orders(len(items), ORDERS if way == "orders" else 1, run.seed):
            total[order] += log_softmax(verbalizer.logits(scorer, prompts.build(history, items[order])))
        return log_softmax(total / (ORDERS if way == "orders" else 1))

    return score


def candidate_orders(k: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The retriever's own order, and seeded random ones behind it."""
    rng = np.random.default_rng(seed)
    yield np.arange(k)
    for _ in range(count - 1):
        yield rng.permutation(k)


def permuted(catalogue: Catalogue, seed: int) -> Catalogue:
    """The catalogue with each title on another item: what a model reads, without what it means."""
    order = np.random.default_rng(seed).permutation(len(catalogue)) + 1
    numbers = range(1, len(catalogue) + 1)
    ids, titles = [catalogue.raw(n) for n in numbers], [catalogue.title(int(n)) for n in order]
    return Catalogue(ids, titles, catalogue.counts)


def _write(path: Path, table: pa.Table, facts: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    pq.write_table(table.replace_schema_metadata({"facts": json.dumps(facts)}), partial, compression="zstd")
    os.replace(partial, path)
