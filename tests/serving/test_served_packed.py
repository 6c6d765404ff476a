"""A ranker in the packed forward on the real tritonserver: requests that share passes, and their offline answers."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc

from export.config import Serving
from export.repository import Export, export
from llamarec_client.errors import InvalidRequest
from llamarec_client.recommender import AsyncRecommenderClient, Recommendation
from models.ranker.inference.ranker import read_runtime
from serving.layout import step_artifact
from serving.offline import ExportedSteps
from serving.server.local import LocalServer

USERS = 24


def histories(steps: ExportedSteps) -> list[list[str]]:
    """Return histories of 1 to 5 items."""
    draw = np.random.default_rng(0)
    return [
        [steps.catalogue.raw(int(item)).decode() for item in draw.integers(1, steps.catalogue.trained, 1 + user % 5)]
        for user in range(USERS)
    ]


async def asked(url: str, given: list[list[str]]) -> list[list[Recommendation] | BaseException]:
    """Return the answers to requests that are all sent at once, one of which is refused."""
    async with AsyncRecommenderClient(url) as client:
        refused = client.recommend(given[0], candidates=["no such item"])
        return await asyncio.gather(refused, *map(client.recommend, given), return_exceptions=True)


@pytest.mark.thorough
def test_requests_that_share_passes_get_their_offline_answers(artifacts: Path, tmp_path: Path):
    """Bit for bit, and Triton did hand the ranker several at once: it was called less often than it was asked."""
    serving = Serving(queue_delay_us=50_000, queue_seconds=60)
    export(Export(threads=1, forward="packed", dtype="float32", serving=serving), artifacts, tmp_path)
    assert read_runtime(step_artifact(tmp_path, "ranker")).forward == "packed"
    steps = ExportedSteps.load(tmp_path)
    given = histories(steps)
    with LocalServer(tmp_path) as server:
        refused, *answers = asyncio.run(asked(server.url, given))
        counted = grpc.InferenceServerClient(server.url).get_inference_statistics("ranker").model_stats[0]
    assert isinstance(refused, InvalidRequest)
    assert answers == [[Recommendation(*row) for row in steps.recommend(history)] for history in given]
    assert counted.inference_count == USERS
    assert counted.execution_count < USERS
