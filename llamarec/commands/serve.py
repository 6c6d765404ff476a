"""`llamarec serve`."""

import os
import sys
from typing import Annotated

import typer

from llamarec.options import DEFAULT_REPOSITORY, Repository
from preprocessing.errors import InputError
from serving.admin_key import KEY_VARIABLE
from serving.contract import STORE_VARIABLE


def serve(
    context: typer.Context,
    repository: Repository = DEFAULT_REPOSITORY,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="LLAMAREC_STORE",
            help="Address of the store of histories: `sqlite:///FILE`, `redis://HOST:PORT/DATABASE` or `rediss://...`."
            " Default: what `llamarec export --store` named, if anything.",
        ),
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="HTTP port of /ready, /live and /metrics for orchestrators. Default: none.")
    ] = None,
) -> None:
    """Start the installed tritonserver, watch its steps and restart any that dies. Signals stop it in order.

    From a repository of releases, the promoted release is served.
    """
    from serving.layout import check_adapters
    from serving.server.releases import State
    from serving.server.supervisor import Supervisor

    if not repository.is_dir():
        raise InputError(f"{repository} is not a folder: run `llamarec export --repository {repository}` first")
    state = State.read(repository)
    released = state.models(repository)
    check_adapters(repository, [""] if released is None else [f"_{name}" for name in state.loaded()])
    load = ["*"] if released is None else released
    if store is not None:
        from stores.address import open_store

        open_store(store).close()  # checks the address; the store may be down for now
        os.environ[STORE_VARIABLE] = store
    key = os.environ.pop(KEY_VARIABLE, None)  # must not reach the steps' environment
    sys.exit(Supervisor(repository, context.args, load=load, health_port=health_port, key=key).run())
