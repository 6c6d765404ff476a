"""The command line: parses options, calls the stage, prints what it returns."""

import errno
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from client.contract import ENSEMBLE, MAX_CANDIDATES
from client.errors import ClientError
from llamarec import operations
from llamarec.options import (
    DEFAULT_ARTIFACTS,
    DEFAULT_REPOSITORY,
    Artifacts,
    Epochs,
    Json,
    Loss,
    Model,
    Patience,
    Preset,
    Repository,
    Seed,
    ValidateEvery,
    from_preset,
)
from llamarec.tables import console, messages, print_benchmark, print_evaluation, print_json, print_table
from llamarec.tune import tune
from preprocessing.errors import InputError

app = typer.Typer(
    help="LlamaRec: a recommender that retrieves with LRURec and ranks with a Llama, served by NVIDIA Triton.\n\n"
    "`llamarec demo` runs every stage on MovieLens-100K. On data of your own: preprocess, train-retriever, "
    "train-ranker, export, serve, recommend.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Server = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]
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
"""What the system says of a full disk and of a folder that may not be written."""
operations.register(app)
DEFAULT_SERVER = "127.0.0.1:8001"


@app.command()
def preprocess(
    dataset: Annotated[
        str, typer.Option(help="`movielens-100k`, `movielens`, `amazon` or `table` (any CSV or Parquet).")
    ] = "movielens-100k",
    raw: Annotated[
        Path | None,
        typer.Option(help="Raw file or folder; movielens-100k brings its own, movielens and amazon are fetched."),
    ] = None,
    edition: Annotated[
        str | None, typer.Option(help="What to fetch: `ml-latest-small` to `ml-32m`, or an Amazon category of 2014.")
    ] = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    user_column: Annotated[str, typer.Option(help="For `table`.")] = "user",
    item_column: Annotated[str, typer.Option(help="For `table`.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="For `table`.")] = "timestamp",
    title_column: Annotated[str, typer.Option(help="For `table`.")] = "title",
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out and count lines that don't read; else the first stops.")
    ] = False,
    scheduler_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Dask scheduler to do the work; its workers see the same files.")
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="The raw files hold further events of the data set in --artifacts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Raw interactions and titles to sequences: title filter, iterative 5-core, chronological, leave-one-out."""
    from preprocessing.preprocess import Preprocessing
    from preprocessing.preprocess import preprocess as run

    options = Preprocessing(
        dataset=dataset,
        raw=raw,
        edition=edition,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        title_column=title_column,
        skip_bad_lines=skip_bad_lines,
        scheduler_address=scheduler_address,
        append=append,
    )
    statistics = run(options, artifacts)
    _print_row("the paper's Table 2", statistics.row(), as_json)


@app.command()
def train_retriever(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    model: Model = None,
    loss: Loss = None,
    preset: Preset = "paper",
    epochs: Epochs = None,
    max_length: Annotated[int | None, typer.Option(help="Most recent items that the model reads.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's step size.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Share of activations dropped.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's, not on biases and norms.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of attention, in SASRec and BERT4Rec.")] = None,
    masked_share: Annotated[float | None, typer.Option(help="Share of items that BERT4Rec masks in training.")] = None,
    validate_every: ValidateEvery = None,
    patience: Patience = None,
    mask: Annotated[
        str | None, typer.Option(help="Never recommended: the `history`, or its `last-window`, as LRURec's authors do.")
    ] = None,
    seed: Seed = None,
    device: Annotated[str | None, typer.Option(help="`cpu` or `cuda`.")] = None,
    as_json: Json = False,
) -> None:
    """Train the retriever, early-stopping on validation Recall@10, and write every user's top 20."""
    from models.retriever.options import PRESETS, RetrieverTraining
    from models.retriever.training import train_retriever as run

    options = from_preset(
        RetrieverTraining,
        PRESETS,
        preset,
        model=model,
        loss=loss,
        epochs=epochs,
        max_length=max_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        weight_decay=weight_decay,
        heads=heads,
        masked_share=masked_share,
        validate_every=validate_every,
        patience=patience,
        mask=mask,
        seed=seed,
        device=device,
    )
    metrics = run(options, artifacts)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` the first process alone prints
        return
    if as_json:
        print_json(metrics)
        return
    rows = [[split, *metrics[split].values()] for split in ("validation", "test")]
    print_table(
        f"{options.model}: {metrics['steps']} steps, best at {metrics['best_step']}", ["", *metrics["test"]], rows
    )


app.command()(tune)


@app.command()
def train_ranker(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    base: Annotated[
        str | None, typer.Option(help="A Hugging Face folder or hub name of a Llama; default: the preset's.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="`smollm2-135m` (the embedded base), `llama2-7b`, `paper`, `demo` or `quick`.")
    ] = "smollm2-135m",
    max_prompts: Annotated[int | None, typer.Option(help="Training prompts, sampled; default: the preset's.")] = None,
    negatives: Annotated[
        str | None,
        typer.Option(help="`random`, the paper's, `popular`, or `retriever`: cross-fitted lists of its own."),
    ] = None,
    order: Annotated[str | None, typer.Option(help="Of the candidates: `shuffled` or `retriever`.")] = None,
    pools: Annotated[int | None, typer.Option(help="Prompts behind one history.")] = None,
    candidates: Annotated[int | None, typer.Option(help="In a prompt, 2 to 52; the server retrieves 20.")] = None,
    read: Annotated[
        str | None, typer.Option(help="The `letters` behind the prompt, as the paper, or the candidates' `lines`.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="How many of the base's lower layers are kept.")] = None,
    layers: Annotated[int | None, typer.Option(help="How many of the upper layers get adapters.")] = None,
    max_history: Annotated[int | None, typer.Option(help="Most history items in a prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a prompt; the oldest history goes.")] = None,
    seed: Seed = None,
    device: Annotated[str | None, typer.Option(help="`cpu` or `cuda`.")] = None,
    as_json: Json = False,
) -> None:
    """Tune a Llama with LoRA to rank the retriever's candidates, keep the best of its validations, and merge it."""
    from models.ranker.base import EMBEDDED
    from models.ranker.options import PRESET_BASES, PRESETS, RankerTraining
    from models.ranker.training import train_ranker as run

    options = from_preset(
        RankerTraining,
        PRESETS,
        preset,
        max_prompts=max_prompts,
        negatives=negatives,
        order=order,
        pools=pools,
        candidates=candidates,
        read=read,
        depth=depth,
        layers=layers,
        max_history=max_history,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
    )
    base = base or PRESET_BASES.get(preset, EMBEDDED)
    metrics = run(options, artifacts, base)
    if as_json:
        print_json(metrics)
        return
    measured = {name: values for name, values in metrics["validation"].items() if name != "users"}
    measured[f"untuned, {metrics['sample']['users']} users"] = metrics["sample"]["untuned"]
    rows = [[name, *values.values()] for name, values in measured.items()]
    title = f"{base}: best at step {metrics['best_step']}, retriever's weight {metrics['weight']:g}; validation of"
    print_table(f"{title} {metrics['validation']['users']} users", ["", *measured["fused"]], rows)
    if measured["fused"]["NDCG@10"] <= measured["retriever"]["NDCG@10"]:
        typer.echo("As served the list is no better than the retriever's: train on more prompts before serving this.")


@app.command()
def evaluate(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    served: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running server: ask it for every test user, and compare.")
    ] = None,
    oracle_users: Annotated[int, typer.Option(help="Users to compare with fp32 PyTorch, with --served.")] = 50,
    as_json: Json = False,
) -> None:
    """The paper's tables 1 and 3 for the exported models; with --served, prove the server answers the same."""
    from export.evaluation import evaluate as run
    from llamarec.served import ask_server

    result = run(artifacts, repository, ask_server(served) if served else None, oracle_users)
    print_json(result) if as_json else print_evaluation(result)


@app.command()
def recommend(
    history: Annotated[list[str] | None, typer.Option(help="Raw item id, oldest first; repeat the option.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Raw item id never to return; repeatable.")] = None,
    candidates: Annotated[list[str] | None, typer.Option(help="Rank these instead of retrieving; repeatable.")] = None,
    top_k: Annotated[int | None, typer.Option(help=f"How many to return, 1 to {MAX_CANDIDATES}.")] = None,
    model: Annotated[str, typer.Option(help="`llamarec`, or `llamarec_retrieval` without the ranker.")] = ENSEMBLE,
    user: Annotated[str | None, typer.Option(help="The user's id: for logs, and for the choice of a canary.")] = None,
    canary: Annotated[str, typer.Option(help="Share of the users that the canary release answers: `5%`.")] = "0%",
    server: Server = DEFAULT_SERVER,
    artifacts: Annotated[Path, typer.Option(help="Where to read titles, if it is there.")] = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Ask a running server for one user's recommendations."""
    from client.canary import canary_model, parse_share
    from client.recommender import RecommenderClient
    from llamarec.served import titles

    model = canary_model(model, user, parse_share(canary))
    with RecommenderClient(server) as recommender:
        answer = recommender.recommend(
            history or [], exclude=exclude, candidates=candidates, top_k=top_k, user_id=user, model=model
        )
    if as_json:
        print_json([asdict(recommendation) for recommendation in answer])
        return
    title = titles(artifacts)
    rows = [[place, r.item_id, title(r.item_id), r.score, r.retriever_rank] for place, r in enumerate(answer, 1)]
    print_table("recommendations", ["", "item", "title", "score", "retriever rank"], rows)


@app.command()
def bench(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    concurrency: Annotated[str, typer.Option(help="Requests in flight: FIRST:LAST[:STEP], or one number.")] = "1:4",
    rate: Annotated[str | None, typer.Option(help="Instead: requests a second, at random moments.")] = None,
    model: Annotated[str, typer.Option(help="`llamarec` or `llamarec_retrieval`.")] = ENSEMBLE,
    server: Annotated[str | None, typer.Option(help="HOST:PORT; by default a server is started for it.")] = None,
    users: Annotated[int, typer.Option(help="How many real histories to send in turn.")] = 64,
    requests: Annotated[int, typer.Option(help="Fewest requests in each of a measurement's three windows.")] = 20,
    warm_up: Annotated[int, typer.Option(help="Requests before the first measurement.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder of the CSV and the report.")] = Path("bench"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two such CSV files: print how they differ, measure nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load the ensemble with perf_analyzer: throughput, latency and where the time goes."""
    from llamarec.bench import Bench
    from llamarec.bench import bench as run
    from llamarec.bench import compare as compare_tables

    if compare:
        differences = compare_tables(*compare)
        columns = ["load", "answers/s", "then", "ratio", "p50 ms", "then", "ratio", ""]
        print_json(differences) if as_json else print_table("", columns, differences)
        return
    options = Bench(concurrency=concurrency, rate=rate, model=model, users=users, requests=requests, warm_up=warm_up)
    rows = run(options, artifacts, repository, server, output)
    if as_json:
        print_json([row.columns() for row in rows])
        return
    print_benchmark(model, rows)
    console.print(f"written: {output}/benchmark.csv, {output}/report.html")


@app.command()
def demo(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    preset: Preset = "demo",
    user: Annotated[str | None, typer.Option(help="Raw id of the test user to recommend to.")] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Open a page over what is exported, of any data set.")] = False,
    ui_port: Annotated[int, typer.Option(help="Of the page, on the loopback interface.")] = 7860,
) -> None:
    """Every stage on MovieLens-100K, ending with a recommendation served by Triton."""
    from llamarec.demo import demo as run
    from llamarec.demo import demo_page

    demo_page(artifacts, repository, preset, ui_port) if ui else run(artifacts, repository, preset, user)


def main() -> None:
    """Runs the command line; bad input ends with one sentence on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Libraries announce features that are not installed and changes to come; neither is the reader's business.
    warnings.simplefilter("ignore")
    try:
        app()
    except (InputError, ClientError) as error:
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


def _print_row(title: str, row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(row)
    else:
        print_table(title, list(row), [list(row.values())])


if __name__ == "__main__":
    main()
