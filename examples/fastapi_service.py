"""A web service in front of the recommender: one connection for all requests, a deadline and a fallback.

LLAMAREC=127.0.0.1:8001 uvicorn --app-dir examples fastapi_service:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from llamarec_client import AsyncRecommenderClient, ClientError, InvalidRequest


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    """Keep one connection open for the lifetime of the service."""
    async with AsyncRecommenderClient(os.environ.get("LLAMAREC", "127.0.0.1:8001")) as client:
        app.state.recommender = client
        yield


app = FastAPI(lifespan=connected)


@app.get("/recommendations")
async def recommendations(request: Request, top_k: int = 10) -> dict[str, Any]:
    """Return the best items for `/recommendations?item=50&item=181`, from the retriever if the ranker is too slow."""
    history = request.query_params.getlist("item")
    try:
        answer = await request.app.state.recommender.recommend(
            history, top_k=top_k, timeout=10, fallback="retriever", request_id=request.headers.get("x-request-id")
        )
    except InvalidRequest as error:
        raise HTTPException(400, str(error)) from None
    except ClientError as error:
        raise HTTPException(503, str(error)) from None
    return {"degraded": answer.degraded, "items": [row.item_id for row in answer]}
