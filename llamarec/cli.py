"""The command line: registers the commands, and turns bad input into one sentence and exit code 2."""

import errno
import os
import sys
import warnings

import typer
from rich.markup import escape

from llamarec.commands.bench import bench
from llamarec.commands.demo import demo
from llamarec.commands.doctor import doctor
from llamarec.commands.evaluate import evaluate
from llamarec.commands.events import events
from llamarec.commands.export import export
from llamarec.commands.feedback import feedback
from llamarec.commands.gateway import gateway
from llamarec.commands.items import items
from llamarec.commands.preprocess import preprocess
from llamarec.commands.recommend import recommend
from llamarec.commands.recommend_all import recommend_all
from llamarec.commands.refresh import refresh
from llamarec.commands.release import release
from llamarec.commands.serve import serve
from llamarec.commands.similar import similar
from llamarec.commands.train_ranker import train_ranker
from llamarec.commands.train_retriever import train_retriever
from llamarec.commands.tune import tune
from llamarec.commands.users import users
from llamarec.tables import messages
from llamarec_client.errors import ClientError
from preprocessing.errors import InputError
from serving.errors import ServingError
from stores.store import StoreError

UNWRITABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Error numbers of a full disk and of a folder that may not be written."""

app = typer.Typer(
    help="LlamaRec: a recommender that retrieves with LRURec and ranks with a Llama, served by NVIDIA Triton.\n\n"
    "`llamarec demo` runs every stage on MovieLens-100K. With your own data, run preprocess, train-retriever, "
    "train-ranker, export, serve and recommend.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (preprocess, train_retriever, tune, train_ranker, export):
    app.command()(command)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every other flag is passed to tritonserver: `llamarec serve --grpc-port 9001 --log-verbose 1`.",
)(serve)
app.command()(gateway)
app.add_typer(release, name="release")
app.add_typer(events, name="events")
app.add_typer(users, name="users")
app.add_typer(items, name="items")
for command in (recommend, recommend_all, similar, evaluate, feedback, refresh, bench, demo, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; bad input ends with one sentence on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Libraries announce missing optional features and coming changes, which do not concern the user of a command.
    warnings.simplefilter("ignore")
    try:
        app()
    except (InputError, ClientError, ServingError, StoreError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _fail(f"{error}: make room, or name folders that can be written")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(sentence: str) -> None:
    messages.print(f"[bold red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
