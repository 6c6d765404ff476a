"""Mixed traffic at 80 % of capacity for minutes, under faults.

Steps are killed, releases are promoted and rolled back, connections are cut, and some clients do not read their
answers. Some requests look their history up in a store, and events are recorded meanwhile. `make soak MINUTES=20` runs
it and prints a table with the result.
"""

import itertools
import multiprocessing
import os
import random
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from supervised import Served, serving, wait_for
from traffic import CuttingProxy, record, send, slow_reader

from export.release import build_release
from export.repository import Export
from llamarec.tables import console, print_table
from llamarec_client.contract import MAX_CANDIDATES
from llamarec_client.errors import ClientError
from llamarec_client.recommender import RecommenderClient, Request
from serving.errors import ServerFailure
from serving.offline import ExportedSteps
from serving.server.releases import promote, rollback
from stores.address import open_store
from stores.store import Event, Store

pytestmark = pytest.mark.soak

SECONDS = 60 * float(os.environ.get("MINUTES", "20"))
CLIENTS = 3
SHARE = 0.8
"""Request rate as a share of the capacity, which is measured first."""
GAP = 12.0 if SECONDS < 300 else 30.0
"""Seconds between two disturbances."""
PATIENCE = 90.0
"""Maximum time in seconds for the service to recover from a disturbance; the serving tests have tighter limits."""
NOTICED = 2.0
"""Time in seconds after which the health port has reported a fault, and clients have noticed a recovery."""
EVENTS_A_SECOND = 10.0
GROWTH = 0.05
"""Maximum growth of memory, as a share of its size at the start."""


@pytest.fixture(scope="module")
def repository(artifacts, tmp_path_factory) -> Path:
    """Build two releases of the same models, so that promotions and rollbacks do not change the correct answers."""
    folder = tmp_path_factory.mktemp("soak") / "releases"
    for _ in range(2):
        build_release(Export(threads=1), artifacts, folder)
    return folder


def questions(steps: ExportedSteps, store: Store) -> list[tuple[dict, dict]]:
    """Return mixed requests with their offline answers.

    Histories have 0 to 500 items; there are exclusions, candidates, TOP_K, unknown ids, users whose history is put into
    the store, and invalid requests, which have no answer.
    """
    chance = random.Random(0)
    known = [steps.catalogue.raw(item).decode() for item in range(1, steps.catalogue.trained + 1)]
    mixed = []
    for length in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 500):
        question = {"history": chance.sample(known, length)}
        mixed.append(question)
        mixed.append({**question, "top_k": chance.randint(1, MAX_CANDIDATES)})
        mixed.append({"history": [*question["history"], "no such item"], "exclude": chance.sample(known, 5)})
        mixed.append({**question, "candidates": chance.sample(known, chance.randint(1, MAX_CANDIDATES))})
    asked = []
    for question in mixed:
        right = {"ranker": [steps.recommend(**question)], "retriever": [retrieved(steps, **question)]}
        asked.append((question, right))
        if set(question) == {"history"}:
            user = f"asks-{len(question['history'])}"
            store.record([(user.encode(), [Event(raw.encode(), n) for n, raw in enumerate(question["history"])])])
            asked.append(({"user_id": user}, right))
    for bad in ({"history": [], "top_k": 0}, {"history": ["x" * 513]}, {"history": [], "candidates": ["no such item"]}):
        asked.append((bad, {"ranker": [], "retriever": []}))
    return asked


def retrieved(steps: ExportedSteps, history, exclude=(), candidates=None, top_k=None) -> list[tuple[str, float, int]]:
    """Return the answer of ``llamarec_retrieval``, computed offline."""
    given = None if candidates is None else [raw.encode() for raw in candidates]
    request = steps.features.encode([raw.encode() for raw in history], [raw.encode() for raw in exclude], given, top_k)
    found = steps.candidates(request)
    ids = [steps.catalogue.raw(int(item)).decode() for item in found.items]
    return list(zip(ids, found.probabilities().tolist(), found.ranks.tolist(), strict=True))[: request.limit or None]


def memory(pids: list[int]) -> int:
    """Return the processes' proportional set size (PSS) in bytes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def family(served: Served) -> list[int]:
    """Return the process ids of the supervisor, the server and the steps."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            parents[int(path.parent.name)] = int(words[1])
    found = [served.process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def handles(pids: list[int]) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def segments(pids: list[int]) -> str:
    """Return the prefix of the server's shared memory segments."""
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "shm-region-prefix-name=" in command:
            return command.split("shm-region-prefix-name=")[1].split("\0")[0]
    raise AssertionError("the server runs with a prefix of its own")


def patiently(change, *arguments):
    """Promote or roll back, and retry while a step that is being reloaded makes it fail."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return change(*arguments)
        except ServerFailure:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def whole(served: Served) -> None:
    """Wait until the health port reports that every step answers."""
    assert wait_for(lambda: served.health()[0] == 200, PATIENCE), served.log_path.read_text()[-3000:]


def capacity(url: str, asked: list[tuple[dict, dict]]) -> float:
    """Measure the answers per second with eight requests in flight."""
    good = [Request(**question) for question, right in asked if right["ranker"]]
    with RecommenderClient(url) as client:
        client.recommend_many(good[:10])
        start = time.monotonic()
        answers = client.recommend_many(good * 2, in_flight=8)
    assert not [answer for answer in answers if isinstance(answer, ClientError)]
    return len(answers) / (time.monotonic() - start)


def disturb(
    served: Served, repository: Path, proxy: CuttingProxy, end: float
) -> tuple[Counter, list[tuple[float, float]]]:
    """Cause one disturbance after another until the end; each starts only after the service has recovered.

    Returns:
        number of disturbances of each kind, and for each disturbance the times at which its effects began and ended.
    """
    done: Counter = Counter()
    felt: list[tuple[float, float]] = []
    readers = []
    current = itertools.cycle(["promote", "roll back"])
    kinds = [
        "kill ranker",
        "release",
        "cut",
        "kill features",
        "release",
        "slow readers",
        "kill retriever",
        "kill prompt_builder",
    ]
    for chosen in itertools.cycle(kinds):
        what = next(current) if chosen == "release" else chosen
        if time.monotonic() + GAP > end:
            break
        began = time.time()
        if what.startswith("kill"):
            model = f"{what.removeprefix('kill ')}_r{1 + (done['promote'] > done['roll back'])}"
            assert wait_for(lambda model=model: served.stubs(model), PATIENCE)
            served.kill(model)
        elif what == "promote":
            patiently(promote, repository, "r2")
        elif what == "roll back":
            patiently(rollback, repository)
        elif what == "cut":
            proxy.cut()
        else:
            readers = [slow_reader(served.url, ["50", "181"]) for _ in range(20)]
        done[what] += 1
        time.sleep(NOTICED)
        whole(served)
        felt.append((began, time.time() + NOTICED))
        time.sleep(max(0.0, began + GAP - time.time()))
    for reader in readers:
        reader.close()
    if done["promote"] > done["roll back"]:
        patiently(rollback, repository)
    return done, felt


def test_soak(repository, tmp_path):
    """No answer is wrong, no request fails outside a disturbance, memory does not grow, and no shared memory is left.

    Every event that was acknowledged is in the store, once.

    Offline answers are the reference.
    """
    address = f"sqlite:///{tmp_path / 'store'}?keep=10000"
    with closing(open_store(address, dataset="movielens-100k")) as store:
        asked = questions(ExportedSteps.load(repository, "_r1"), store)
    store_of_server = {"LLAMAREC_STORE": address}
    with serving(repository, tmp_path / "log", ready=False, environment=store_of_server) as served:
        assert wait_for(lambda: served.health()[0] == 503, 60), "nothing is promoted yet"
        patiently(promote, repository, "r1")
        patiently(promote, repository, "r2")
        patiently(rollback, repository)
        whole(served)
        sustainable = capacity(served.url, asked)
        proxy = CuttingProxy(served.url)
        began_with = family(served)
        prefix = segments(began_with)
        start = (memory(began_with), handles(began_with))
        spawn = multiprocessing.get_context("spawn")
        results, recorded = spawn.Queue(), spawn.Queue()
        rate = SHARE * sustainable / CLIENTS
        urls = [proxy.url, *[served.url] * (CLIENTS - 1)]
        clients = [
            spawn.Process(target=send, args=(url, asked, rate, SECONDS, seed, results)) for seed, url in enumerate(urls)
        ]
        clients.append(spawn.Process(target=record, args=(proxy.url, EVENTS_A_SECOND, SECONDS, 9, recorded)))
        for client in clients:
            client.start()
        disturbances, felt = disturb(served, repository, proxy, time.monotonic() + SECONDS)
        outcomes = [results.get(timeout=SECONDS + 120) for _ in urls]
        acknowledged, unrecorded = recorded.get(timeout=SECONDS + 120)
        for client in clients:
            client.join()
        whole(served)
        with RecommenderClient(served.url) as client:
            for question, right in asked:
                if right["ranker"]:
                    answer = client.recommend(**question)
                    assert [(row.item_id, row.score, row.retriever_rank) for row in answer] in right["ranker"]
        ended_with = family(served)
        end = (memory(ended_with), handles(ended_with))
        proxy.close()
    left = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
    counts: Counter = sum((counts for counts, _ in outcomes), Counter())
    report(counts, disturbances, sustainable, start, end, left, len(acknowledged))
    failures = [failure for _, some in outcomes for failure in some] + unrecorded
    assert kept(address) >= Counter(acknowledged), "an event that was acknowledged is not in the store"
    assert max(kept(address).values()) == 1
    assert len(acknowledged) > SECONDS * EVENTS_A_SECOND / 4
    for began, _, text in failures[:15]:
        console.print(f"{time.strftime('%T', time.gmtime(began))} {text}", highlight=False, markup=False)
    became = ("answered", "degraded", "refused", "refused as bad input", "failed", "wrong")
    assert counts["sent"] == sum(counts[name] for name in became), "every request came to an end"
    assert counts["wrong"] == 0
    assert counts["answered"] > 0.8 * (counts["sent"] - counts["refused as bad input"])
    undisturbed = [row for row in failures if not any(row[0] < end and begin < row[1] for begin, end in felt)]
    assert not undisturbed, "a request failed while nothing was broken"
    assert not left
    assert end[0] < (1 + GROWTH) * start[0]


def kept(address: str) -> Counter:
    """Return how often the store has each event of the users whose events were recorded."""
    with closing(open_store(address)) as store:
        users = [f"soak-{number}" for number in range(20)]
        return Counter((user, event.item.decode(), event.time) for user in users for event in store.last(user.encode()))


def report(counts, disturbances, sustainable, start, end, left, events) -> None:
    """Print a table of the requests by outcome, the events, the growth of memory and handles, and what was left."""
    console.print(
        f"\n{SECONDS / 60:g} minutes, {CLIENTS} client processes, {SHARE:.0%} of {sustainable:.1f} answers/s;"
        f" {', '.join(f'{what}: {times}' for what, times in disturbances.items())}"
    )
    names = ("sent", "answered", "degraded", "refused", "refused as bad input", "failed", "wrong")
    lines = [[name, f"{counts[name]:,}"] for name in names]
    lines.append(["events recorded, none lost", f"{events:,}"])
    lines.append(["memory [MB]", f"{start[0] / 1e6:.0f} -> {end[0] / 1e6:.0f} ({end[0] / start[0] - 1:+.1%})"])
    lines.append(["file handles", f"{start[1]} -> {end[1]}"])
    lines.append(["shared memory left", str(len(left))])
    print_table("", ["", ""], lines)
