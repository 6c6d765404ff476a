"""Promotes a release on running servers or rolls it back, without a failed request.

A release is a set of models whose names end with the name of the release: ``features_r3`` to ``ranker_r3``, and the
ensembles ``llamarec_r3`` and ``llamarec_retrieval_r3``. They are immutable. Callers use the alias ``llamarec``, an
ensemble that lists the steps of one release. A promotion loads the release, replays its probes, and then loads a new
configuration of the alias, which is atomic: requests in flight finish on the old release. `llamarec release build`
builds a release (:mod:`export.release`); this module needs no machine learning packages.

Several servers of one repository, which is a shared folder, switch together: all of them load the release and answer
its probes before the first one switches, and if one of them then refuses or dies, the others are switched back.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llamarec_client.canary import CANARY
from llamarec_client.contract import ENSEMBLE, HISTORY, ITEM_ID, RETRIEVAL_ENSEMBLE, SCORE, SIMILAR
from preprocessing.artifacts import sha256, write_whole
from serving.contract import NEIGHBOURS, RETRIEVER_SCORES, STEPS, STORE_MODELS
from serving.errors import ReleaseError, ServerFailure, ServingError
from serving.layout import known_export_id, step_artifact
from serving.server.control import Control, repository_lock

RELEASES = ".releases"
"""Folder of the repository that holds the manifest of each release and the state; Triton ignores it."""
STATE_FILE = "state.json"
ENSEMBLES = (ENSEMBLE, RETRIEVAL_ENSEMBLE)
"""Names the ensembles that every release has; one of this version has ``similar`` too."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,39}")
SCORE_TOLERANCE = 0.01
"""Maximum deviation of a probability that a different processor can cause; the same machine gives the same bits."""
CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class State:
    """The releases of a repository that are served; stored, so that a restart does not change them."""

    current: str | None = None
    canary: str | None = None
    """Release that ``llamarec_canary`` serves; the current release while no canary runs."""
    previous: str | None = None
    """Release that a rollback returns to."""
    released: bool = False
    """Whether this is a repository of releases."""

    @classmethod
    def read(cls, repository: Path) -> "State":
        """Return the stored state of a repository, or an empty one."""
        folder = repository / RELEASES
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(released=folder.is_dir())

    def write(self, repository: Path) -> None:
        """Store the state for :meth:`read`."""
        write_whole(repository / RELEASES / STATE_FILE, json.dumps(asdict(self)) + "\n")

    def suffix(self) -> str:
        """Return what the names of the models that are served end with; empty if this is no repository of releases.

        Raises:
            ReleaseError: no release was promoted.
        """
        if self.released and not self.current:
            raise ReleaseError("no release is served yet: run `llamarec release promote` first")
        return f"_{self.current}" if self.current else ""

    def loaded(self) -> list[str]:
        """Return the releases to keep loaded."""
        return list(dict.fromkeys(filter(None, (self.current, self.canary, self.previous))))

    def models(self, repository: Path) -> list[str] | None:
        """Return the models that a server loads first; None means all of the repository.

        They are the aliases, ``events``, ``items``, and the releases of :meth:`loaded`: their ensembles, which load
        their steps, and the retriever's graph where a model of its own runs it.
        """
        if not self.released:
            return None
        models = [alias for alias, _ in self.aliases(repository)] + _store_models(repository)
        for name in self.loaded():
            models += [f"{ensemble}_{name}" for ensemble in _ensembles(repository, name)] + _graph(repository, name)
        return models

    def aliases(self, repository: Path) -> list[tuple[str, str]]:
        """Return each alias with the ensemble that it stands for."""
        pairs = []
        for release, end in ((self.current, ""), (self.canary, f"_{CANARY}")):
            for ensemble in _ensembles(repository, release) if release else ():
                pairs.append((ensemble + end, f"{ensemble}_{release}"))
        return pairs


def manifest_path(repository: Path, name: str) -> Path:
    """Return the path of a release's manifest; the release exists once this file does."""
    return repository / RELEASES / f"{name}.json"


def release_manifest(repository: Path, name: str) -> dict[str, Any]:
    """Return the manifest of a release.

    Raises:
        ReleaseError: there is no such release.
    """
    try:
        manifest: dict[str, Any] = json.loads(manifest_path(repository, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(row["name"] for row in list_releases(repository)) or "none"
        raise ReleaseError(f"there is no release {name!r} in {repository} (releases: {known})") from None
    return manifest


def list_releases(repository: Path) -> list[dict[str, Any]]:
    """Return one row per release, oldest first: name, export id, data set, build time and what it serves as."""
    state = State.read(repository)
    rows = []
    for path in (repository / RELEASES).glob("*.json"):
        if path.name != STATE_FILE:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            roles = [role for role in ("current", "canary", "previous") if getattr(state, role) == manifest["name"]]
            row = {key: manifest[key] for key in ("name", "release", "dataset", "built")}
            rows.append({**row, "serves as": ", ".join(roles)})
    return sorted(rows, key=lambda row: str(row["built"]))


def check_release(repository: Path, name: str) -> dict[str, Any]:
    """Return the manifest of a release, if its files are complete, unchanged and of one export.

    Raises:
        ReleaseError: they are not; the message names the file or step.
    """
    manifest = release_manifest(repository, name)
    for file, digest in manifest["files"].items():
        path = repository / file
        if not path.is_file() or sha256(path) != digest:
            raise ReleaseError(f"release {name} was changed: {path} is missing or differs; build a new release")
    for step in STEPS:
        folder = step_artifact(repository, step, f"_{name}")
        found = known_export_id(folder)
        if found is None:
            raise ReleaseError(f"release {name} is incomplete: {folder} is no exported step; build a new release")
        if found != manifest["release"]:
            raise ReleaseError(f"release {name} mixes exports: its {step} is from another one; build a new release")
    return manifest


def promote(repository: Path, name: str, *, canary: bool = False, servers: Sequence[Control] = ()) -> State:
    """Load a release next to the one that is served, replay its probes, and then switch the callers to it.

    If any of this fails, the release that was served before is still served, by every server.

    Args:
        repository: repository of the running servers.
        name: name of the release.
        canary: switch only the aliases ``llamarec_canary`` and ``llamarec_retrieval_canary``.
        servers: all servers of the repository. Default: the one that `llamarec serve` started on it last.

    Returns:
        The new state. The release that was current stays loaded, for :func:`rollback`.

    Raises:
        ReleaseError: there is no such release, or its files are not what was built.
        ServerFailure: the release does not load, or its answers to the probes differ from those recorded at build time.
    """
    servers = servers or [Control.read(repository)]
    before = State.read(repository)
    manifest = check_release(repository, name)
    try:
        for server in servers:
            with _naming(server, servers):
                for model in _store_models(repository) + _models(repository, name):
                    server.load(model)
                replay(server, f"{ENSEMBLE}_{name}", manifest["probes"])
    except ServingError as error:
        if name not in before.loaded():
            _unload(servers, repository, [name])
        raise ServerFailure(f"release {name} is not promoted, {_served(before)}: {error}") from None
    if canary:
        after = replace(before, canary=name, current=before.current or name, released=True)
    else:
        previous = before.current if before.current != name else before.previous
        after = State(current=name, canary=name, previous=previous, released=True)
    _flip(servers, repository, before, after)
    _unload(servers, repository, [name for name in before.loaded() if name not in after.loaded()])
    return after


def rollback(repository: Path, *, servers: Sequence[Control] = ()) -> State:
    """End the canary if one runs, or else promote the previous release; return the new state.

    Args:
        repository: see :func:`promote`.
        servers: see :func:`promote`.

    Raises:
        ReleaseError: there is no previous release.
    """
    state = State.read(repository)
    if state.current and state.canary != state.current:
        ended = replace(state, canary=state.current)
        servers = servers or [Control.read(repository)]
        _flip(servers, repository, state, ended)
        _unload(servers, repository, [name for name in state.loaded() if name not in ended.loaded()])
        return ended
    if not state.previous:
        before = f"before {state.current}" if state.current else "yet"
        raise ReleaseError(f"cannot roll back: no release was promoted {before}")
    return promote(repository, state.previous, servers=servers)


def replay(control: Control, model: str, probes: Iterable[Mapping[str, Any]]) -> None:
    """Send a model the probes of its release, and compare its answers with those recorded at build time.

    Raises:
        ServerFailure: an answer differs.
    """
    for probe in probes:
        history = probe["history"]
        tensor = {"name": HISTORY.name, "shape": [1, len(history)], "datatype": "BYTES", "data": history}
        answer = control.infer(model, {"inputs": [tensor]}, timeout=120)
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        served = dict(zip(outputs[ITEM_ID.name], outputs[SCORE.name], strict=True))
        expected = dict(zip(probe["items"], probe["scores"], strict=True))
        off = max((abs(served.get(item, -1.0) - score) for item, score in expected.items()), default=0.0)
        if served.keys() != expected.keys() or off > SCORE_TOLERANCE:
            raise ServerFailure(
                f"{model} answers probe {history[-3:]} differently than at build time: scores differ by up to {off:.3g}"
            )


def _flip(servers: Sequence[Control], repository: Path, before: State, after: State) -> None:
    """Switch every alias of every server; if one does not load, switch all of them back.

    What is served no longer is then unloaded.
    """
    with repository_lock(repository, exclusive=True):
        try:
            for alias, ensemble in after.aliases(repository):
                _write_alias(repository, alias, ensemble)
                for server in servers:
                    with _naming(server, servers):
                        server.load(alias)
        except ServingError as error:
            stuck = _flip_back(servers, repository, before, after)
            _unload(servers, repository, [name for name in after.loaded() if name not in before.loaded()])
            except_at = f", except at {', '.join(stuck)}: restart it" if stuck else ""
            raise ServerFailure(f"the switch was undone{except_at}, {_served(before)}: {error}") from None
        after.write(repository)
    _unload_aliases(servers, repository, before, after)


def _unload_aliases(servers: Iterable[Control], repository: Path, before: State, after: State) -> None:
    """Unload the aliases that stand for nothing in a release of an earlier version: they would answer from another."""
    for alias in dict(before.aliases(repository)).keys() - dict(after.aliases(repository)).keys():
        for server in servers:
            with suppress(ServingError):
                server.unload(alias)


def _flip_back(servers: Sequence[Control], repository: Path, before: State, after: State) -> list[str]:
    """Have every alias stand for what it stood for; return the servers that do not do it."""
    stuck = dict.fromkeys(server.url for server in servers)
    for alias, ensemble in before.aliases(repository):
        # A server that does not answer reads this when it is started again.
        _write_alias(repository, alias, ensemble)
    for server in servers:
        with suppress(ServingError):
            for alias, _ in before.aliases(repository):
                server.load(alias)
            for alias in dict(after.aliases(repository)).keys() - dict(before.aliases(repository)).keys():
                server.unload(alias)
            del stuck[server.url]
    return list(stuck)


@contextmanager
def _naming(server: Control, servers: Sequence[Control]) -> Iterator[None]:
    """Put the server's address into its failures, if there are several servers."""
    try:
        yield
    except ServingError as error:
        if len(servers) == 1:
            raise
        raise ServerFailure(f"the server at {server.url}: {error}") from None


def _served(state: State) -> str:
    return f"{state.current} is still served" if state.current else "no release is served yet"


def _write_alias(repository: Path, alias: str, ensemble: str) -> None:
    """Write the configuration of an alias, which a server reads when it loads the alias, or when it is restarted."""
    config = text_format.Parse((repository / ensemble / CONFIG).read_text(encoding="utf-8"), ModelConfig())
    config.name = alias
    (repository / alias / "1").mkdir(parents=True, exist_ok=True)
    write_whole(repository / alias / CONFIG, text_format.MessageToString(config))


def _models(repository: Path, name: str) -> list[str]:
    """Return a release's models, steps first, so that no ensemble loads them implicitly."""
    ensembles = _ensembles(repository, name)
    steps = (*STEPS, NEIGHBOURS) if SIMILAR in ensembles else STEPS
    return _graph(repository, name) + [f"{model}_{name}" for model in (*steps, *ensembles)]


def _ensembles(repository: Path, name: str) -> Sequence[str]:
    """Return the ensembles of a release; those of earlier versions have no ``similar``."""
    has_similar = (repository / f"{SIMILAR}_{name}" / CONFIG).is_file()
    return (*ENSEMBLES, SIMILAR) if has_similar else ENSEMBLES


def _store_models(repository: Path) -> list[str]:
    """Return the models that change the store, which are no part of a release; older repositories have none."""
    return [name for name in STORE_MODELS if (repository / name / CONFIG).is_file()]


def _graph(repository: Path, name: str) -> list[str]:
    """Return the model that runs a release's retriever graph in Triton's ONNX backend, if it has one.

    No ensemble contains it: the retriever step calls it.
    """
    model = f"{RETRIEVER_SCORES}_{name}"
    return [model] if (repository / model).is_dir() else []


def _unload(servers: Iterable[Control], repository: Path, names: Sequence[str]) -> None:
    for server in servers:
        for name in names:
            for model in reversed(_models(repository, name)):
                with suppress(ServingError):
                    server.unload(model)
