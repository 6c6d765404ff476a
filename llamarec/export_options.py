"""The options that `export` and `release build` share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamarec.options import from_given

if TYPE_CHECKING:  # the export imports torch and onnx: not for `--help`
    from export.repository import Export

Runtime = Annotated[
    str | None, typer.Option(help="Ranker runtime, `torch` or `openvino`. Default: chosen for this machine.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Ranker precision: `float32`, `bfloat16`, or on a GPU `float16` or `float8`."
        " Default: chosen for this machine."
    ),
]
Forward = Annotated[
    str | None,
    typer.Option(
        help="Layers that PyTorch computes with: `packed` or `transformers`. Default: `packed` on a GPU, for models"
        " that it computes."
    ),
]
Batching = Annotated[
    str,
    typer.Option(
        help="Whether prompts that share a pass on a GPU may change each other's scores by rounding: `exact` (not by a"
        " bit) or `tolerant`."
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of one ranking pass. Default: all cores.")]
Device = Annotated[
    str, typer.Option(help="Device of the ranker: `auto` (a GPU if there is one), `cpu`, `gpu` or `gpu:N`.")
]
Index = Annotated[
    bool, typer.Option("--index", help="Search the items approximately, with faiss; for catalogues of millions.")
]
Instances = Annotated[int, typer.Option(help="Number of ranker processes, each with its own copy of the model.")]
Processes = Annotated[
    str | None,
    typer.Option(help="Number of processes of other steps, such as `features=2,retriever=2`. Default: one of each."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of requests that Triton hands to the ranker together. Default: as many as it ranks in"
        " 0.25 s, at most 512, when it batches."
    ),
]
QueueDelay = Annotated[
    int, typer.Option(help="Microseconds that a request waits at the ranker for others to form a batch.")
]
QueueSeconds = Annotated[
    float | None,
    typer.Option(help="Maximum wait for the ranker in seconds, after which a request is refused. Default: 8 passes."),
]
RetrieverRuntime = Annotated[
    str, typer.Option(help="`python`, or `onnxruntime` for Triton's own ONNX Runtime backend.")
]
Retrieve = Annotated[
    int | None, typer.Option(help="Number of candidates that the retriever hands to the ranker. Default: 20.")
]
PrefixCache = Annotated[
    int,
    typer.Option(help="Megabytes in which the ranker keeps the histories it computed last; for independent lines."),
]
RankCache = Annotated[int, typer.Option(help="Number of prompts whose answers the ranker caches.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="JSON file with the policy of requests that bring none: max_per_group, only_groups, never_groups, boosts,"
        " repeats.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(help="Address of the store of histories. `llamarec serve --store` or LLAMAREC_STORE override it."),
]


def export_options(
    runtime: Runtime = None,
    dtype: Dtype = None,
    forward: Forward = None,
    batching: Batching = "exact",
    threads: Threads = None,
    device: Device = "auto",
    index: Index = False,
    retrieve: Retrieve = None,
    policy: PolicyFile = None,
    instances: Instances = 1,
    processes: Processes = None,
    max_batch_size: BatchSize = None,
    queue_delay_us: QueueDelay = 0,
    queue_seconds: QueueSeconds = None,
    retriever_runtime: RetrieverRuntime = "python",
    rank_cache: RankCache = 0,
    prefix_cache: PrefixCache = 0,
    store: Store = None,
) -> "Export":
    """Build the export's options from the command line."""
    given = {**locals(), "backend": runtime}
    from export.config import Serving, parse_processes
    from export.repository import Export
    from serving.policy import NO_POLICY, read_policy_file

    given["policy"] = NO_POLICY if policy is None else read_policy_file(policy)
    given.pop("device")  # the ranker's place in the serving options follows from the runtime
    serving = from_given(Serving, {**given, "processes": None if processes is None else parse_processes(processes)})
    return from_given(Export, {**given, "device": device, "serving": serving})


def takes_export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, an ``Export``, by the options that make it."""
    shared = inspect.signature(export_options).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = export_options(**{name: given.pop(name) for name in shared})
        command(options, **given)

    run.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]  # functions have it, mypy does not know
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared.values())}
    return run
