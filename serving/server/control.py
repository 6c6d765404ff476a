"""Admin client of a running server: queries, loads and unloads its models over HTTP on the loopback interface.

`llamarec serve` protects the model-repository, shared-memory, trace and logging APIs of its server with a key. It
writes the server's address and the key to a file in the model repository that only its own user can read.
`llamarec release` reads both from there.
"""

import fcntl
import http.client
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamarec_client.contract import HISTORY
from preprocessing.artifacts import replacing
from serving.contract import PROBE, RELEASE_STEPS, RETRIEVER_SCORES, STEP_SPECS, STORE_MODELS
from serving.errors import ServerFailure, ServerUnreachable

KEY_HEADER = "llamarec-key"
CONTROL_FILE = ".serve.json"
LOCK_FILE = ".lock"
RESTRICTED = "model-repository,shared-memory,trace,logging"
DATA_TYPES = {"STRING": "BYTES", "INT32": "INT32", "INT64": "INT64", "FP32": "FP32"}


def step_of(model: str) -> str | None:
    """Return the step that a model implements, whatever the release suffix of its name; None for an ensemble.

    ``events`` and ``items``, which have no suffix, count as steps.
    """
    if model in STORE_MODELS:
        return model
    if model == RETRIEVER_SCORES or model.startswith(f"{RETRIEVER_SCORES}_"):
        return None  # the retriever's graph in Triton's ONNX backend, which has no process of its own
    return next((step for step in RELEASE_STEPS if model == step or model.startswith(f"{step}_")), None)


def probe_request(step: str) -> dict[str, Any]:
    """Return the smallest request for a step: no history, no candidates, no events and no items.

    Where an item has to be named, it is one that no catalogue has. So the language model does not run, and the store
    is not needed.
    """
    inputs = []
    for spec in STEP_SPECS[step].inputs:
        if not spec.optional or spec == HISTORY:
            length = 0 if spec.shape == (-1,) else 1
            shape, data = [1, length], [PROBE if spec.data_type == "STRING" else 0] * length
            inputs.append({"name": spec.name, "shape": shape, "datatype": DATA_TYPES[spec.data_type], "data": data})
    return {"id": PROBE, "inputs": inputs}


@dataclass(frozen=True)
class Control:
    """HTTP endpoint of a running server, and the key of its restricted APIs."""

    url: str
    """``HOST:PORT``."""
    key: str

    @classmethod
    def read(cls, repository: Path) -> "Control":
        """Return the server that `llamarec serve` started on a repository.

        Raises:
            ServerUnreachable: no server runs on it.
        """
        try:
            return cls(**json.loads((repository / CONTROL_FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ServerUnreachable(
                f"no server runs on {repository}: start one with `llamarec serve --repository {repository}`"
            ) from None

    @classmethod
    def several(cls, repository: Path, addresses: Iterable[str], key: str | None = None) -> list["Control"]:
        """Return servers of a repository by the addresses of their HTTP endpoints.

        Args:
            repository: the folder that all of them serve.
            addresses: ``HOST:PORT`` each.
            key: their admin key. Default: the one that `llamarec serve` wrote to the repository.

        Raises:
            ServerUnreachable: an address is not one, or there is no key.
        """
        addresses = list(dict.fromkeys(addresses))
        for address in addresses:
            if not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
                raise ServerUnreachable(f"{address!r} is not the HTTP endpoint of a server: give HOST:PORT")
        if addresses and not key:
            key = cls.read(repository).key
        return [cls(address, key or "") for address in addresses]

    def write(self, repository: Path) -> None:
        """Write address and key to a file for :meth:`read`, readable only by this user."""
        with replacing(repository / CONTROL_FILE) as partial:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)

    def is_ready(self, model: str | None = None) -> bool:
        """Return whether the server, or a model, reports that it is ready."""
        try:
            return self._call("GET", f"/v2/models/{model}/ready" if model else "/v2/health/ready", timeout=2)[0] == 200
        except ServerUnreachable:
            return False

    def config(self, model: str) -> dict[str, Any]:
        """Return the configuration of a loaded model."""
        config: dict[str, Any] = self._ask("GET", f"/v2/models/{model}/config")
        return config

    def answers(self, model: str) -> int:
        """Return the number of requests that a model has answered or refused."""
        stats = self._ask("GET", f"/v2/models/{model}/stats")["model_stats"]
        return sum(int(row["inference_stats"][kind]["count"]) for row in stats for kind in ("success", "fail"))

    def ready_models(self) -> set[str]:
        """Return the names of the loaded models."""
        rows = self._ask("POST", "/v2/repository/index", {"ready": True})
        return {row["name"] for row in rows if row.get("state", "READY") == "READY"}

    def infer(self, model: str, request: dict[str, Any], timeout: float = 30.0) -> dict[str, Any]:
        """Return a model's answer to a request, both in the JSON of the KServe protocol.

        Raises:
            ServerFailure: the model refused the request or failed; the message is the model's.
            ServerUnreachable: there was no answer within ``timeout`` seconds.
        """
        answer: dict[str, Any] = self._ask("POST", f"/v2/models/{model}/infer", request, timeout)
        return answer

    def load(self, model: str, config: dict[str, Any] | None = None, timeout: float = 600.0) -> None:
        """Load a model, or reload it if its files or ``config`` changed.

        Raises:
            ServerFailure: the model does not load.
        """
        body = {"parameters": {"config": json.dumps(config)}} if config else {}
        self._ask("POST", f"/v2/repository/models/{model}/load", body, timeout)

    def unload(self, model: str) -> None:
        """Unload a model after its requests in flight are answered."""
        self._ask("POST", f"/v2/repository/models/{model}/unload", {}, 60)

    def _ask(self, method: str, path: str, body: Any = None, timeout: float = 10.0) -> Any:
        status, content = self._call(method, path, body, timeout)
        if status != 200:
            try:
                message = json.loads(content)["error"]
            except (ValueError, KeyError, TypeError):
                message = content.decode(errors="replace") or f"status {status}"
            raise ServerFailure(message)
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise ServerFailure(
                f"{self.url}{path} answers {content[:80]!r}, which is not JSON: is it the HTTP port of tritonserver?"
            ) from None

    def _call(self, method: str, path: str, body: Any = None, timeout: float = 10.0) -> tuple[int, bytes]:
        host, _, port = self.url.rpartition(":")
        # One connection per call: a connection that stays open would delay the server's exit.
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        try:
            headers = {KEY_HEADER: self.key, "Connection": "close"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.url}{path} does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()


@contextmanager
def repository_lock(repository: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the repository's lock: shared to revive a step, exclusive to change the release that is served.

    A read-only repository needs no lock, because no release can be promoted in it.
    """
    try:
        descriptor = os.open(repository / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
