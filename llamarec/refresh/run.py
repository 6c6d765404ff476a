"""Makes a new release of a data set's new events, and promotes it if it is not worse than the one that is served."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from export.release import build_release, next_name, release_options
from export.repository import Export, candidates_of, export
from llamarec.refresh.events import NewEvents, Source, append_events, new_events, store_listing
from llamarec.refresh.folders import built_from, generations, next_folder, only_refresh, refused_folder, work_folder
from llamarec.refresh.judge import Judges, choose_judges, compare, judged_ranks, unknown_items
from models.ranker.options import RankerTraining
from models.ranker.reuse import reuse_ranker
from models.retriever.options import RetrieverTraining
from models.retriever.training import train_retriever
from models.titles.vectors import KIND as TITLES
from preprocessing.artifacts import read_manifest, write_whole
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.errors import ReleaseError, ServerUnreachable
from serving.offline import ExportedSteps
from serving.server.control import Control
from serving.server.releases import State, check_release, manifest_path, promote, release_manifest

PLAN, REPORT = "plan.json", "refresh.json"
EXPORT = "export"
"""Folder of the candidate's exported steps, while it is judged."""
Say = Callable[[str], None]
"""Function that tells the user what happens now."""


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """How a release is refreshed."""

    source: Source
    """Where the new events come from."""
    ranker: bool = False
    """Whether the ranker is trained again; otherwise the ranker of the serving release is taken over, and only the
    weight of the retriever's scores is fitted again."""
    device: str = "auto"
    """Device of the trainings, see :func:`models.device.torch_device`."""
    least_users: int = 100
    """Minimum number of users whose newest event is new."""
    judge_users: int = 200
    """Maximum number of users by whom the ranker is judged, and on whom the weight is fitted."""
    canary: bool = False
    """Whether the candidate becomes the canary, instead of answering everybody."""
    release: str | None = None
    """Release to compare with. Default: the one that is served."""

    def __post_init__(self) -> None:
        for name, least in (("least_users", 2), ("judge_users", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: give at least {least}")


def refresh(
    options: Refresh,
    artifacts: Path,
    repository: Path,
    servers: Sequence[Control] = (),
    say: Say = lambda sentence: None,
) -> dict[str, Any]:
    """Make a candidate of the new events, compare it with the serving release, and promote it unless it is worse.

    The earlier artifacts are not changed. The candidate is made in a folder of its own, stage by stage; a call after
    one that was killed goes on from the finished stages. See docs/refresh.md for the rule of acceptance.

    Args:
        options: see :class:`Refresh`.
        artifacts: the first artifacts of the data set; those of refreshes are beside them
            (:mod:`llamarec.refresh.folders`).
        repository: repository of releases.
        servers: all servers of the repository. Default: the one that `llamarec serve` started on it last, if any.
        say: is called with a sentence when a stage begins.

    Returns:
        the content of ``refresh.json``: ``accepted`` says whether the candidate was, ``release`` its name then, and
        ``promoted`` what it serves as, ``None`` if no server runs.

    Raises:
        InputError: the new events are unusable, too few or of another data set, the release was built from other
            artifacts, or another refresh is running. Everything is as before.
        ServingError: there is no such release, or the servers refuse the new one. Everything is as before; in the
            second case the release is built, and the next call promotes it.
        StoreError: the store cannot be reached.
    """
    artifacts = artifacts if artifacts.name else artifacts.resolve()
    if not generations(artifacts):
        raise InputError(f"{artifacts} does not exist: name the first artifacts of the data set that is served")
    with only_refresh(artifacts):
        serving = _serving_release(repository, options.release)
        earlier = built_from(artifacts, repository, serving)
        plan = _plan(options, earlier, repository, serving)
        built = _built_before(artifacts, repository, plan)
        if built is None:
            work = _open_work(artifacts, plan)
            report = _read(work / REPORT) or _judge(options, earlier, work, repository, serving, say)
            if not report["accepted"]:
                return _refuse(artifacts, work, report)
            built = _build(artifacts, work, repository, report, say)
        return _promote(options, built, repository, serving, servers, say)


def _serving_release(repository: Path, name: str | None) -> str:
    """Return the release to compare with, after a check that its files are what was built."""
    found = name or State.read(repository).current
    if found is None:
        raise ReleaseError(
            f"no release of {repository} is served: promote one with `llamarec release promote`, or name the one to"
            " compare with by --release"
        )
    check_release(repository, found)
    return found


def _plan(options: Refresh, earlier: Path, repository: Path, serving: str) -> dict[str, Any]:
    """Return what determines a candidate: work on another one is not gone on with."""
    return {
        "earlier": str(earlier),
        "release": release_manifest(repository, serving)["release"],
        "source": options.source.name,
        "events": options.source.fingerprint(),
        "ranker": options.ranker,
    }


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _built_before(artifacts: Path, repository: Path, plan: Mapping[str, Any]) -> Path | None:
    """Return the artifacts of this plan whose release was built and not promoted, because the call ended there."""
    for folder in reversed(generations(artifacts)):
        report = _read(folder / REPORT)
        if report is None or report["promoted"] is not None or _read(folder / PLAN) != plan:
            continue
        if _export_of(repository, report["release"]) == report["export"]:
            return folder
    return None


def _open_work(artifacts: Path, plan: Mapping[str, Any]) -> Path:
    """Return the folder of the candidate, emptied if what is in it is of another plan."""
    work = work_folder(artifacts)
    if work.exists() and _read(work / PLAN) != plan:
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    _write(work / PLAN, plan)
    return work


def _judge(options: Refresh, earlier: Path, work: Path, repository: Path, serving: str, say: Say) -> dict[str, Any]:
    """Make the candidate, compare it with the serving release, and write the report into its folder."""
    say(f"appending {options.source.name} to {earlier / 'data'}")
    found, judges = _append(options, earlier, work)
    as_served = release_options(repository, serving)
    say(f"going on from the retriever in {earlier / 'retriever'}")
    _train_retriever(options, earlier, work)
    say(f"training the ranker as in {earlier}" if options.ranker else f"taking the ranker of {earlier} over")
    ranker = _make_ranker(options, as_served, earlier, work)
    say(f"judging the candidate and {serving} by {len(judges.all):,} users")
    exported = export(as_served, work, work / EXPORT)
    comparisons, unknown = _compare(options, work, repository, serving, judges)
    shutil.rmtree(work / EXPORT)
    report = {
        "dataset": load_data(work).name,
        "source": options.source.name,
        "earlier": str(earlier),
        "serving": serving,
        "new_events": found.count,
        "judges": len(judges.all),
        "ranked_judges": len(judges.ranked),
        "unknown_to_serving": unknown,
        "ranker": ranker,
        "comparisons": [row.row() for row in comparisons],
        "accepted": not any(row.worse for row in comparisons),
        "export": exported,
        "release": None,
        "promoted": None,
    }
    _write(work / REPORT, report)
    return report


def _append(options: Refresh, earlier: Path, work: Path) -> tuple[NewEvents, Judges]:
    """Write the longer data; unusable events leave no folder of a candidate."""
    try:
        append_events(options.source, earlier, work)
        found = new_events(options.source, earlier, work, load_data(work))
        return found, choose_judges(found.judged, options.least_users, options.judge_users, options.source.name)
    except InputError:
        shutil.rmtree(work)  # nothing of it can be gone on with
        raise


def _recorded(options: type[Any], manifest_options: Mapping[str, Any], **changed: Any) -> Any:
    """Return the options that an artifact records; those that its version did not have get their defaults."""
    names = {field.name for field in fields(options)}
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in manifest_options.items()
        if name in names
    }
    return options(**{**found, **changed})


def _train_retriever(options: Refresh, earlier: Path, work: Path) -> None:
    manifest = read_manifest(earlier / "retriever", "retriever", "llamarec train-retriever")
    training = _recorded(RetrieverTraining, manifest.options, device=options.device)
    if training.titles == "model":
        from models.ranker.title_states import encode_titles

        if not (work / TITLES).is_dir():  # whose projection is kept
            shutil.copytree(earlier / TITLES, work / ".titles.copy", dirs_exist_ok=True)
            os.rename(work / ".titles.copy", work / TITLES)
        base = read_manifest(earlier / TITLES, TITLES, "llamarec train-retriever").options["base"]
        encode_titles(work, base, device=options.device, keep=True)
    train_retriever(training, work, start=earlier / "retriever")


def _make_ranker(options: Refresh, as_served: Export, earlier: Path, work: Path) -> dict[str, Any]:
    """Write the candidate's ranker, and return what the report says of it."""
    recorded = dict(read_manifest(earlier / "ranker", "ranker", "llamarec train-ranker").options)
    if options.ranker:
        from models.ranker.training import train_ranker

        base = recorded.pop("base")
        metrics = train_ranker(_recorded(RankerTraining, recorded, device=options.device), work, base)
        return {"trained": True, "weight": metrics["weight"]}
    metrics = reuse_ranker(
        earlier,
        work,
        as_served.runtime(),
        candidates=candidates_of(as_served, earlier).retrieved,
        users=options.judge_users,
    )
    return {"trained": False, **{name: metrics[name] for name in ("weight", "weight_before", "fitted")}}


def _compare(options: Refresh, work: Path, repository: Path, serving: str, judges: Judges) -> tuple[list[Any], int]:
    """Return the comparisons, and the number of judges whose newest item the serving release does not know.

    One side is loaded after the other, as two language models may not fit into the memory.
    """
    data, listing = load_data(work), store_listing(options.source)

    def loaded(folder: Path, suffix: str = "") -> ExportedSteps:
        steps = ExportedSteps.load(folder, suffix)
        return steps if listing is None else steps.with_items(listing)

    steps = loaded(repository, f"_{serving}")
    before, unknown = judged_ranks(steps, data, judges), unknown_items(steps, data, judges.all)
    del steps
    return compare(judged_ranks(loaded(work / EXPORT), data, judges), before), unknown


def _refuse(artifacts: Path, work: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Move the candidate out of the way, where it can be looked at."""
    refused = refused_folder(artifacts)
    shutil.rmtree(refused, ignore_errors=True)
    os.rename(work, refused)
    return {**report, "artifacts": str(refused)}


def _build(artifacts: Path, work: Path, repository: Path, report: dict[str, Any], say: Say) -> Path:
    """Build the candidate's release, unless an earlier call did, and return the new folder of its artifacts."""
    name = report["release"]
    if name is None or _export_of(repository, name) not in (None, report["export"]):
        name = next_name(repository)
        _write(work / REPORT, {**report, "release": name})  # before it exists: a later call has to find it
    if _export_of(repository, name) is None:
        say(f"building release {name} in {repository}")
        build_release(release_options(repository, report["serving"]), work, repository, name)
    folder = next_folder(artifacts)
    os.rename(work, folder)
    return folder


def _export_of(repository: Path, name: str) -> str | None:
    """Return the export id of a release; None if there is no such release."""
    return str(release_manifest(repository, name)["release"]) if manifest_path(repository, name).exists() else None


def _promote(
    options: Refresh, folder: Path, repository: Path, serving: str, servers: Sequence[Control], say: Say
) -> dict[str, Any]:
    """Promote the release that was built from a folder, if a server runs, and complete the report there."""
    report = _read(folder / REPORT)
    assert report is not None
    name, current = report["release"], State.read(repository).current
    if options.release is None and current != serving:
        raise ReleaseError(
            f"release {name} was compared with {serving}, but {current} is served by now: it is built and not"
            " promoted, run the command again"
        )
    say(f"promoting {name}")
    try:
        controls = servers or [Control.read(repository)]
    except ServerUnreachable:
        return {**report, "artifacts": str(folder)}
    promote(repository, name, canary=options.canary, servers=controls)
    report["promoted"] = "canary" if options.canary else "current"
    _write(folder / REPORT, report)
    return {**report, "artifacts": str(folder)}
