"""Jina's and Cohere's rerank APIs in front of the ranker.

The query is a user's history, one item in a line, oldest first; the documents are the candidates. Both are titles, or
both are item ids if the name of the model ends with ``/ids``. The model's name decides, because it is the only field
that all clients of these APIs let their callers choose.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from llamarec.gateway.errors import Refusal
from llamarec_client import Recommendations
from llamarec_client.contract import ENSEMBLE

IDS = "/ids"
"""Ending of a model's name that says that query and documents are item ids."""
MODELS = (ENSEMBLE, f"{ENSEMBLE}_canary")
MOST_DOCUMENTS = 200
"""Most candidates that any ranker orders (`models.ranker.prompt.MOST_CANDIDATES`); a server's own may order fewer."""
EXAMPLE: dict[str, JsonValue] = {
    "model": ENSEMBLE,
    "query": "Star Wars (1977)\nReturn of the Jedi (1983)",
    "documents": ["Empire Strikes Back, The (1980)", "Babe (1995)"],
    "top_n": 2,
}


class Document(BaseModel):
    """A document as an object; other fields are ignored."""

    text: str


class RerankBody(BaseModel):
    """A rerank request of either API. Fields that concern neither history nor candidates are ignored."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [EXAMPLE]})

    query: str = Field(description="The history, one title in a line, oldest first; or ids.")
    documents: Annotated[list[str | Document], Field(min_length=1)] = Field(description="The candidates.")
    model: str = Field(ENSEMBLE, description=f"`{ENSEMBLE}` for titles, `{ENSEMBLE}{IDS}` for item ids.")
    top_n: int | None = Field(None, ge=1, description="Number of results. Default: all documents.")
    return_documents: bool | None = Field(None, description="Default: true, as at Jina. Only of `/v1/rerank`.")

    def texts(self) -> list[str]:
        """Return the documents as strings."""
        return [each if isinstance(each, str) else each.text for each in self.documents]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the client's ``recommend``.

        Raises:
            Refusal: there is no such model, or there are more documents than any ranker orders.
        """
        name, by_ids = self.model.removesuffix(IDS), self.model.endswith(IDS)
        if name not in MODELS:
            raise Refusal(
                400,
                "invalid_request",
                f"there is no model {self.model[:100]!r}: give {ENSEMBLE!r} if query and documents are titles, or"
                f" '{ENSEMBLE}{IDS}' if they are item ids",
            )
        if len(self.documents) > MOST_DOCUMENTS:
            raise Refusal(
                400,
                "invalid_request",
                f"documents holds {len(self.documents):,}: a ranker orders at most 20 of them, or {MOST_DOCUMENTS} if"
                " it reads independent lines: send the best of an earlier stage",
            )
        history = [line for line in (part.removesuffix("\r") for part in self.query.split("\n")) if line.strip()]
        texts = self.texts()
        if by_ids:
            return {"model": name, "history": history, "candidates": list(dict.fromkeys(texts))}
        read = {"history_titles": history} if history else {"history": []}
        return {"model": name, **read, "candidate_titles": texts}

    def scores(self, ranked: Recommendations) -> list[tuple[int, float]]:
        """Return place and score of the best documents, best first; equal ids have equal scores.

        Raises:
            Refusal: the server ranked something else than these documents.
        """
        texts = self.texts()
        keys: Sequence[str] = texts if self.model.endswith(IDS) else [str(place) for place in range(len(texts))]
        score_of = {row.item_id: row.score for row in ranked}
        if not set(score_of) <= set(keys):
            raise Refusal(
                502, "server_error", "the server ranked other candidates than the documents: check its version"
            )
        order = {row.item_id: rank for rank, row in enumerate(ranked)}
        places = [place for place, key in enumerate(keys) if key in score_of]
        places.sort(key=lambda place: order[keys[place]])
        return [(place, score_of[keys[place]]) for place in places][: self.top_n]


class Usage(BaseModel):
    """What a request used; the gateway counts no tokens."""

    total_tokens: int = 0
    prompt_tokens: int = 0


class Version(BaseModel):
    """Version of the API."""

    version: str


class Meta(BaseModel):
    """Facts about an answer, in Cohere's shape."""

    api_version: Version


class Ranked(BaseModel):
    """A document with its score."""

    index: int = Field(examples=[1], description="Place among the documents, from 0.")
    relevance_score: float = Field(examples=[0.83], description="Probability among the documents.")


class RankedDocument(Ranked):
    """A document with its score and, unless ``return_documents`` is false, its text."""

    document: Document | None = None


class RerankAnswer(BaseModel):
    """Ranked documents, best first: Jina's shape, and that of Cohere's version 1."""

    id: str = Field(examples=["3f1c0d9a"])
    model: str = Field(examples=[ENSEMBLE])
    usage: Usage = Usage()
    results: list[RankedDocument]
    meta: Meta = Meta(api_version=Version(version="1"))


class RerankAnswer2(BaseModel):
    """Ranked documents, best first: the shape of Cohere's version 2."""

    id: str = Field(examples=["3f1c0d9a"])
    results: list[Ranked]
    meta: Meta = Meta(api_version=Version(version="2"))


def answer_1(body: RerankBody, ranked: Recommendations) -> RerankAnswer:
    """Return the answer of ``/v1/rerank``."""
    texts = body.texts() if body.return_documents is not False else None
    results = [
        RankedDocument(index=place, relevance_score=score, document=Document(text=texts[place]) if texts else None)
        for place, score in body.scores(ranked)
    ]
    return RerankAnswer(id=ranked.request_id, model=body.model, results=results)


def answer_2(body: RerankBody, ranked: Recommendations) -> RerankAnswer2:
    """Return the answer of ``/v2/rerank``."""
    results = [Ranked(index=place, relevance_score=score) for place, score in body.scores(ranked)]
    return RerankAnswer2(id=ranked.request_id, results=results)
