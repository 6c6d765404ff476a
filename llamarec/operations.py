"""Commands of those who run the service: export, serve, release."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Json, Repository
from llamarec.tables import print_json, print_table
from preprocessing.errors import InputError

if TYPE_CHECKING:
    from client.releases import State
    from export.repository import Export

Runtime = Annotated[str | None, typer.Option(help="`torch` or `openvino`; default: what suits.")]
Dtype = Annotated[str | None, typer.Option(help="`float32` or `bfloat16`; default: what suits.")]
Threads = Annotated[int | None, typer.Option(help="Threads of a ranking pass; default: all cores.")]
Device = Annotated[str | None, typer.Option(help="`cpu` or `gpu`; default: a GPU where there is one.")]
Instances = Annotated[int, typer.Option(help="Processes of the ranker, each with its own model.")]
BatchSize = Annotated[int, typer.Option(help="Most requests that Triton hands to a step together.")]
QueueDelay = Annotated[int, typer.Option(help="Microseconds that a request waits for company at the ranker.")]
QueueSeconds = Annotated[
    float | None, typer.Option(help="Longest wait for the ranker before a request is refused; default: 8 passes.")
]
RetrieverRuntime = Annotated[str, typer.Option(help="`python`, or `onnxruntime`: Triton's own ONNX backend.")]
Index = Annotated[bool, typer.Option("--index", help="Search the items approximately, by faiss; for millions of them.")]
RankCache = Annotated[int, typer.Option(help="How many prompts' answers the ranker remembers.")]
ADMIN_KEY = "LLAMAREC_ADMIN_KEY"
"""Environment variable with the key of the restricted APIs, where a random one will not do."""


def export_options(
    runtime: Runtime = None,
    dtype: Dtype = None,
    threads: Threads = None,
    device: Device = None,
    index: Index = False,
    instances: Instances = 1,
    max_batch_size: BatchSize = 64,
    queue_delay_us: QueueDelay = 0,
    queue_seconds: QueueSeconds = None,
    retriever_runtime: RetrieverRuntime = "python",
    rank_cache: RankCache = 0,
) -> "Export":
    """What `export` and `release build` both take."""
    from export.config import Serving
    from export.repository import Export

    serving = Serving(
        instances=instances,
        max_batch_size=max_batch_size,
        queue_delay_us=queue_delay_us,
        queue_seconds=queue_seconds,
        retriever_runtime=retriever_runtime,
        rank_cache=rank_cache,
    )
    return Export(backend=runtime, dtype=dtype, threads=threads, device=device, index=index, serving=serving)


def takes_export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :func:`export_options` instead of its first parameter, which is what they make."""
    shared = inspect.signature(export_options).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = export_options(**{name: given.pop(name) for name in shared})
        command(options, **given)

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]  # functions have it, mypy does not know
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared.values())}
    return run


@takes_export_options
def export(
    options: "Export",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Fill the Triton model repository from the trained retriever and ranker."""
    from export.repository import export as run

    release = run(options, artifacts, repository)
    _print_row("exported", {"release": release, "repository": str(repository)}, as_json)


def serve(
    context: typer.Context,
    repository: Repository = DEFAULT_REPOSITORY,
    health_port: Annotated[
        int | None, typer.Option(help="HTTP port of /ready, /live and /metrics for orchestrators; default: none.")
    ] = None,
) -> None:
    """Start the installed tritonserver, watch its steps and bring back any that dies; signals end it in order.

    In a repository of releases, what is promoted is served.
    """
    from client.releases import State
    from client.supervisor import Supervisor

    if not repository.is_dir():
        raise InputError(f"{repository} is no folder: run `llamarec export --repository {repository}` first")
    released = State.read(repository).models()
    load = ["*"] if released is None else released
    key = os.environ.pop(ADMIN_KEY, None)  # not for the steps' environment
    sys.exit(Supervisor(repository, context.args, load=load, health_port=health_port, key=key).run())


release = typer.Typer(
    help="Immutable, named releases: built beside what is served, promoted and taken back without a failed request.",
    no_args_is_help=True,
)
Releases = Annotated[Path, typer.Option(help="The repository of releases; `llamarec serve --repository` serves it.")]
DEFAULT_RELEASES = Path("releases")


@release.command()
@takes_export_options
def build(
    options: "Export",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Releases = DEFAULT_RELEASES,
    name: Annotated[str | None, typer.Option(help="By default r1, r2 and so on.")] = None,
    as_json: Json = False,
) -> None:
    """Write the trained retriever and ranker, with vocabulary, catalogue and configurations, as a release."""
    from export.release import build_release

    built = build_release(options, artifacts, repository, name)
    _print_row("built", {key: built[key] for key in ("name", "release", "dataset", "built")}, as_json)


@release.command()
def promote(
    name: Annotated[str, typer.Argument(help="The release.")],
    repository: Releases = DEFAULT_RELEASES,
    canary: Annotated[
        bool, typer.Option("--canary", help="Only for the users that clients choose with `--canary 5%`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Load a release beside what is served, replay its probes, and have callers answered by it."""
    from client.releases import promote as run

    _print_state(run(repository, name, canary=canary), as_json)


@release.command()
def rollback(repository: Releases = DEFAULT_RELEASES, as_json: Json = False) -> None:
    """End the canary, or else return to the release before."""
    from client.releases import rollback as run

    _print_state(run(repository), as_json)


@release.command(name="list")
def list_(repository: Releases = DEFAULT_RELEASES, as_json: Json = False) -> None:
    """Every release, oldest first, and what it serves as."""
    from client.releases import list_releases

    rows = list_releases(repository)
    if as_json:
        print_json(rows)
    elif rows:
        print_table("releases", list(rows[0]), [list(row.values()) for row in rows])


def _print_state(state: "State", as_json: bool) -> None:
    _print_row("served", {key: getattr(state, key) for key in ("current", "canary", "previous")}, as_json)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(export)
    app.add_typer(release, name="release")
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Every other flag goes to tritonserver: `llamarec serve --grpc-port 9001 --log-verbose 1`.",
    )(serve)


def _print_row(title: str, row: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(row)
    else:
        print_table(title, list(row), [list(row.values())])
