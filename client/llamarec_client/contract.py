"""The serving contract: names, types, shapes and limits of the ensembles' tensors.

The client, the Triton steps and the generator of the ``config.pbtxt`` files all import this module, so it imports only
the standard library.
"""

from typing import NamedTuple

ENSEMBLE = "llamarec"
"""features -> retriever -> prompt_builder -> ranker."""
RETRIEVAL_ENSEMBLE = "llamarec_retrieval"
"""features -> retriever: the fallback, with the same inputs and outputs."""

SIMILAR = "similar"
"""Ensemble of one step that returns the items nearest to an item."""

EVENTS = "events"
"""Model that records what users did, beside the releases, on a server with a store."""
ITEMS = "items"
"""Model that adds, hides and shows items, beside the releases, on a server with a store. It needs the admin key."""

MAX_HISTORY = 10_000
"""Maximum number of item ids in one HISTORY or EXCLUDE."""
MAX_ID_BYTES = 512
"""Maximum length of a raw item id, in bytes of UTF-8."""
MAX_CANDIDATES = 20
"""Number of candidates that are retrieved and ranked by default, one index letter each (paper, section 3.3). The
maximum is the ranker's own: a request with more candidates is refused."""

SIMILAR_ITEMS = 10
"""Number of items that ``similar`` returns by default."""
MAX_SIMILAR = 1_000
"""Maximum TOP_K of ``similar``."""

MAX_EVENTS = 10_000
"""Maximum number of events in one request to ``events``."""
MAX_KIND_BYTES = 64
"""Maximum length of the kind of an event, in bytes of UTF-8."""
CLOCK_TOLERANCE_MS = 60_000
"""Milliseconds by which a TIMESTAMP may be ahead of the server's clock."""

ADD, HIDE, SHOW = "add", "hide", "show"
"""What ``items`` does: gives items a title, leaves items out of all answers, or ends that."""
MAX_ITEMS = 10_000
"""Maximum number of items in one request to ``items``."""
MAX_TITLE_BYTES = 4_096
"""Maximum length of a title, in bytes of UTF-8."""

MAX_POLICY_BYTES = 65_536
"""Maximum length of a POLICY, in bytes of UTF-8."""
MAX_POLICY_ENTRIES = 1_000
"""Maximum number of groups, and of boosts, in a POLICY."""
MAX_POLICY_NUMBER = 10_000
"""Maximum of the numbers in a POLICY that count items."""
POLICY_FIELDS = ("max_per_group", "only_groups", "never_groups", "boosts", "repeats")
"""Fields of the JSON object that a POLICY is."""
REPEATS = ("none", "all")
"""Values of ``repeats``, besides a number."""

DEGRADED = "degraded"
"""Request parameter with the reason for a fallback to ``llamarec_retrieval``. The server counts the reasons."""
DEGRADED_REASONS = ("Overloaded", "ServerUnavailable", "RequestTimeout", "StepDied", "ServerError")
"""Values of ``degraded``: names of the errors of :mod:`llamarec_client.errors` that cause a fallback."""


class TensorSpec(NamedTuple):
    """One tensor of a model, without the leading batch dimension."""

    name: str
    data_type: str
    """Triton's name for the type: ``STRING``, ``INT32``, ``INT64`` or ``FP32``."""
    shape: tuple[int, ...]
    """Dimensions; -1 for a length that varies between requests."""
    optional: bool = False


HISTORY = TensorSpec("HISTORY", "STRING", (-1,), optional=True)
"""Optional where the server has a store and USER_ID is given; its length may be 0."""
EXCLUDE = TensorSpec("EXCLUDE", "STRING", (-1,), optional=True)
CANDIDATES = TensorSpec("CANDIDATES", "STRING", (-1,), optional=True)
HISTORY_TITLE = TensorSpec("HISTORY_TITLE", "STRING", (-1,), optional=True)
"""For each HISTORY its title, which the language model reads; empty: the catalogue's. Alone, it is the history."""
CANDIDATE_TITLE = TensorSpec("CANDIDATE_TITLE", "STRING", (-1,), optional=True)
"""For each of CANDIDATES its title, which the language model reads; empty: the catalogue's. Alone, these texts are the
candidates, and ITEM_ID is the place of each from 0."""
TOP_K = TensorSpec("TOP_K", "INT32", (1,), optional=True)
USER_ID = TensorSpec("USER_ID", "STRING", (1,), optional=True)
POLICY = TensorSpec("POLICY", "STRING", (1,), optional=True)
"""A JSON object with some of :data:`POLICY_FIELDS`, which take the place of those of the release's own policy."""
REQUEST = (HISTORY, EXCLUDE, CANDIDATES, TOP_K, USER_ID, HISTORY_TITLE, CANDIDATE_TITLE, POLICY)

ITEM_ID = TensorSpec("ITEM_ID", "STRING", (-1,))
SCORE = TensorSpec("SCORE", "FP32", (-1,))
RETRIEVER_RANK = TensorSpec("RETRIEVER_RANK", "INT32", (-1,))
RESPONSE = (ITEM_ID, SCORE, RETRIEVER_RANK)

ITEM = TensorSpec("ITEM", "STRING", (1,))
"""Raw id of the item whose neighbours are asked for. Not ITEM_ID: no input of an ensemble can be one of its outputs."""
SIMILAR_REQUEST = (ITEM, TOP_K)
"""Without TOP_K, ``similar`` returns 10 items."""
TRANSITIONS = TensorSpec("TRANSITIONS", "FP32", (-1,))
"""For each ITEM_ID log(1 + the number of times that it followed ITEM in the training sequences, near ones counting
more)."""
TITLES = TensorSpec("TITLES", "FP32", (-1,))
"""For each ITEM_ID the cosine similarity of its title's words to those of ITEM's title."""
SIMILAR_RESPONSE = (ITEM_ID, SCORE, TRANSITIONS, TITLES)
"""Nearest first. SCORE: the weighted sum of TRANSITIONS and TITLES."""

EVENT_USER = TensorSpec("USER_ID", "STRING", (1,))
TIMESTAMP = TensorSpec("TIMESTAMP", "INT64", (-1,), optional=True)
"""Milliseconds since 1970, UTC, for each ITEM_ID. Default: the times of arrival."""
KIND = TensorSpec("KIND", "STRING", (-1,), optional=True)
"""What was done with each ITEM_ID. Default: ``view``."""
EVENTS_REQUEST = (EVENT_USER, ITEM_ID, TIMESTAMP, KIND)

NEW = TensorSpec("NEW", "INT32", (1,))
"""Number of the events that the store did not have."""
EVENTS_RESPONSE = (NEW,)

ACTION = TensorSpec("ACTION", "STRING", (1,))
"""``add``, ``hide`` or ``show``."""
TITLE = TensorSpec("TITLE", "STRING", (-1,), optional=True)
"""For each ITEM_ID its title, if the action is ``add``; the others take none."""
KEY = TensorSpec("KEY", "STRING", (1,))
"""The server's admin key."""
ITEMS_REQUEST = (ACTION, ITEM_ID, TITLE, KEY)

CHANGED = TensorSpec("CHANGED", "INT32", (1,))
"""Number of the items that the request changed; those that were already so are not counted."""
ITEMS_RESPONSE = (CHANGED,)
