"""What the watch decides: the server's HTTP endpoint is a stand-in, the steps' processes and their deaths are real."""

import io
import json
import os
import signal
import subprocess
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.contract import STEPS
from serving.errors import ServerFailure, ServerUnreachable
from serving.server.control import repository_lock
from serving.server.process import Stub, is_alive
from serving.server.stand_in import compile_models
from serving.server.watch import REVIVE, Watch

SERVED = (*STEPS, "llamarec")
HANG_SECONDS = 0.05


class Triton:
    """Stands in for a server's process and for its HTTP endpoint; has the methods that a watch calls on both."""

    def __init__(self) -> None:
        self.loaded = set(SERVED)
        self.groups: dict[str, dict[str, Any]] = {step: {"count": 1} for step in STEPS}
        """Instance group of each step's configuration."""
        self.children: list[tuple[str, subprocess.Popen]] = []
        self.stand_ins: set[int] = set()
        """Processes that only refuse requests."""
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self.probed: list[tuple[str, float]] = []
        """Model and timeout of each probe."""
        self.busy: set[str] = set()
        """Models that answer others' requests and not the probe."""
        self.failing: dict[str, Exception] = {}
        """What a probe of a model ends with."""
        self.broken: list[Exception] = []
        """What the next loads end with."""
        self.lingering = False
        """Whether the processes of a model that is loaded again stay."""
        self.refusals: list[str] = []
        """Models to which a stand-in was added."""
        self.refusing = True
        """Whether a stand-in can be added."""
        self.changed = False
        """Whether the files of the models have changed, so that Triton loads more than a stand-in."""
        self._served: Counter[str] = Counter()

    def start(self, model: str) -> None:
        group = self.groups[model]
        for _ in range(group["count"] * max(len(group.get("gpus", [])), 1)):
            self.children.append((model, subprocess.Popen(["sleep", "60"])))

    def pids(self, model: str) -> list[int]:
        return [child.pid for name, child in self.children if name == model and is_alive(child.pid)]

    def regroup(self, model: str, group: dict[str, Any]) -> None:
        """Have the model run with another instance group."""
        for pid in self.pids(model):
            os.kill(pid, signal.SIGKILL)
        self.groups[model] = group
        self.start(model)

    def kill(self, model: str) -> None:
        """End one of a model's processes, as a crash does."""
        pid = self.pids(model)[0]
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not is_alive(pid))

    # --- of a ServerProcess

    def stubs(self) -> list[Stub]:
        return [
            Stub(child.pid, name, "stand_in_0" if child.pid in self.stand_ins else f"{name}_0_0")
            for name, child in self.children
            if is_alive(child.pid)
        ]

    # --- of a Control

    def ready_models(self) -> set[str]:
        return set(self.loaded)

    def config(self, model: str) -> dict[str, Any]:
        if model not in self.loaded:
            raise ServerFailure(f"Request for unknown model: '{model}' is not found")
        return {"name": model, "instance_group": [self.groups[model]], "parameters": {"KEPT": {"string_value": "1"}}}

    def answers(self, model: str) -> int:
        self._served[model] += model in self.busy
        return self._served[model]

    def infer(self, model: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.probed.append((model, timeout))
        if model not in self.loaded:
            raise ServerFailure(f"Request for unknown model: '{model}' is not found")
        if model in self.failing:
            raise self.failing[model]
        if model in self.busy:
            raise ServerUnreachable("timed out")
        if not self.pids(model):
            raise ServerFailure(f"Stub process '{model}_0_0' is not healthy.")
        return {}

    def load(self, model: str, config: dict[str, Any]) -> None:
        if config["instance_group"][-1].get("name") == "stand_in":
            assert config["instance_group"][:-1] == [self.groups[model]]
            if not self.refusing:
                raise ServerFailure("no instance can be added")
            self.refusals.append(model)
            self.children.append((model, subprocess.Popen(["sleep", "60"])))
            self.stand_ins.add(self.children[-1][1].pid)
            if self.changed:
                self.start(model)
            return
        self.loads.append((model, config))
        if self.broken:
            raise self.broken.pop(0)
        if not self.lingering:
            for pid in self.pids(model):
                os.kill(pid, signal.SIGKILL)
        self.failing.pop(model, None)
        self.start(model)


class PatientEvent(threading.Event):
    """An event whose waits are recorded and last 10 ms at most."""

    waited: list[float]

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited.append(timeout)
        return super().wait(min(timeout, 0.01))


def wait_for(condition: Callable[[], Any], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())


@pytest.fixture
def triton() -> Iterator[Triton]:
    triton = Triton()
    yield triton
    for _, child in triton.children:
        child.kill()
        child.wait()


@pytest.fixture
def log(monkeypatch) -> io.StringIO:
    """What the watch writes on standard error."""
    text = io.StringIO()
    monkeypatch.setattr("serving.server.watch.sys", types.SimpleNamespace(stderr=text))
    return text


@pytest.fixture
def threads(monkeypatch, log) -> list[threading.Thread]:
    """The threads that a watch starts; its pauses between probes are short."""
    started: list[threading.Thread] = []

    def thread(**given: Any) -> threading.Thread:
        started.append(threading.Thread(**given))
        return started[-1]

    names = types.SimpleNamespace(Event=threading.Event, Lock=threading.Lock, Thread=thread)
    monkeypatch.setattr("serving.server.watch.threading", names)
    monkeypatch.setattr("serving.server.watch.PROBE_SECONDS", 0.01)
    monkeypatch.setattr("serving.server.watch.WATCH_SECONDS", 0.01)
    return started


@pytest.fixture
def watch(triton: Triton, threads: list[threading.Thread], tmp_path: Path) -> Iterator[Watch]:
    """A watch over four steps and an ensemble that knows them all; its threads have ended after the test."""
    for step in STEPS:
        triton.start(step)
    watch = Watch(triton, triton, tmp_path, HANG_SECONDS)
    yield watch
    watch.stop()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads), "stop() ends every thread of the watch"


@pytest.fixture
def ready(watch: Watch) -> Watch:
    """The watch once every step has answered its first probe."""
    watch.refresh()
    assert wait_for(watch.is_ready)
    return watch


def watch_until(watch: Watch, condition: Callable[[], Any]) -> bool:
    """What the supervisor does ten times a second, until something has come true."""

    def look() -> Any:
        watch.refresh()
        watch.look_for_deaths()
        return condition()

    return wait_for(look)


def events(log: io.StringIO) -> list[dict[str, Any]]:
    """The lines of JSON that the watch has logged."""
    return [json.loads(line) for line in log.getvalue().splitlines()]


# --- readiness


def test_ready_once_every_step_has_answered(watch, triton, monkeypatch):
    """Nothing is ready before it was asked; four probes, one for each step and none for the ensemble, make it so."""
    infer, may_answer = triton.infer, threading.Event()
    monkeypatch.setattr(triton, "infer", lambda *given: (infer(*given), may_answer.wait(5)))
    watch.refresh()
    assert wait_for(lambda: len(triton.probed) == 4)
    assert not any(state.alive for state in watch.steps.values())
    assert not watch.is_ready()
    may_answer.set()
    assert wait_for(watch.is_ready)
    assert sorted(model for model, _ in triton.probed[:4]) == sorted(STEPS)
    assert {timeout for _, timeout in triton.probed} == {HANG_SECONDS}


def test_steps_without_an_ensemble_are_not_ready(watch, triton):
    """A caller asks ensembles only: four steps that answer are of no use to it yet."""
    triton.loaded.remove("llamarec")
    watch.refresh()
    assert wait_for(lambda: all(state.alive for state in watch.steps.values()))
    assert not watch.is_ready()
    triton.loaded.add("llamarec")
    watch.refresh()
    assert watch.is_ready()


def test_a_step_that_answers_with_an_error_is_not_ready_and_not_reloaded(ready, triton, log):
    """It lives and says what is wrong, so a reload would not help; when it answers again, it is ready again."""
    triton.failing["ranker"] = ServerFailure("ranker: out of memory")
    assert wait_for(lambda: not ready.is_ready())
    assert ready.steps["ranker"].reason == "ranker: out of memory"
    assert [name for name, state in ready.steps.items() if not state.alive] == ["ranker"]
    del triton.failing["ranker"]
    assert wait_for(ready.is_ready)
    assert triton.loads == []
    assert [event["model"] for event in events(log) if event["event"] == "step answers"][-1] == "ranker"


def test_a_silent_server_is_no_reason_to_kill_a_step(ready, triton, monkeypatch):
    """When even the statistics do not come, it is the server that is silent, and not one of its steps."""

    def silent(model: str) -> int:
        raise ServerUnreachable("127.0.0.1:8000/v2/models does not answer")

    pids = triton.pids("ranker")
    monkeypatch.setattr(triton, "answers", silent)
    assert wait_for(lambda: not any(state.alive for state in ready.steps.values()))
    assert not ready.is_ready()
    assert "does not answer" in ready.steps["ranker"].reason
    assert triton.loads == []
    assert triton.pids("ranker") == pids


# --- deaths


def test_a_dead_process_leads_to_one_reload_with_a_changed_parameter(ready, triton, log):
    """Triton reloads a model whose configuration changed: the override is the model's own, but for REVIVE. However
    often the watch looks, one death is one reload.
    """
    triton.kill("ranker")
    assert watch_until(ready, lambda: ready.steps["ranker"].revived and ready.is_ready())
    for _ in range(20):
        ready.refresh()
        ready.look_for_deaths()
    ((model, config),) = triton.loads
    revive = config["parameters"].pop(REVIVE)
    assert (model, config) == ("ranker", triton.config("ranker"))
    assert int(revive["string_value"]) > 0
    assert ready.steps["ranker"].revived == 1
    assert [event["event"] for event in events(log) if event.get("model") == "ranker"] == [
        "step answers",
        "step lost",
        "step is back",
        "step answers",
    ]


def test_each_death_changes_the_parameter_anew(ready, triton):
    """With the value of the last time, Triton would find the configuration unchanged and reload nothing."""
    for deaths in (1, 2):
        triton.kill("features")
        assert watch_until(ready, lambda deaths=deaths: ready.steps["features"].revived == deaths and ready.is_ready())
    first, second = (config["parameters"][REVIVE]["string_value"] for _, config in triton.loads)
    assert first != second


def test_a_step_is_not_ready_from_its_death_until_its_return(ready, triton, monkeypatch):
    """While the reload takes its time, the step is not asked, and the reason says which process died."""
    reload, may_return = triton.load, threading.Event()
    monkeypatch.setattr(triton, "load", lambda *given: (may_return.wait(5), reload(*given)))
    (pid,) = triton.pids("ranker")
    triton.kill("ranker")
    assert watch_until(ready, lambda: ready.steps["ranker"].healing)
    assert not ready.is_ready()
    assert ready.steps["ranker"].reason.endswith("died") or "is not healthy" in ready.steps["ranker"].reason
    assert not is_alive(pid)
    time.sleep(0.03)  # a probe that was under way has ended
    probes = len([model for model, _ in triton.probed if model == "ranker"])
    time.sleep(0.05)
    assert len([model for model, _ in triton.probed if model == "ranker"]) == probes
    may_return.set()
    assert wait_for(ready.is_ready)


@pytest.mark.parametrize(
    "group", [{"count": 2}, {"count": 1, "gpus": [0, 1]}], ids=["two instances", "an instance on each of two GPUs"]
)
def test_one_of_two_processes_is_missed(watch, triton, group):
    """Triton starts ``count`` instances on every GPU of a group: both groups want two processes, and one is left. The
    probe is answered by the one that lives, so only the look at the processes can tell.
    """
    triton.regroup("ranker", group)
    watch.refresh()
    assert wait_for(watch.is_ready)
    watch.look_for_deaths()
    triton.kill("ranker")
    assert watch_until(watch, lambda: watch.steps["ranker"].revived)
    assert [model for model, _ in triton.loads] == ["ranker"]
    assert watch_until(watch, lambda: len(triton.pids("ranker")) == 2 and watch.is_ready())


def test_both_processes_of_a_model_are_one_reload(watch, triton):
    """Two instances die together: the first death heals the model, the second finds that it is being healed."""
    triton.regroup("ranker", {"count": 2})
    watch.refresh()
    assert wait_for(watch.is_ready)
    for pid in triton.pids("ranker"):
        os.kill(pid, signal.SIGKILL)
    assert watch_until(watch, lambda: watch.steps["ranker"].revived and watch.is_ready())
    assert [model for model, _ in triton.loads] == ["ranker"]


def test_a_process_that_the_server_replaced_itself_is_not_healed(ready, triton):
    """A promotion reloads models too: as many processes live as the configuration wants, so nothing is missing."""
    old = triton.pids("features")
    triton.start("features")
    os.kill(old[0], signal.SIGKILL)
    assert wait_for(lambda: len(triton.pids("features")) == 1)
    for _ in range(5):
        ready.refresh()
        ready.look_for_deaths()
    assert triton.loads == []
    assert ready.is_ready()


def test_processes_that_outlive_their_reload_are_ended(watch, triton):
    """A request that died with its process can keep the replaced model's other instance loaded; after the time of a
    hang it is killed, which is no death to heal, and the new instances go on.
    """
    triton.regroup("ranker", {"count": 2})
    triton.lingering = True
    watch.refresh()
    assert wait_for(watch.is_ready)
    dies, lingers = triton.pids("ranker")
    os.kill(dies, signal.SIGKILL)
    assert watch_until(watch, lambda: watch.steps["ranker"].revived)
    new = set(triton.pids("ranker")) - {lingers}
    assert len(new) == 2
    assert watch_until(watch, lambda: not is_alive(lingers))
    assert set(triton.pids("ranker")) == new
    assert watch_until(watch, watch.is_ready)
    assert [model for model, _ in triton.loads] == ["ranker"]


# --- requests that wait for a dead step


def test_a_stand_in_refuses_what_waits_until_the_step_is_back(ready, triton):
    """It is one instance beside the model's own group, added before the reload, which ends it."""
    triton.kill("ranker")
    assert watch_until(ready, lambda: ready.steps["ranker"].revived and ready.is_ready())
    assert triton.refusals == ["ranker"]
    assert [config["instance_group"] for _, config in triton.loads] == [[triton.groups["ranker"]]]
    assert len(triton.pids("ranker")) == 1
    assert not triton.stand_ins & set(triton.pids("ranker"))


def test_nothing_stands_in_for_a_step_that_has_a_process_left(watch, triton):
    """The living instance goes on to answer what waits; a stand-in would refuse half of it."""
    triton.regroup("ranker", {"count": 2})
    watch.refresh()
    assert wait_for(watch.is_ready)
    watch.look_for_deaths()
    triton.kill("ranker")
    assert watch_until(watch, lambda: watch.steps["ranker"].revived)
    assert triton.refusals == []


def test_a_step_comes_back_without_a_stand_in(ready, triton, log):
    """When none can be added, the reload follows all the same, and the reason is logged."""
    triton.refusing = False
    triton.kill("ranker")
    assert watch_until(ready, lambda: ready.steps["ranker"].revived and ready.is_ready())
    assert [event["error"] for event in events(log) if event["event"] == "no stand-in"] == ["no instance can be added"]


def test_a_step_that_is_loaded_with_its_stand_in_is_not_loaded_again(ready, triton):
    """Triton loads the whole model where its files have changed; what follows only takes the stand-in away."""
    triton.changed = True
    triton.kill("ranker")
    assert watch_until(ready, lambda: ready.steps["ranker"].revived and ready.is_ready())
    ((model, config),) = triton.loads
    assert model == "ranker"
    assert REVIVE not in config["parameters"]
    assert config["instance_group"] == [triton.groups["ranker"]]


def test_models_are_compiled_once(tmp_path):
    """The second server of a folder leaves the files of the first one as they are: their time stamps are versions."""
    model = tmp_path / "ranker" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("x = 1")
    compile_models(tmp_path)
    (compiled,) = (model.parent / "__pycache__").iterdir()
    before = (compiled.stat().st_mtime_ns, compiled.parent.stat().st_mtime_ns)
    compile_models(tmp_path)
    assert (compiled.stat().st_mtime_ns, compiled.parent.stat().st_mtime_ns) == before


# --- a reload that fails


def test_a_reload_that_fails_is_tried_again_after_growing_pauses(triton, threads, tmp_path, monkeypatch, log):
    """By hand: half a second doubled six times, then the longest pause of 30 s; the reason is the server's own, and
    the step comes back with the first load that works.
    """
    PatientEvent.waited = []
    monkeypatch.setattr("serving.server.watch.threading.Event", PatientEvent)
    for step in STEPS:
        triton.start(step)
    watch = Watch(triton, triton, tmp_path, hang_seconds=7.0)
    watch.refresh()
    assert wait_for(watch.is_ready)
    triton.broken = [ServerFailure("failed to load 'ranker'")] * 7 + [ServerUnreachable("timed out")]
    triton.kill("ranker")
    assert watch_until(watch, lambda: "does not load: failed to load 'ranker'" in watch.steps["ranker"].reason)
    assert not watch.is_ready()
    assert watch_until(watch, lambda: watch.steps["ranker"].revived and watch.is_ready())
    watch.stop()
    for thread in threads:
        thread.join(5)
    failed = [event for event in events(log) if event["event"] == "step does not load"]
    pauses = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [event["again_in"] for event in failed] == pauses
    assert [seconds for seconds in PatientEvent.waited if seconds in pauses] == pauses
    assert [event["error"] for event in failed] == ["failed to load 'ranker'"] * 7 + ["timed out"]
    assert len(triton.loads) == 9
    assert watch.steps["ranker"].revived == 1


def test_a_step_that_is_unloaded_while_it_cannot_be_reloaded_is_forgotten(triton, threads, tmp_path, monkeypatch, log):
    """As the real server has it: a reload that fails leaves the model among those that are ready, and unloading takes
    it out. The watch tried to reload such a step for ever, and the server was never ready again.
    """
    PatientEvent.waited = []
    monkeypatch.setattr("serving.server.watch.threading.Event", PatientEvent)
    for step in STEPS:
        triton.start(step)
    watch = Watch(triton, triton, tmp_path, HANG_SECONDS)
    watch.refresh()
    assert wait_for(watch.is_ready)
    triton.broken = [ServerFailure("failed to load 'ranker'")] * 10_000
    triton.kill("ranker")
    assert watch_until(watch, lambda: len(triton.loads) >= 2)
    assert "ranker" in watch.steps, "it is still loaded, so it is still tried"
    triton.loaded.remove("ranker")
    assert watch_until(watch, lambda: "ranker" not in watch.steps)
    assert watch.is_ready(), "three steps and an ensemble are left"
    assert ("step unloaded", "ranker") in [(event["event"], event.get("model")) for event in events(log)]
    watch.stop()
    for thread in threads:
        thread.join(5)


def test_stopping_ends_attempts_to_load(ready, triton):
    """A step that cannot be loaded must not hold up the server's end: after stop() nothing is loaded any more."""
    triton.broken = [ServerFailure("failed to load 'ranker'")] * 100
    triton.kill("ranker")
    assert watch_until(ready, lambda: len(triton.loads) == 1)
    ready.stop()
    time.sleep(0.03)
    loads = len(triton.loads)
    triton.kill("features")
    for _ in range(5):
        ready.refresh()
        ready.look_for_deaths()
    time.sleep(0.05)
    assert len(triton.loads) == loads == 1


def test_nothing_is_healed_while_a_release_is_flipped(ready, triton, tmp_path):
    """Promotion holds the repository's lock alone: a reload in between could revive the alias that is being changed."""
    with repository_lock(tmp_path, exclusive=True):
        triton.kill("retriever")
        assert watch_until(ready, lambda: ready.steps["retriever"].healing)
        time.sleep(0.03)
        assert triton.loads == []
    assert watch_until(ready, lambda: ready.steps["retriever"].revived)
    assert [model for model, _ in triton.loads] == ["retriever"]


# --- unloading


def test_an_unloaded_model_is_forgotten_and_not_healed(ready, triton, threads):
    """After a rollback the other release's processes end: its prober ends too, and nobody loads it again."""
    triton.loaded.remove("ranker")
    triton.kill("ranker")
    for _ in range(5):
        ready.refresh()
        ready.look_for_deaths()
    assert set(ready.steps) == {"features", "retriever", "prompt_builder"}
    assert wait_for(lambda: sum(thread.is_alive() for thread in threads) == 3)
    assert ready.is_ready()
    assert triton.loads == []


def test_a_model_that_is_unloaded_as_it_dies_is_not_healed(ready, triton, monkeypatch):
    """The watch still remembers the step when its process ends, and the server its configuration, as while the last
    requests are answered: the server's list of models decides.
    """
    config = triton.config("ranker")
    monkeypatch.setattr(triton, "config", lambda model: config)
    triton.loaded.remove("ranker")
    triton.kill("ranker")
    ready.look_for_deaths()
    assert not ready.steps["ranker"].healing
    assert triton.loads == []


# --- hanging and busy steps


def test_a_step_that_hangs_is_killed_and_reloaded(ready, triton):
    """The probe gets no answer and the counter of answers stands still: the process lives in vain."""
    (pid,) = triton.pids("retriever")
    triton.failing["retriever"] = ServerUnreachable("timed out")
    assert wait_for(lambda: ready.steps["retriever"].revived and ready.is_ready())
    assert not is_alive(pid)
    assert [model for model, _ in triton.loads] == ["retriever"]
    for _ in range(5):
        ready.refresh()
        ready.look_for_deaths()
    assert [model for model, _ in triton.loads] == ["retriever"], "its death was the watch's own doing"


def test_a_busy_step_is_left_alone(ready, triton):
    """Ranking passes stand before the probe, which times out; the counter of answers grows, so the step is alive."""
    (pid,) = triton.pids("ranker")
    triton.busy.add("ranker")
    probes = len(triton.probed)
    assert wait_for(lambda: [model for model, _ in triton.probed[probes:]].count("ranker") >= 5)
    assert wait_for(lambda: ready.steps["ranker"].reason == "timed out")
    assert ready.is_ready()
    assert is_alive(pid)
    assert triton.loads == []


def test_a_step_that_the_server_calls_unhealthy_is_reloaded(ready, triton):
    """Triton's message when an instance's process is gone or stuck; another instance's request may be the one to see
    it.
    """
    (pid,) = triton.pids("ranker")
    triton.failing["ranker"] = ServerFailure("Stub process 'ranker_0_0' is not healthy.")
    assert wait_for(lambda: ready.steps["ranker"].revived and ready.is_ready())
    assert not is_alive(pid)
    assert [model for model, _ in triton.loads] == ["ranker"]
