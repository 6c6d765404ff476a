"""`llamarec serve`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from llamarec.options import DEFAULT_REPOSITORY, Repository
from llamarec.tables import messages
from preprocessing.errors import InputError
from serving.admin_key import KEY_VARIABLE
from serving.contract import ANSWERS_VARIABLE, SAMPLE_VARIABLE, STORE_VARIABLE


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
    answers: Annotated[
        Path | None,
        typer.Option(
            envvar=ANSWERS_VARIABLE,
            help="Folder for the log of answers, which `llamarec feedback` reads: Parquet files with the items that"
            " each user was shown. Default: answers are not logged.",
        ),
    ] = None,
    answers_sample: Annotated[
        float,
        typer.Option(
            envvar=SAMPLE_VARIABLE,
            min=0.0,
            max=1.0,
            help="Share of the requests whose answers are logged, from 0 to 1; a hash of the request id chooses them.",
        ),
    ] = 1.0,
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
    suffixes = [""] if released is None else [f"_{name}" for name in state.loaded()]
    check_adapters(repository, suffixes)

    def load() -> list[str]:
        models = State.read(repository).models(repository)
        return ["*"] if models is None else models

    if store is not None:
        from stores.address import open_store

        open_store(store).close()  # checks the address; the store may be down for now
        os.environ[STORE_VARIABLE] = store
    if answers is not None:
        if answers.exists() and not answers.is_dir():
            raise InputError(f"--answers {answers} is not a folder: name another path")
        answers.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=answers):  # checks that files can be written there
            os.environ[ANSWERS_VARIABLE], os.environ[SAMPLE_VARIABLE] = str(answers.resolve()), str(answers_sample)
        _warn_of_answers_without_users(repository, suffixes)
    key = os.environ.pop(KEY_VARIABLE, None)  # must not reach the steps' environment
    sys.exit(Supervisor(repository, context.args, load=load, health_port=health_port, key=key).run())


def _warn_of_answers_without_users(repository: Path, suffixes: Sequence[str]) -> None:
    """Say in one sentence if the answers of a model that is served cannot be joined with what users did."""
    from serving.layout import passes_users

    old = [f"features{suffix}" for suffix in suffixes if not passes_users(repository, suffix)]
    if old:
        remedy = "llamarec export" if "features" in old else "llamarec release build"
        messages.print(
            f"warning: an earlier version exported {' and '.join(old)} of {repository}, so answers are logged without"
            f" users, and `llamarec feedback` cannot use them: run `{remedy}`",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
