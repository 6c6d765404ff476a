"""`llamarec release`: builds, promotes and rolls back releases."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.export_options import takes_export_options
from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_RELEASES, Artifacts, Json, Releases, addresses
from llamarec.tables import print_json, print_row, print_table
from llamarec_client.address import DNS, resolve
from serving.admin_key import KEY_VARIABLE
from serving.errors import ServerUnreachable

if TYPE_CHECKING:  # the export imports torch and onnx: not for `--help`
    from export.repository import Export
    from serving.server.control import Control
    from serving.server.releases import State

Servers = Annotated[
    str | None,
    typer.Option(
        help="HTTP endpoints, HOST:PORT separated by commas, or `dns:///NAME:PORT` for all addresses of a name, of all"
        " servers of this repository: all of them switch, or none. Their key is in LLAMAREC_ADMIN_KEY. Default: the"
        " server that was started last on this machine."
    ),
]

release = typer.Typer(
    help="Immutable, named releases: built next to what is served, promoted and rolled back without a failed request.",
    no_args_is_help=True,
)


@release.command()
@takes_export_options
def build(
    options: "Export",
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Releases = DEFAULT_RELEASES,
    name: Annotated[str | None, typer.Option(help="Name of the release. Default: r1, r2 and so on.")] = None,
    as_json: Json = False,
) -> None:
    """Write the trained retriever and ranker, with vocabulary, catalogue and configurations, as a release."""
    from export.release import build_release

    built = build_release(options, artifacts, repository, name)
    print_row("built", {key: built[key] for key in ("name", "release", "dataset", "built")}, as_json)


@release.command()
def promote(
    name: Annotated[str, typer.Argument(help="Name of the release.")],
    repository: Releases = DEFAULT_RELEASES,
    canary: Annotated[
        bool, typer.Option("--canary", help="Answer only the users that clients choose with `--canary 5%`.")
    ] = False,
    servers: Servers = None,
    as_json: Json = False,
) -> None:
    """Load a release, replay its probes, and have it answer the callers."""
    from serving.server.releases import promote as run

    _print_state(run(repository, name, canary=canary, servers=controls(repository, servers)), as_json)


@release.command()
def rollback(repository: Releases = DEFAULT_RELEASES, servers: Servers = None, as_json: Json = False) -> None:
    """End the canary, or else return to the previous release."""
    from serving.server.releases import rollback as run

    _print_state(run(repository, servers=controls(repository, servers)), as_json)


@release.command(name="list")
def list_(repository: Releases = DEFAULT_RELEASES, as_json: Json = False) -> None:
    """List every release, oldest first, and what it serves as."""
    from serving.server.releases import list_releases

    rows = list_releases(repository)
    if as_json:
        print_json(rows)
    elif rows:
        print_table("releases", list(rows[0]), [list(row.values()) for row in rows])


def controls(repository: Path, servers: str | None) -> "list[Control]":
    """Return the servers that an option names, or none for the one that was started last."""
    from serving.server.control import Control

    named = [address for given in (addresses(servers) if servers else ()) for address in _resolved(given)]
    return Control.several(repository, named, os.environ.get(KEY_VARIABLE))


def _resolved(address: str) -> list[str]:
    """Return all addresses of a name that begins with ``dns:///``, and any other address as it is.

    Raises:
        ServerUnreachable: the name has none.
    """
    if not address.startswith(DNS):
        return [address]
    try:
        return resolve(address.removeprefix(DNS))
    except (OSError, ValueError) as error:
        raise ServerUnreachable(f"the host name of {address} cannot be resolved: check it ({error})") from None


def _print_state(state: "State", as_json: bool) -> None:
    print_row("served", {key: getattr(state, key) for key in ("current", "canary", "previous")}, as_json)
