"""The serving contract: names, types, shapes and limits of the ensembles' tensors.

The client, the Triton steps and the generator of the ``config.pbtxt`` files all read these definitions. The module
imports nothing but the standard library, so that each of them can.
"""

from typing import NamedTuple

ENSEMBLE = "llamarec"
"""features -> retriever -> prompt_builder -> ranker."""
RETRIEVAL_ENSEMBLE = "llamarec_retrieval"
"""features -> retriever: the same inputs and outputs, the answer to fall back on."""

MAX_HISTORY = 10_000
"""Maximum number of item ids in one HISTORY or EXCLUDE."""
MAX_ID_BYTES = 512
"""Maximum length of a raw item id, in bytes of UTF-8."""
MAX_CANDIDATES = 20
"""Maximum number of candidates the ranker orders in one pass: one index letter each (paper, section 3.3)."""

DEGRADED = "degraded"
"""Request parameter: why a client falls back on ``llamarec_retrieval``. The server counts the reasons."""
DEGRADED_REASONS = ("Overloaded", "ServerUnavailable", "RequestTimeout", "StepDied", "ServerError")
"""The reasons: names of the errors of :mod:`llamarec_client.errors` that the ranker's ensemble can end with."""


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
