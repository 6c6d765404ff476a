"""Recovery from a killed step under load: no answer is wrong, errors name the step, and the step is reloaded."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from supervised import Load, ask, contention, serving, serving_program, wait_for
from tritonclient.utils import InferenceServerException

from export.config import Serving
from export.repository import Export, export
from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError
from llamarec_client.recommender import RecommenderClient
from serving.contract import STEPS
from serving.offline import ExportedSteps
from stores.address import open_store

HISTORIES = [[], ["50"], ["181", "50", "172"], [str(item) for item in range(1, 60)]]
BACK_SECONDS = {"features": 3, "retriever": 3, "prompt_builder": 3, "ranker": 15}
"""Maximum time in seconds from the kill to the last failure, on an otherwise idle machine."""


@pytest.fixture(scope="module")
def expected(repository):
    steps = ExportedSteps.load(repository)
    return [steps.recommend(history) for history in HISTORIES]


@pytest.fixture(scope="module")
def served(repository, tmp_path_factory):
    with serving(repository, tmp_path_factory.mktemp("served") / "log") as running:
        yield running


def test_the_step_of_similar_items_comes_back(served):
    """While it is dead the service is not ready, and recommendations go on; it is back with the same answer."""
    served.wait_until_ready()
    with RecommenderClient(served.url) as client, Load(served.url, HISTORIES) as load:
        before = client.similar("50")
        served.kill("neighbours")
        assert wait_for(lambda: served.health()[0] == 503, 2), "not ready while a step is dead"
        served.wait_until_ready()
        assert client.similar("50") == before
    assert len(before) == 10
    assert not load.failures()


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[pytest.mark.smoke] if step == "ranker" else []) for step in STEPS]
)
def test_a_killed_step_comes_back(served, expected, step):
    """After a step is killed, the service recovers within the limit, and no answer differs from the offline one.

    Failed requests carry Triton's message, which names the instance and therefore the step.
    """
    served.wait_until_ready()
    with Load(served.url, HISTORIES) as load:
        time.sleep(0.5)
        killed = time.monotonic()
        served.kill(step)
        assert wait_for(lambda: served.health()[0] == 503, 2), "not ready while a step is dead"
        served.wait_until_ready()
        time.sleep(1)
    assert load.failures(), "the kill hit requests under way"
    for row in load.asked:
        if row.error:
            assert step in row.error
        else:
            assert row.answer == expected[row.question]
    limit = BACK_SECONDS[step] * contention()
    back = min(row.ended for row in load.asked if not row.error and row.began > killed) - killed
    assert back < limit
    lasting = max(row.began for row in load.failures()) - killed
    assert lasting < limit, "nothing that is asked after that fails any more"


@pytest.mark.parametrize("step", STEPS[1:])
def test_requests_after_a_death_are_refused_at_once(served, step):
    """From the moment that the watch has seen it, the step before refuses them and names the dead one, until it is
    back. Triton alone would take a second for each of them, one after another.
    """
    served.wait_until_ready()
    assert len(ask(served.url, ["50"])) == 20
    served.kill(step)
    assert wait_for(lambda: served.health()[0] == 503, 2)
    began = time.monotonic()
    with pytest.raises(InferenceServerException, match=f"step {step} is dead") as refused:
        ask(served.url, ["50"], timeout=10)
    assert refused.value.status() == "StatusCode.UNAVAILABLE"
    assert time.monotonic() - began < 2
    served.wait_until_ready()
    assert len(ask(served.url, ["50"])) == 20


@pytest.mark.parametrize("step", ["ranker", "features"])
def test_requests_that_wait_for_a_dead_step_are_refused_soon(served, expected, step):
    """Forty requests wait for the ranker when it dies; Triton alone would take a second for each of them. Or they
    arrive at a dead first step, which no other step refuses, in one batch. Within 5 s all have failed and name the
    step, or have the right answer of the new process. A stand-in refuses most of those that wait for the ranker.
    """
    served.wait_until_ready()
    assert ask(served.url, HISTORIES[3]) == expected[3]

    def one(number: int) -> tuple[float, str]:
        try:
            assert ask(served.url, HISTORIES[3]) == expected[3]
            error = ""
        except InferenceServerException as failure:
            error = str(failure)
        return time.monotonic(), error

    with ThreadPoolExecutor(40) as pool:
        if step == "features":
            served.kill(step)
        outcomes = [pool.submit(one, number) for number in range(40)]
        if step == "ranker":
            time.sleep(0.3)
            served.kill(step)
        killed = time.monotonic()
    ended = [outcome.result() for outcome in outcomes]
    errors = [error for _, error in ended if error]
    assert max(moment for moment, _ in ended) - killed < 5 * contention()
    assert len(errors) > 10, "the death hit requests that waited"
    assert all(step in error for error in errors)
    if step == "ranker":
        assert sum("ranker: step ranker is dead" in error for error in errors) > len(errors) / 2
    served.wait_until_ready()
    assert ask(served.url, HISTORIES[3]) == expected[3]


def test_the_process_that_records_events_comes_back(repository, tmp_path):
    """It is killed while events are recorded. Every acknowledged event is in the store, recommendations go on, and the
    retried ones count once.
    """
    store, recorded = f"sqlite:///{tmp_path}/store", []
    with (
        serving(repository, tmp_path / "log", f"--store={store}") as running,
        RecommenderClient(running.url) as client,
    ):
        for number in range(200):
            if number == 50:
                running.kill("events")
                assert wait_for(lambda: running.health()[0] == 503, 2), "not ready while the events are not recorded"
                assert client.recommend(["50"], timeout=30)
                running.wait_until_ready()
            with suppress(ClientError):
                recorded += [number] * client.record("ann", [str(number)], timestamps=[number])
    with closing(open_store(store)) as opened:
        assert set(recorded) <= {event.time for event in opened.last(b"ann")}
    assert len(recorded) > 190


def test_the_process_that_changes_items_comes_back(echo_repository, tmp_path):
    """With the key that the operator chose: what was changed before it was killed is in the store afterwards."""
    key = "Xq3-of-these-tests"
    flag, environment = f"--store=sqlite:///{tmp_path}/store", {"LLAMAREC_ADMIN_KEY": key}
    with (
        serving(echo_repository, tmp_path / "log", flag, environment=environment) as running,
        RecommenderClient(running.url) as client,
    ):
        assert client.hide_items(["50", "181"], key=key) == 2
        running.kill("items")
        assert wait_for(lambda: running.health()[0] == 503, 2), "not ready while no items can be changed"
        assert client.recommend(["a"])
        running.wait_until_ready()
        assert client.show_items(["50", "172"], key=key) == 1


def test_the_retrieval_answers_while_the_ranker_is_dead(served):
    """The retrieval ensemble uses neither prompt builder nor ranker, so it answers while the ranker is dead."""
    served.wait_until_ready()
    served.kill("ranker")
    assert len(ask(served.url, ["50"], RETRIEVAL_ENSEMBLE, timeout=2)) == 20
    assert wait_for(lambda: served.health()[0] == 503, 2)
    served.wait_until_ready()


def test_a_step_that_hangs_is_replaced(repository, tmp_path):
    """After SIGSTOP a process lives but does not answer; the watch, here after 2 s, kills it and reloads the step."""
    program = (
        "import sys, serving.server.supervisor as s; from pathlib import Path\n"
        "sys.exit(s.Supervisor(Path(sys.argv[1]), sys.argv[3:], health_port=int(sys.argv[2]), hang_seconds=2).run())"
    )
    own = shutil.copytree(repository, tmp_path / "repository")
    with serving_program(program, own, tmp_path / "log") as served:
        os.kill(served.stubs("retriever")[0], signal.SIGSTOP)
        assert wait_for(lambda: served.health()[0] == 503, 10)
        served.wait_until_ready()
        assert len(ask(served.url, ["50"])) == 20
        assert [event["event"] for event in served.events()].count("step is back") == 1


def test_a_server_that_dies_is_started_again(served):
    """After SIGKILL of tritonserver itself, the supervisor starts it again."""
    served.wait_until_ready()
    stat = Path(f"/proc/{served.stubs('features')[0]}/stat").read_text()
    server = int(stat.rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    assert wait_for(lambda: served.health()[0] != 200, 5)
    served.wait_until_ready()
    assert len(ask(served.url, ["50"])) == 20


def test_with_two_rankers_one_goes_on_answering(artifacts, tmp_path, expected):
    """If one of two instances dies, a failed request that is sent again at once is answered within 3 s of its start."""
    repository = tmp_path / "repository"
    export(Export(threads=1, serving=Serving(instances=2)), artifacts, repository)
    with serving(repository, tmp_path / "log") as served:
        with Load(served.url, HISTORIES) as load:
            time.sleep(0.5)
            served.kill("ranker")
            wait_for(lambda: served.health()[0] == 503, 2)
            served.wait_until_ready()
            time.sleep(1)
        for row in load.asked:
            assert row.error or row.answer == expected[row.question]
        for row in load.failures():
            answered = [other.ended for other in load.asked if other.began >= row.ended and not other.error]
            assert min(answered) - row.began < 3 * contention()
        assert wait_for(lambda: len(served.stubs("ranker")) == 2, 60), "the replaced two have gone"
