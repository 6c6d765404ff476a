"""Bodies of the gateway's own endpoints, with the examples that its OpenAPI description shows."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llamarec_client import Policy
from llamarec_client.contract import (
    ENSEMBLE,
    MAX_EVENTS,
    MAX_HISTORY,
    MAX_POLICY_ENTRIES,
    MAX_POLICY_NUMBER,
    RETRIEVAL_ENSEMBLE,
)

Ensemble = Literal["llamarec", "llamarec_retrieval", "llamarec_canary", "llamarec_retrieval_canary"]
"""Models that a caller may name: the contract's ensembles, and their canaries (`llamarec_client.canary`)."""
Texts = Annotated[list[str], Field(max_length=MAX_HISTORY)]
Names = Annotated[list[str], Field(max_length=MAX_POLICY_ENTRIES)]


class Body(BaseModel):
    """A request's body; a field that is not known is an error, because it may be a misspelt one."""

    model_config = ConfigDict(strict=True, extra="forbid")


class PolicyBody(Body):
    """Rules about what may be recommended. A field that is null is off; one that is absent is that of the release.

    The fields about groups and `repeats` are for requests without candidates.
    """

    max_per_group: Annotated[int, Field(ge=1, le=MAX_POLICY_NUMBER)] | None = Field(
        None, description="Maximum number of items of one group.", examples=[2]
    )
    only_groups: Names | None = Field(None, description="Groups of which all items are.", examples=[["Comedy"]])
    never_groups: Names | None = Field(None, description="Groups of which no item is.", examples=[["Horror"]])
    boosts: Annotated[dict[str, float], Field(max_length=MAX_POLICY_ENTRIES)] | None = Field(
        None, description="Factor of the odds of items by their raw ids, above 0.", examples=[{"181": 2.0}]
    )
    repeats: Literal["none", "all"] | Annotated[int, Field(ge=1, le=MAX_POLICY_NUMBER)] | None = Field(
        None, description="Items of the history that may come again: with N, those that are not among the last N."
    )

    def policy(self) -> Policy:
        """Return the fields that the body has, also those that are null."""
        return Policy(**self.model_dump(exclude_unset=True))


class RecommendBody(Body):
    """A request for recommendations. Either a history, or a user whose history the servers' store has."""

    history: Texts | None = Field(None, description="Raw item ids, oldest first.", examples=[["50", "181"]])
    history_titles: Texts | None = Field(None, description="A title for each item of the history; or titles alone.")
    user_id: str | None = Field(None, description="User id, for the logs, and for the history if none is given.")
    exclude: Texts | None = Field(None, description="Raw item ids that must not be returned.")
    candidates: Texts | None = Field(None, description="Raw item ids to rank instead of retrieving.")
    candidate_titles: Texts | None = Field(None, description="A title for each candidate; or titles alone.")
    top_k: int | None = Field(None, ge=1, le=2**31 - 1, description="Number of items. Default: all.", examples=[5])
    policy: PolicyBody | None = Field(None, description="Rules about groups, boosts and repeats.")
    fallback: Literal["retriever"] | None = Field(
        None, description="What answers when the ranker is full, dead or too slow.", examples=["retriever"]
    )
    model: Ensemble = Field("llamarec", description=f"`{ENSEMBLE}`, or `{RETRIEVAL_ENSEMBLE}` without the ranker.")


class Item(BaseModel):
    """One recommended item."""

    item_id: str = Field(examples=["172"])
    score: float = Field(examples=[0.19], description="Probability among the candidates.")
    retriever_rank: int = Field(examples=[1], description="Place in the retriever's order, from 1; 0 if it has none.")


class RecommendAnswer(BaseModel):
    """Recommended items, best first."""

    items: list[Item]
    model: str = Field(examples=["llamarec"], description="The model that answered.")
    degraded: bool = Field(examples=[False], description="Whether the fallback answered.")
    request_id: str = Field(examples=["3f1c0d9a"])


class EventsBody(Body):
    """What a user did."""

    user_id: str = Field(examples=["17"])
    item_ids: Annotated[list[str], Field(max_length=MAX_EVENTS)] = Field(examples=[["50", "181"]])
    timestamps: list[int] | None = Field(None, description="Milliseconds since 1970, UTC. Default: now.")
    kinds: list[str] | None = Field(None, description="What was done with each item. Default: `view`.")


class EventsAnswer(BaseModel):
    """What became of the events."""

    new: int = Field(examples=[2], description="How many of the events the store did not have.")
    request_id: str = Field(examples=["3f1c0d9a"])


class SimilarBody(Body):
    """A request for the items that are nearest to one."""

    item_id: str = Field(examples=["50"])
    top_k: int = Field(10, ge=1, le=2**31 - 1)


class Neighbour(BaseModel):
    """An item near another one."""

    item_id: str = Field(examples=["181"])
    score: float = Field(examples=[0.71])
    transitions: float = Field(examples=[0.64], description="What the transitions between items say.")
    titles: float = Field(examples=[0.83], description="What the likeness of the titles says.")


class SimilarAnswer(BaseModel):
    """Neighbours of an item, nearest first."""

    items: list[Neighbour]
    request_id: str = Field(examples=["3f1c0d9a"])
