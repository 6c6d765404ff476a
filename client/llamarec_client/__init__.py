"""The gRPC client of a LlamaRec server.

::

    from llamarec_client import RecommenderClient

    with RecommenderClient("127.0.0.1:8001") as client:
        for item in client.recommend(["50", "181"], top_k=5, fallback="retriever"):
            print(item.item_id, item.score)

Names, types and limits of the tensors are in :mod:`llamarec_client.contract`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamarec_client.canary import canary_model
    from llamarec_client.errors import (
        ClientError,
        InvalidRequest,
        Overloaded,
        RequestTimeout,
        ServerError,
        ServerUnavailable,
        StepDied,
    )
    from llamarec_client.messages import Recommendation, Recommendations, Request
    from llamarec_client.policy import Policy
    from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient, Tls
    from llamarec_client.similar import SimilarItem

__all__ = [
    "AsyncRecommenderClient",
    "ClientError",
    "InvalidRequest",
    "Overloaded",
    "Policy",
    "Recommendation",
    "Recommendations",
    "RecommenderClient",
    "Request",
    "RequestTimeout",
    "ServerError",
    "ServerUnavailable",
    "SimilarItem",
    "StepDied",
    "Tls",
    "canary_model",
]
_MODULES = ("canary", "errors", "messages", "policy", "recommender", "similar")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562).

    The server's steps import ``llamarec_client.contract``, which must not load gRPC.
    """
    if name in __all__:
        for module in _MODULES:
            if (value := getattr(import_module(f"{__name__}.{module}"), name, None)) is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
