"""Metrics and logs of a step: Prometheus metrics on the server's endpoint, and one JSON log line per request.

Each increment of a Triton metric is a message to the server that takes 34 microseconds, and a histogram would need a
dozen of them. Therefore a step counts in its own process, and a thread sends the sums to the server twice a second.
Custom metrics have no histograms (core 2.51): each histogram is three counters, from which Prometheus reads it.
"""

import json
import os
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from serving.contract import PROBE

FLUSH_SECONDS = 0.5
REQUEST_LOG = "LLAMAREC_REQUEST_LOG"
"""Environment variable: when set, every step logs every request. Internal errors are always logged."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKENS = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
CANDIDATES = (0, 1, 2, 5, 10, 15, 19, 20)
COUNTERS = {
    "llamarec_answers_total": "Requests that a step answered",
    "llamarec_degraded_answers_total": "Retriever answers that a client requested as a fallback",
    "llamarec_errors_total": "Requests that a step did not answer, by kind",
    "llamarec_logged_answers_total": "Answers written to the log of answers",
    "llamarec_unlogged_answers_total": "Answers that the log of answers lost, by reason",
    "llamarec_events_total": "Recorded events that were new to the store",
    "llamarec_unknown_items_total": "History items that are not in the catalogue",
}
HISTOGRAMS = {
    "llamarec_step_seconds": ("Time that a step worked on one request", SECONDS),
    "llamarec_prompt_tokens": ("Number of tokens of a prompt", TOKENS),
    "llamarec_candidates": ("Number of candidates of a request", CANDIDATES),
}
RELEASE = "llamarec_release_info"

Labels = tuple[tuple[str, str], ...]


def nothing_observed() -> dict[str, list[int]]:
    """Return empty buckets for every histogram."""
    return {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}


class Metrics:
    """Counters and histograms of one step, collected in this process and sent to the server by a thread.

    Args:
        labels: labels of every metric.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        import triton_python_backend_utils as pb_utils  # exists only inside the server

        self._labels = dict(labels)
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, Labels], float] = {}
        self._observed = nothing_observed()
        counter = pb_utils.MetricFamily.COUNTER
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=counter) for name, text in COUNTERS.items()
        }
        for name, (text, _) in HISTOGRAMS.items():
            for part in ("bucket", "sum", "count"):
                self._families[f"{name}_{part}"] = pb_utils.MetricFamily(
                    name=f"{name}_{part}", description=text, kind=counter
                )
        self._metrics: dict[tuple[str, Labels], Any] = {}
        # A metric is dropped with its family: keep a reference to both.
        self._release = pb_utils.MetricFamily(
            name=RELEASE, description="1 for each loaded release", kind=pb_utils.MetricFamily.GAUGE
        )
        self._loaded = self._release.Metric(labels=self._labels)
        self._loaded.set(1)
        self._metric("llamarec_answers_total", ())  # exported as 0 from the start, not absent
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._flush_regularly, name="metrics", daemon=True)
        self._thread.start()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter of :data:`COUNTERS`."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._pending[key] = self._pending.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram of :data:`HISTOGRAMS`."""
        place = bisect_left(HISTOGRAMS[name][1], value)
        with self._lock:
            self._observed[name][place] += 1
            key = (f"{name}_sum", ())
            self._pending[key] = self._pending.get(key, 0) + value

    def flush(self) -> None:
        """Send the sums collected since the last call to the server."""
        with self._lock:
            pending, self._pending = self._pending, {}
            observed, self._observed = self._observed, nothing_observed()
        for name, counts in observed.items():
            if any(counts):
                total = 0
                for bound, count in zip((*HISTOGRAMS[name][1], "+Inf"), counts, strict=True):
                    total += count
                    pending[f"{name}_bucket", (("le", str(bound)),)] = total
                pending[f"{name}_count", ()] = total
        for (name, labels), amount in pending.items():
            self._metric(name, labels).increment(amount)

    def close(self) -> None:
        """Stop the thread and send the remaining sums."""
        self._ended.set()
        self._thread.join()
        self.flush()

    def _metric(self, name: str, labels: Labels) -> Any:
        key = (name, labels)
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels=self._labels | dict(labels))
        return self._metrics[key]

    def _flush_regularly(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            self.flush()


class Telemetry:
    """Metrics and log lines of one step.

    Args:
        step: name of the step.
        release: name or export id of the release that it serves.
    """

    def __init__(self, step: str, release: str) -> None:
        self._names = {"step": step, "release": release}
        self._metrics = Metrics(self._names)
        self._log_all = bool(os.environ.get(REQUEST_LOG))

    def answered(self, request: Any, seconds: float, facts: Mapping[str, Any]) -> None:
        """Count an answer, and log it if every request is logged.

        Args:
            request: the Triton request.
            seconds: time that the step took for it.
            facts: see :meth:`serving.steps.step.Step.facts`.
        """
        if request.request_id() == PROBE:
            return
        self._metrics.count("llamarec_answers_total")
        self._metrics.observe("llamarec_step_seconds", seconds)
        for name in ("prompt_tokens", "candidates"):
            if name in facts:
                self._metrics.observe(f"llamarec_{name}", facts[name])
        for name, fact in (("unknown_items", "unknown_items"), ("events", "new_events")):
            if facts.get(fact):
                self._metrics.count(f"llamarec_{name}_total", facts[fact])
        if facts.get("degraded"):
            self._metrics.count("llamarec_degraded_answers_total", reason=str(facts["degraded"]))
        if self._log_all:
            self._log(request, "answered", seconds=round(seconds, 6), **facts)

    def failed(self, request: Any, kind: str, message: str) -> None:
        """Count an error, and log it if it is internal or every request is logged.

        Args:
            request: the Triton request.
            kind: ``invalid``, ``cancelled``, ``full``, ``late``, ``dead``, ``store`` or ``internal``.
            message: the error message that the caller receives.
        """
        self._metrics.count("llamarec_errors_total", kind=kind)
        if self._log_all or kind == "internal":
            self._log(request, kind, message=message)

    def logged(self, answers: int, lost: str | None = None) -> None:
        """Count answers of the log of answers.

        Args:
            answers: their number.
            lost: why they are not in it: ``full``, ``disk`` or ``invalid``; None if they are.
        """
        if lost:
            self._metrics.count("llamarec_unlogged_answers_total", answers, reason=lost)
        else:
            self._metrics.count("llamarec_logged_answers_total", answers)

    def close(self) -> None:
        """Send the last metrics to the server."""
        self._metrics.close()

    def _log(self, request: Any, event: str, **facts: Any) -> None:
        line = {"time": round(time.time(), 3), **self._names, "request": request.request_id(), "event": event, **facts}
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()
