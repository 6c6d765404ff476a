"""Releases on a running server: load, replay the probes, flip atomically; back again the same way.

A release is a set of models whose names end with the release's: ``features_r3`` to ``ranker_r3`` and the ensembles
``llamarec_r3`` and ``llamarec_retrieval_r3``. They are immutable. What callers ask, ``llamarec``, is an alias: an
ensemble that lists one release's steps. Loading its new configuration is the flip; requests under way end on the old
release. `llamarec release build` makes a release (:mod:`export.release`); this module needs no machine learning.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llamarec_client.canary import CANARY
from llamarec_client.contract import ENSEMBLE, HISTORY, ITEM_ID, RETRIEVAL_ENSEMBLE, SCORE
from preprocessing.artifacts import sha256, write_whole
from serving.contract import STEPS
from serving.errors import ReleaseError, ServerFailure, ServingError
from serving.layout import export_id, step_artifact
from serving.server.control import Control, repository_lock

RELEASES = ".releases"
"""In the repository: a manifest for each release, and which is served. Triton does not read it."""
STATE_FILE = "state.json"
ENSEMBLES = (ENSEMBLE, RETRIEVAL_ENSEMBLE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,39}")
SCORE_TOLERANCE = 0.01
"""Largest change of a probability that another processor explains; the same machine gives the same bits."""
CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class State:
    """Which releases of a repository are served; survives a restart."""

    current: str | None = None
    canary: str | None = None
    """What ``llamarec_canary`` answers with; the current release while no canary runs."""
    previous: str | None = None
    """What a rollback returns to."""
    released: bool = False
    """Whether the repository holds releases at all."""

    @classmethod
    def read(cls, repository: Path) -> "State":
        """The state of a repository; one that holds no releases has none."""
        folder = repository / RELEASES
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(released=folder.is_dir())

    def write(self, repository: Path) -> None:
        """For :meth:`read`."""
        write_whole(repository / RELEASES / STATE_FILE, json.dumps(asdict(self)) + "\n")

    def loaded(self) -> list[str]:
        """The releases to hold in memory."""
        return list(dict.fromkeys(filter(None, (self.current, self.canary, self.previous))))

    def models(self) -> list[str] | None:
        """What a server loads when it starts: the aliases and every ensemble of :meth:`loaded`; None: everything."""
        if not self.released:
            return None
        aliases = [alias for alias, _ in self.aliases()]
        return aliases + [f"{ensemble}_{name}" for name in self.loaded() for ensemble in ENSEMBLES]

    def aliases(self) -> list[tuple[str, str]]:
        """Each alias and the ensemble that it stands for."""
        pairs = [(ensemble, f"{ensemble}_{self.current}") for ensemble in ENSEMBLES if self.current]
        return pairs + [(f"{ensemble}_{CANARY}", f"{ensemble}_{self.canary}") for ensemble in ENSEMBLES if self.canary]


def manifest_path(repository: Path, name: str) -> Path:
    """Where a release's manifest stands; the release exists once it does."""
    return repository / RELEASES / f"{name}.json"


def release_manifest(repository: Path, name: str) -> dict[str, Any]:
    """A release's manifest.

    Raises:
        ReleaseError: there is no such release.
    """
    try:
        manifest: dict[str, Any] = json.loads(manifest_path(repository, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(row["name"] for row in list_releases(repository)) or "none"
        raise ReleaseError(f"there is no release {name!r} in {repository} (there are: {known})") from None
    return manifest


def list_releases(repository: Path) -> list[dict[str, Any]]:
    """A row for each release, oldest first: name, content, data set, time of building and what it serves as."""
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
    """The manifest of a release whose parts are all there, unchanged and of one export.

    Raises:
        ReleaseError: names the part that is not.
    """
    manifest = release_manifest(repository, name)
    for file, digest in manifest["files"].items():
        path = repository / file
        if not path.is_file() or sha256(path) != digest:
            raise ReleaseError(f"release {name} is not what was built: {path} is missing or was changed")
    for step in STEPS:
        if export_id(step_artifact(repository, step, f"_{name}")) != manifest["release"]:
            raise ReleaseError(f"release {name} does not belong together: its {step} is of another export")
    return manifest


def promote(repository: Path, name: str, *, canary: bool = False) -> State:
    """Loads a release beside what is served, replays its probes, and only then has callers answered by it.

    Args:
        repository: of the running server.
        name: the release.
        canary: only ``llamarec_canary`` and its retrieval become this release.

    Returns:
        The new state. The release that was current stays loaded, for :func:`rollback`.

    Raises:
        ReleaseError: there is no such release, or its parts do not belong together.
        ServerFailure: it does not load, or its probes are answered otherwise than they were when it was built.
            In every case the release that was served goes on being served.
    """
    control = Control.read(repository)
    before = State.read(repository)
    manifest = check_release(repository, name)
    try:
        for model in _models(name):
            control.load(model)
        replay(control, f"{ENSEMBLE}_{name}", manifest["probes"])
    except ServingError as error:
        if name not in before.loaded():
            _unload(control, [name])
        raise ServerFailure(f"release {name} is not promoted, {before.current} goes on: {error}") from None
    if canary:
        after = replace(before, canary=name, current=before.current or name, released=True)
    else:
        previous = before.current if before.current != name else before.previous
        after = State(current=name, canary=name, previous=previous, released=True)
    _flip(control, repository, before, after)
    _unload(control, [name for name in before.loaded() if name not in after.loaded()])
    return after


def rollback(repository: Path) -> State:
    """Ends a canary if one runs; else returns to the release before.

    Raises:
        ReleaseError: there is none before.
    """
    state = State.read(repository)
    if state.current and state.canary != state.current:
        ended = replace(state, canary=state.current)
        control = Control.read(repository)
        _flip(control, repository, state, ended)
        _unload(control, [name for name in state.loaded() if name not in ended.loaded()])
        return ended
    if not state.previous:
        raise ReleaseError(f"nothing to go back to: no release was promoted before {state.current}")
    return promote(repository, state.previous)


def replay(control: Control, model: str, probes: Iterable[Mapping[str, Any]]) -> None:
    """Asks a model the questions that were answered when its release was built.

    Raises:
        ServerFailure: an answer is another than it was.
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
                f"probe {history[-3:]} is answered otherwise than when {model} was built: off by {off:.3g}"
            )


def _flip(control: Control, repository: Path, before: State, after: State) -> None:
    """Each alias changes at once; where one does not load, all are as they were."""
    with repository_lock(repository, exclusive=True):
        try:
            _load_aliases(control, repository, after)
        except ServingError as error:
            if before.current:
                _load_aliases(control, repository, before)
            raise ServerFailure(f"the flip was taken back, {before.current} goes on: {error}") from None
        after.write(repository)


def _load_aliases(control: Control, repository: Path, state: State) -> None:
    for alias, ensemble in state.aliases():
        config = text_format.Parse((repository / ensemble / CONFIG).read_text(encoding="utf-8"), ModelConfig())
        config.name = alias
        (repository / alias / "1").mkdir(parents=True, exist_ok=True)
        # Written first: a restart in between finds what is about to be loaded.
        write_whole(repository / alias / CONFIG, text_format.MessageToString(config))
        control.load(alias)


def _models(name: str) -> list[str]:
    """Steps first, so that no ensemble loads them implicitly."""
    return [f"{model}_{name}" for model in (*STEPS, *ENSEMBLES)]


def _unload(control: Control, names: Iterable[str]) -> None:
    for name in names:
        for model in reversed(_models(name)):
            with suppress(ServingError):
                control.unload(model)
