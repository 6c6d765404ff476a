"""The gateway's own metrics for Prometheus; those of the steps are on the servers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds in seconds: from the retriever's milliseconds to the default deadline."""


class Metrics:
    """Counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "llamarec_gateway_requests",
            "Requests that ended, by endpoint and HTTP status; 499: the caller hung up.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "llamarec_gateway_request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ["endpoint"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "llamarec_gateway_in_flight", "Requests that are being answered.", registry=self._registry
        )
        self.degraded = Counter(
            "llamarec_gateway_degraded_answers", "Answers of the fallback.", registry=self._registry
        )

        self.mixed_releases = Gauge(
            "llamarec_gateway_mixed_releases",
            "How often the servers were found to serve different releases.",
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
