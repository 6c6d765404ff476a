"""Mixed traffic to three servers at most of their capacity for minutes, under faults.

Requests come from both gRPC clients and over HTTP through a gateway; some have tight deadlines and some are cancelled.
Meanwhile steps and servers are killed, releases are promoted and rolled back on all servers, connections are cut, and
some clients do not read their answers. Some requests look their history up in a store, and events are recorded.
`make soak MINUTES=20` runs it and prints a table with the result.
"""

import asyncio
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fleet import Fleet, Held, running_fleet, tritonserver
from pipeline import BRIEF_RETRIEVER, with_retriever
from traffic import CuttingProxy, Order, Question, record, send_async, send_each, send_http, send_sync, slow_reader

from export.release import build_release
from export.repository import Export
from llamarec.tables import console, print_table
from llamarec_client.contract import MAX_CANDIDATES
from llamarec_client.errors import ClientError
from llamarec_client.recommender import RecommenderClient, Request
from models.retriever.training import train_retriever
from serving.layout import step_artifact
from serving.offline import ExportedSteps
from serving.server.releases import promote, rollback
from serving.similar import SimilarItems
from stores.address import open_store
from stores.store import Event, Store

pytestmark = pytest.mark.soak

SECONDS = 60 * float(os.environ.get("MINUTES", "20"))
SERVERS = 3
RELEASES = ("r1", "r2")
SHARE = 0.7
"""Request rate as a share of the capacity, which is measured first."""
GAP = 12.0 if SECONDS < 300 else 30.0
"""Seconds between two disturbances."""
NOTICED = 2.0
"""Time in seconds after which the health port has reported a fault, and clients have noticed a recovery."""
EVENTS_A_SECOND = 10.0
WARM_UPS = 3
"""How often every request is sent to every release of every server before memory is measured for the first time."""
GROWTH = 0.05
"""Maximum growth of memory and handles, as a share of what they are when both releases are loaded and warm."""
DISTURBANCES = (
    "kill ranker",
    "release",
    "cut",
    "kill features",
    "release",
    "slow readers",
    "kill retriever",
    "kill server",
    "kill prompt_builder",
    "kill neighbours",
)


@pytest.fixture(scope="module")
def repository(artifacts, tmp_path_factory) -> Path:
    """Build two releases whose retrievers differ, so that an answer which mixes the two is that of neither."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "training").mkdir()
    (folder / "training" / "data").symlink_to(artifacts / "data")
    train_retriever(replace(BRIEF_RETRIEVER, seed=43), folder / "training")
    other = with_retriever(artifacts, folder / "artifacts", folder / "training" / "retriever")
    for each in (artifacts, other):
        build_release(Export(threads=1), each, folder / "releases")
    return folder / "releases"


def questions(repository: Path, store: Store) -> list[Question]:
    """Return mixed requests with the offline answers of both releases.

    Histories have 0 to 500 items; there are exclusions, candidates, TOP_K, titles, unknown ids, users whose history is
    put into the store, items whose neighbours are asked for, and invalid requests, which have no answer.
    """
    releases = [ExportedSteps.load(repository, f"_{name}") for name in RELEASES]
    similar = [SimilarItems.load(step_artifact(repository, "neighbours", f"_{name}")) for name in RELEASES]
    catalogue, chance = releases[0].catalogue, random.Random(0)
    trained = list(range(1, catalogue.trained + 1))
    known = [catalogue.raw(item).decode() for item in trained]
    asked = []
    for length in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 500):
        history = chance.sample(known, length)
        titles = [catalogue.title(item) for item in chance.sample(trained, 12)]
        given = chance.sample(known, chance.randint(1, MAX_CANDIDATES))
        mixed = [
            {"history": history},
            {"history": history, "top_k": chance.randint(1, MAX_CANDIDATES)},
            {"history": [*history, "no such item"], "exclude": chance.sample(known, 5)},
            {"history": history, "candidates": given},
            {"history": history, "candidates": given, "candidate_titles": [*titles, *given][: len(given)]},
            {"history_titles": titles[:5], "candidate_titles": titles[5:]},
        ]
        asked += [Question(each, right_of(releases, each)) for each in mixed]
        user = f"asks-{length}"
        store.record([(user.encode(), [Event(raw.encode(), n) for n, raw in enumerate(history)])])
        asked.append(Question({"user_id": user}, asked[-len(mixed)].right))
        item = chance.choice(known)
        found = [[(row.item.decode(), *map(single, row[1:])) for row in each(item.encode(), 7)] for each in similar]
        asked.append(Question({"item_id": item, "top_k": 7}, {"ranker": found}, "similar"))
    invalid = ({"history": [], "top_k": 0}, {"history": ["x" * 513]}, {"history": [], "candidates": ["no such item"]})
    return [*asked, *(Question(each, {"ranker": [], "retriever": []}) for each in invalid)]


def single(value: float) -> float:
    """Return a number with the precision that the server sends."""
    return float(np.float32(value))


def right_of(releases: Sequence[ExportedSteps], question: dict) -> dict:
    """Return the correct answers of each release, by what answers: the ensemble or the retriever alone."""
    titled = "candidate_titles" in question and "candidates" not in question
    return {
        "ranker": [steps.recommend(**question) for steps in releases],
        "retriever": [] if titled else [retrieved(steps, **question) for steps in releases],
    }


def retrieved(
    steps: ExportedSteps, history, exclude=(), candidates=None, top_k=None, candidate_titles=None
) -> list[tuple[str, float, int]]:
    """Return the answer of ``llamarec_retrieval``, computed offline."""
    given, titles = (
        None if texts is None else [text.encode() for text in texts] for texts in (candidates, candidate_titles)
    )
    request = steps.features.encode(
        [raw.encode() for raw in history], [raw.encode() for raw in exclude], given, top_k, None, titles
    )
    found = steps.candidates(request)
    ids = [steps.catalogue.raw(int(item)).decode() for item in found.items]
    return list(zip(ids, found.probabilities().tolist(), found.ranks.tolist(), strict=True))[: request.limit or None]


def warm_up(fleet: Fleet, asked: Sequence[Question]) -> None:
    """Send every valid request to every release of every server, and compare the answers with that release's.

    Then send all requests through the gateway, as many at once as it gets later.
    """
    good = [each for each in asked if each.method == "recommend" and each.right["ranker"]]
    for url, (place, release), _ in itertools.product(fleet.urls, enumerate(RELEASES), range(WARM_UPS)):
        with RecommenderClient(url) as client:
            found = client.recommend_many(
                [Request(**each.arguments) for each in good], model=f"llamarec_{release}", in_flight=8
            )
        for each, answer in zip(good, found, strict=True):
            assert not isinstance(answer, ClientError), answer
            assert [(row.item_id, row.score, row.retriever_rank) for row in answer] == each.right["ranker"][place]
    counts, failures = asyncio.run(send_each(fleet.gateway, asked))
    assert not failures, failures[:3]
    assert counts["answered"] + counts["refused as bad input"] == len(asked)


def capacity(urls: Sequence[str], asked: Sequence[Question]) -> float:
    """Measure the answers per second with eight requests in flight at each server."""
    good = [Request(**each.arguments) for each in asked if each.method == "recommend" and each.right["ranker"]]
    with RecommenderClient(urls) as client:
        start = time.monotonic()
        answers = client.recommend_many(good * 3, in_flight=8 * len(urls))
    assert not [answer for answer in answers if isinstance(answer, ClientError)]
    return len(answers) / (time.monotonic() - start)


def disturb(fleet: Fleet, proxy: CuttingProxy, end: float) -> tuple[Counter, list[tuple[float, float]]]:
    """Cause one disturbance after another until the end; each starts only after the servers have recovered.

    Returns:
        number of disturbances of each kind, and for each disturbance the times at which its effects began and ended.
    """
    done: Counter = Counter()
    felt: list[tuple[float, float]] = []
    readers = []
    chance = random.Random(1)
    current = itertools.cycle(["promote", "roll back"])
    for chosen in itertools.cycle(DISTURBANCES):
        what = next(current) if chosen == "release" else chosen
        if time.monotonic() + GAP > end:
            break
        began, served = time.time(), chance.choice(fleet.servers)
        if what == "kill server":
            os.kill(tritonserver(served)[0], signal.SIGKILL)
        elif what.startswith("kill"):
            served.kill(f"{what.removeprefix('kill ')}_{RELEASES[done['promote'] > done['roll back']]}")
        elif what == "promote":
            fleet.change(promote, RELEASES[1])
        elif what == "roll back":
            fleet.change(rollback)
        elif what == "cut":
            proxy.cut()
        else:
            readers = [slow_reader(served.url, ["50", "181"]) for _ in range(20)]
        done[what] += 1
        time.sleep(NOTICED)
        fleet.wait_until_whole()
        felt.append((began, time.time() + NOTICED))
        time.sleep(max(0.0, began + GAP - time.time()))
    for reader in readers:
        reader.close()
    if done["promote"] > done["roll back"]:
        fleet.change(rollback)
    return done, felt


@dataclass(frozen=True)
class Traffic:
    """What came of the requests and events, and what disturbed them."""

    counts: Counter
    failures: list[tuple[float, float, str]]
    acknowledged: list[tuple[str, str, int]]
    disturbances: Counter
    felt: list[tuple[float, float]]

    def undisturbed(self) -> list[tuple[float, float, str]]:
        """Return the failures of requests that were sent and ended while nothing was broken."""
        return [
            (began, ended, text)
            for began, ended, text in self.failures
            if not any(began < until and since < ended for since, until in self.felt)
        ]


def run_traffic(fleet: Fleet, asked: Sequence[Question], rate: float) -> Traffic:
    """Send requests and record events in processes of their own, and disturb them meanwhile.

    Args:
        fleet: the servers.
        asked: the requests.
        rate: requests per second of each of three senders.
    """
    proxy = CuttingProxy(fleet.urls[0])
    through_proxy = [proxy.url, *fleet.urls[1:]]
    spawn = multiprocessing.get_context("spawn")
    results, recorded = spawn.Queue(), spawn.Queue()
    senders = ((send_async, through_proxy), (send_sync, fleet.urls), (send_http, fleet.gateway))
    clients = [
        spawn.Process(target=send, args=(to, Order(asked, rate, SECONDS, seed), results))
        for seed, (send, to) in enumerate(senders)
    ]
    events = (through_proxy, fleet.gateway, EVENTS_A_SECOND, SECONDS, 9, recorded)
    clients.append(spawn.Process(target=record, args=events))
    for client in clients:
        client.start()
    disturbances, felt = disturb(fleet, proxy, time.monotonic() + SECONDS)
    outcomes = [results.get(timeout=SECONDS + 120) for _ in senders]
    acknowledged, unrecorded = recorded.get(timeout=SECONDS + 120)
    for client in clients:
        client.join()
    proxy.close()
    counts: Counter = sum((counts for counts, _ in outcomes), Counter())
    failures = [failure for _, some in outcomes for failure in some] + unrecorded
    return Traffic(counts, failures, acknowledged, disturbances, felt)


def test_soak(repository, tmp_path):
    """No answer is wrong, no request fails outside a disturbance, memory and handles do not grow, and no shared memory
    is left.

    Every event that was acknowledged is in the store, once. Offline answers are the reference; every answer is that of
    one release.
    """
    address = f"sqlite:///{tmp_path / 'store'}?keep=10000"
    with closing(open_store(address, dataset="movielens-100k")) as store:
        asked = questions(repository, store)
    with running_fleet(repository, SERVERS, tmp_path, address) as fleet:
        fleet.change(promote, RELEASES[0])
        fleet.change(promote, RELEASES[1])
        fleet.change(rollback)
        fleet.wait_until_whole()
        warm_up(fleet, asked)
        sustainable = capacity(fleet.urls, asked)
        prefixes = [tritonserver(served)[1] for served in fleet.servers]
        start = fleet.held()
        traffic = run_traffic(fleet, asked, SHARE * sustainable / 3)
        fleet.wait_until_whole()
        warm_up(fleet, asked)
        end = fleet.held()
    left = [path.name for prefix in prefixes for path in Path("/dev/shm").glob(f"{prefix}*")]
    report(traffic, sustainable, start, end, left)
    check_events(address, traffic.acknowledged)
    check_counts(traffic.counts)
    assert not traffic.undisturbed(), "a request failed while nothing was broken"
    assert not left
    assert sum(each.memory for each in end.values()) < (1 + GROWTH) * sum(each.memory for each in start.values())
    for group, before in start.items():
        assert end[group].handles < (1 + GROWTH) * before.handles, f"handles of the {group}"


def check_counts(counts: Counter) -> None:
    """Check that every request came to an end, that no answer is wrong, and that most requests have one."""
    assert counts["sent"] == sum(count for name, count in counts.items() if name != "sent")
    assert counts["wrong"] == 0
    assert counts["answered"] > 0.7 * (counts["sent"] - counts["refused as bad input"])


def check_events(address: str, acknowledged: Sequence[tuple[str, str, int]]) -> None:
    """Check that the store has every acknowledged event once."""
    with closing(open_store(address)) as store:
        users = [f"soak-{number}" for number in range(20)]
        kept = Counter((user, event.item.decode(), event.time) for user in users for event in store.last(user.encode()))
    assert kept >= Counter(acknowledged), "an event that was acknowledged is not in the store"
    assert max(kept.values()) == 1
    assert len(acknowledged) > SECONDS * EVENTS_A_SECOND / 4


def report(
    traffic: Traffic, sustainable: float, start: dict[str, Held], end: dict[str, Held], left: Sequence[str]
) -> None:
    """Print a table of the requests by outcome, the events, the growth of what is held, and what was left."""
    for began, _, text in traffic.failures[:15]:
        console.print(f"{time.strftime('%T', time.gmtime(began))} {text}", highlight=False, markup=False)
    console.print(
        f"\n{SECONDS / 60:g} minutes, {SERVERS} servers, 3 clients, {SHARE:.0%} of {sustainable:.1f} answers/s;"
        f" {', '.join(f'{what}: {times}' for what, times in traffic.disturbances.items())}"
    )
    names = ("sent", "answered", "degraded", "out of time", "cancelled", "refused", "refused as bad input", "failed")
    lines = [[name, f"{traffic.counts[name]:,}"] for name in (*names, "wrong")]
    lines.append(["events recorded, none lost", f"{len(traffic.acknowledged):,}"])
    for group, before in start.items():
        after = end[group]
        growth = after.memory / before.memory - 1
        lines.append(
            [f"memory of the {group} [MB]", f"{before.memory / 1e6:.0f} -> {after.memory / 1e6:.0f} ({growth:+.1%})"]
        )
        lines.append([f"handles of the {group}", f"{before.handles} -> {after.handles}"])
        lines.append([f"threads of the {group}", f"{before.threads} -> {after.threads}"])
    lines.append(["shared memory left", str(len(left))])
    print_table("", ["", ""], lines)
