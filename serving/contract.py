"""The steps of the ensembles: the tensors that pass between them, and the parameters in their configurations.

The tensors that a caller sees are in ``llamarec_client.contract``.
"""

from typing import NamedTuple

from llamarec_client.contract import (
    EVENTS,
    EVENTS_REQUEST,
    EVENTS_RESPONSE,
    ITEMS,
    ITEMS_REQUEST,
    ITEMS_RESPONSE,
    REQUEST,
    RESPONSE,
    SIMILAR_REQUEST,
    SIMILAR_RESPONSE,
    TensorSpec,
)

STEPS = ("features", "retriever", "prompt_builder", "ranker")
"""In the order of a request."""
NEIGHBOURS = "neighbours"
"""The only step of the ensemble ``similar``. Releases of earlier versions have neither."""
RELEASE_STEPS = (*STEPS, NEIGHBOURS)
"""All steps of a release."""
FILES_OF = {NEIGHBOURS: "retriever"}
"""Steps that have no exported files of their own, with the step whose files they read."""
STORE_MODELS = (EVENTS, ITEMS)
"""Models that change the store. They are no steps of an ensemble and no part of a release, but run and watched as steps
are."""

STAND_IN = "stand_in"
"""Group of instances that refuse every request, because their step's own processes are dead (`serving.server`)."""
PROBE = "llamarec-probe"
"""Request id of a health probe; its answers are not counted."""

SCORES_PARAMETER = "RETRIEVER_SCORES"
"""In the retriever's configuration: name of the Triton model that computes the scores instead of the step itself."""
RETRIEVER_SCORES = "retriever_scores"
"""Name of that model; `llamarec export --retriever-runtime onnxruntime` writes it."""
QUEUE_PARAMETER = "QUEUE_SECONDS"
"""In the configuration of prompt_builder and ranker: maximum time in seconds that a prompt may wait for the ranker."""
SIZE_PARAMETER = "QUEUE_SIZE"
"""In prompt_builder's configuration: maximum number of prompts that may wait for the ranker."""
CACHE_PARAMETER = "RANK_CACHE"
"""In the ranker's configuration: number of prompts whose answers are cached."""
PREFIX_CACHE_PARAMETER = "PREFIX_CACHE"
"""In the ranker's configuration: memory in MB for the keys and values of the prefixes used last."""

STORE_PARAMETER = "STORE"
"""In the configuration of features, events and items: address of the store of histories."""
STORE_VARIABLE = "LLAMAREC_STORE"
"""Environment variable with that address, which takes the place of the parameter; an address may hold a password."""

ANSWERS_VARIABLE = "LLAMAREC_ANSWERS"
"""Environment variable with the folder of the log of answers; without it nothing is logged."""
SAMPLE_VARIABLE = "LLAMAREC_ANSWERS_SAMPLE"
"""Environment variable with the share of the answers that are logged, from 0 to 1. Default: all."""

# Item numbers are the catalogue's: 1..N, 0 for none.
HISTORY_ITEM = TensorSpec("HISTORY_ITEM", "INT32", (-1,))
"""Known items of the history, oldest first."""
EXCLUDED_ITEM = TensorSpec("EXCLUDED_ITEM", "INT32", (-1,))
GIVEN_ITEM = TensorSpec("GIVEN_ITEM", "INT32", (-1,))
"""The caller's candidates, de-duplicated and without those of EXCLUDE; meaningless unless RETRIEVE is 0. A candidate
that is not in the catalogue, and has a title, has a negative number of its own."""
# Optional for the steps that take them: repositories that were exported before there were texts do not have them.
GIVEN_ID = TensorSpec("GIVEN_ID", "STRING", (-1,), optional=True)
"""The raw id of each GIVEN_ITEM; length 0 if the caller gave no titles of candidates."""
GIVEN_TEXT = TensorSpec("GIVEN_TEXT", "STRING", (-1,), optional=True)
"""The title of each GIVEN_ITEM by the caller, empty where it is the catalogue's; as long as GIVEN_ID."""
HISTORY_TEXT = TensorSpec("HISTORY_TEXT", "STRING", (-1,), optional=True)
"""The titles that the prompt lists as the history, oldest first; length 0 if they are those of HISTORY_ITEM."""
RETRIEVE = TensorSpec("RETRIEVE", "INT32", (1,))
"""1: take the retrieval stage's top candidates; 0: rank GIVEN_ITEM."""
LIMIT = TensorSpec("LIMIT", "INT32", (1,))
"""TOP_K after it was checked; 0: return all."""
USER = TensorSpec("USER", "STRING", (-1,), optional=True)
"""The caller's USER_ID, for the log of answers; length 0 if there is none. The steps that end an ensemble take it.
Optional there: repositories that were exported before there was a log of answers do not have it."""
RULES = TensorSpec("RULES", "STRING", (-1,), optional=True)
"""The checked policy as JSON (:mod:`serving.policy`); length 0 if there is none. Optional for the retriever:
repositories that were exported before there were policies do not have it."""
CANDIDATE_ITEM = TensorSpec("CANDIDATE_ITEM", "INT32", (-1,))
CANDIDATE_ID = TensorSpec("CANDIDATE_ID", "STRING", (-1,))
CANDIDATE_SCORE = TensorSpec("CANDIDATE_SCORE", "FP32", (-1,))
"""Log-probability by the retrieval stage, among the candidates; -inf for an item outside its vocabulary."""
CANDIDATE_RANK = TensorSpec("CANDIDATE_RANK", "INT32", (-1,))
"""Place in the retrieval stage's order, from 1; 0 for an item outside its vocabulary."""
CANDIDATE_TEXT = TensorSpec("CANDIDATE_TEXT", "STRING", (-1,), optional=True)
"""GIVEN_TEXT in the order of CANDIDATE_ITEM; length 0 if every title is the catalogue's."""
CANDIDATE_BOOST = TensorSpec("CANDIDATE_BOOST", "FP32", (-1,), optional=True)
"""What the policy adds to the log-probability of each CANDIDATE_ITEM in the answer, not yet part of CANDIDATE_SCORE;
length 0 if it is nothing for all of them. Optional for the ranker, as RULES is for the retriever."""
TOKEN = TensorSpec("TOKEN", "INT32", (-1,))
"""Token ids of one prompt, up to the place where the index letter follows."""
LINE_END = TensorSpec("LINE_END", "INT32", (-1,))
"""For each candidate the place in TOKEN of the token after its title; read by the verbalizer of lines."""
PREFIX = TensorSpec("PREFIX", "INT32", (1,))
"""Number of tokens in TOKEN before the first candidate's line if the lines are independent of each other, else 0.
Repositories that were exported before there were independent lines do not have it."""
QUEUED = TensorSpec("QUEUED", "INT64", (1,))
"""Time when the prompt joined the ranker's queue, in microseconds of this machine's monotonic clock; 0: no limit."""


class ModelSpec(NamedTuple):
    """Inputs and outputs of one Triton model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


STEP_SPECS = {
    "features": ModelSpec(
        REQUEST,
        (HISTORY_ITEM, EXCLUDED_ITEM, GIVEN_ITEM, RETRIEVE, LIMIT, USER, GIVEN_ID, GIVEN_TEXT, HISTORY_TEXT, RULES),
    ),
    # The retriever's response tensors serve `llamarec_retrieval`: an intermediate tensor must never be an ensemble's
    # output under the same name, or a request for a subset of the outputs deadlocks.
    "retriever": ModelSpec(
        (HISTORY_ITEM, EXCLUDED_ITEM, GIVEN_ITEM, RETRIEVE, LIMIT, USER, GIVEN_ID, GIVEN_TEXT, RULES),
        (CANDIDATE_ITEM, CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK, CANDIDATE_TEXT, CANDIDATE_BOOST, *RESPONSE),
    ),
    "prompt_builder": ModelSpec(
        (HISTORY_ITEM, CANDIDATE_ITEM, HISTORY_TEXT, CANDIDATE_TEXT), (TOKEN, LINE_END, PREFIX, QUEUED)
    ),
    "ranker": ModelSpec(
        (
            TOKEN,
            LINE_END,
            PREFIX,
            QUEUED,
            CANDIDATE_ID,
            CANDIDATE_SCORE,
            CANDIDATE_RANK,
            LIMIT,
            USER,
            CANDIDATE_BOOST,
        ),
        RESPONSE,
    ),
    NEIGHBOURS: ModelSpec(SIMILAR_REQUEST, SIMILAR_RESPONSE),
    EVENTS: ModelSpec(EVENTS_REQUEST, EVENTS_RESPONSE),
    ITEMS: ModelSpec(ITEMS_REQUEST, ITEMS_RESPONSE),
}

PACKED = {
    step: TensorSpec(f"{step.upper()}_PACKED", "UINT8", (-1,), optional=True) for step in STEPS if step != STEPS[-1]
}
"""For each step but the last, one tensor of all that it hands on (:mod:`serving.steps.packing`). The ensembles pass
these. Each step takes and returns the single tensors too, for health probes, for callers of a step alone, and in
repositories that were exported before there were packed tensors."""
HANDED_ON = {
    step: tuple(
        dict.fromkeys(
            made
            for earlier in STEPS[: place + 1]
            for made in STEP_SPECS[earlier].outputs
            if any(made in STEP_SPECS[later].inputs for later in STEPS[place + 1 :])
        )
    )
    for place, step in enumerate(STEPS[:-1])
}
"""The tensors that each step packs: those that later steps take, whether it made them or received them."""
HANDED_ON_BY_RETRIEVER = frozenset({CANDIDATE_ITEM.name, PACKED["retriever"].name})
"""Outputs of the retriever of which a request asks for one if its candidates go on to the next step."""


def packed_input(step: str) -> TensorSpec | None:
    """Return the packed tensor that brings the inputs of a step; None for the first one and for models beside them."""
    return PACKED[STEPS[STEPS.index(step) - 1]] if step in STEPS[1:] else None
