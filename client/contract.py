"""The serving contract: names, types, shapes and limits of the ensembles' tensors.

Everything that encodes or decodes a request reads these: the client, the Triton steps and the generator of the
``config.pbtxt`` files. No imports beyond the standard library, so that any of them can.
"""

from typing import NamedTuple

ENSEMBLE = "llamarec"
"""features -> retriever -> prompt_builder -> ranker."""
RETRIEVAL_ENSEMBLE = "llamarec_retrieval"
"""features -> retriever: the same inputs and outputs, the answer to fall back on."""
STEPS = ("features", "retriever", "prompt_builder", "ranker")

MAX_HISTORY = 10_000
"""Most item ids in one HISTORY or EXCLUDE."""
MAX_ID_BYTES = 512
"""Longest raw item id, in bytes of UTF-8."""
MAX_CANDIDATES = 20
"""Most candidates the ranker orders in one pass: one index letter each (paper, section 3.3)."""

DEGRADED = "degraded"
"""Request parameter of a client that falls back on ``llamarec_retrieval``: says why, and is counted by the server."""
DEGRADED_REASONS = ("Overloaded", "ServerUnavailable", "RequestTimeout", "StepDied", "ServerError")
"""What it may say: the error of :mod:`client.errors` that the ranker's ensemble ended with."""

PROBE = "llamarec-probe"
"""Request id of whoever only asks whether a step lives; such requests are not counted."""


class TensorSpec(NamedTuple):
    """One tensor of a model, without the leading batch dimension."""

    name: str
    data_type: str
    """Triton's name of the type: ``STRING``, ``INT32``, ``INT64`` or ``FP32``."""
    shape: tuple[int, ...]
    """-1 where the length varies from request to request."""
    optional: bool = False


HISTORY = TensorSpec("HISTORY", "STRING", (-1,))
EXCLUDE = TensorSpec("EXCLUDE", "STRING", (-1,), optional=True)
CANDIDATES = TensorSpec("CANDIDATES", "STRING", (-1,), optional=True)
TOP_K = TensorSpec("TOP_K", "INT32", (1,), optional=True)
USER_ID = TensorSpec("USER_ID", "STRING", (1,), optional=True)
REQUEST = (HISTORY, EXCLUDE, CANDIDATES, TOP_K, USER_ID)

ITEM_ID = TensorSpec("ITEM_ID", "STRING", (-1,))
SCORE = TensorSpec("SCORE", "FP32", (-1,))
RETRIEVER_RANK = TensorSpec("RETRIEVER_RANK", "INT32", (-1,))
RESPONSE = (ITEM_ID, SCORE, RETRIEVER_RANK)

# Between the steps. Item numbers are the catalogue's: 1..N, 0 for none.
HISTORY_ITEM = TensorSpec("HISTORY_ITEM", "INT32", (-1,))
"""Known items of the history, oldest first."""
EXCLUDED_ITEM = TensorSpec("EXCLUDED_ITEM", "INT32", (-1,))
GIVEN_ITEM = TensorSpec("GIVEN_ITEM", "INT32", (-1,))
"""The caller's candidates, de-duplicated, EXCLUDE applied; meaningless unless RETRIEVE is 0."""
RETRIEVE = TensorSpec("RETRIEVE", "INT32", (1,))
"""1: take the retriever's top candidates; 0: rank GIVEN_ITEM."""
LIMIT = TensorSpec("LIMIT", "INT32", (1,))
"""TOP_K after its check; 0: return all."""
CANDIDATE_ITEM = TensorSpec("CANDIDATE_ITEM", "INT32", (-1,))
CANDIDATE_ID = TensorSpec("CANDIDATE_ID", "STRING", (-1,))
CANDIDATE_SCORE = TensorSpec("CANDIDATE_SCORE", "FP32", (-1,))
"""The retriever's logit; -inf for an item the retriever does not know."""
CANDIDATE_RANK = TensorSpec("CANDIDATE_RANK", "INT32", (-1,))
TOKEN = TensorSpec("TOKEN", "INT32", (-1,))
"""Token ids of one prompt, ending where the index letter is to follow."""
LINE_END = TensorSpec("LINE_END", "INT32", (-1,))
"""Place in TOKEN of the token behind each candidate's title, where a ranker reads that reads the candidates' lines."""
QUEUED = TensorSpec("QUEUED", "INT64", (1,))
"""When the prompt joined the ranker's queue: microseconds of this machine's monotonic clock; 0: wait for ever."""


class ModelSpec(NamedTuple):
    """What one Triton model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


STEP_SPECS = {
    "features": ModelSpec(REQUEST, (HISTORY_ITEM, EXCLUDED_ITEM, GIVEN_ITEM, RETRIEVE, LIMIT)),
    # The response tensors of the retriever serve `llamarec_retrieval`: an intermediate tensor must never be an
    # ensemble's output under the same name, or a request for a subset of the outputs deadlocks.
    "retriever": ModelSpec(
        (HISTORY_ITEM, EXCLUDED_ITEM, GIVEN_ITEM, RETRIEVE, LIMIT),
        (CANDIDATE_ITEM, CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK, *RESPONSE),
    ),
    "prompt_builder": ModelSpec((HISTORY_ITEM, CANDIDATE_ITEM), (TOKEN, LINE_END, QUEUED)),
    "ranker": ModelSpec((TOKEN, LINE_END, QUEUED, CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK, LIMIT), RESPONSE),
}
