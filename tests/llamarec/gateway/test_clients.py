"""Rerankers of LangChain, LlamaIndex and Cohere's SDK, in an environment of their own, against the gateway.

LangChain's JinaRerank is not among them: it posts to a constant of its module (`JINA_API_URL`), not to a setting.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from environments import fresh_environment
from gateways import FakeClient, listening_gateway

from llamarec.gateway.keys import ApiKeys
from serving.admin_key import digest

PACKAGES = [
    "cohere==5.21.1",
    "langchain-cohere==0.6.0",
    "llama-index-postprocessor-cohere-rerank==0.10.0",
    "llama-index-postprocessor-jinaai-rerank==0.6.0",
]
KEY = "key-of-the-test-123"
QUERY = "Star Wars (1977)\nReturn of the Jedi (1983)"
DOCUMENTS = ["Babe (1995)", "Contact (1997)", "Empire Strikes Back, The (1980)"]
BEST = [[2, 1 / 2], [1, 1 / 3]]
"""Places and scores of the two best documents: the fake reverses them, and gives the one at rank r 1 / (r + 1)."""
COMMON = """
import json, sys
url, key, query, documents = json.loads(sys.argv[1])
"""
LANGCHAIN = """
from langchain_cohere import CohereRerank
reranker = CohereRerank(base_url=url, cohere_api_key=key, model="llamarec", top_n=2)
found = [[each["index"], each["relevance_score"]] for each in reranker.rerank(documents, query)]
"""
LLAMA_INDEX = """
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
ranked = reranker.postprocess_nodes(nodes, QueryBundle(query))
found = [[documents.index(each.node.get_content()), each.score] for each in ranked]
"""
PROGRAMS = {
    "cohere, version 2": """
import cohere
answer = cohere.ClientV2(key, base_url=url).rerank(model="llamarec", query=query, documents=documents, top_n=2)
found = [[each.index, each.relevance_score] for each in answer.results]
""",
    "cohere, version 1": """
import cohere
answer = cohere.Client(key, base_url=url).rerank(
    model="llamarec", query=query, documents=[{"text": text} for text in documents], top_n=2, return_documents=True
)
assert [each.document.text for each in answer.results] == [documents[each.index] for each in answer.results]
found = [[each.index, each.relevance_score] for each in answer.results]
""",
    "LangChain's CohereRerank": LANGCHAIN,
    "LlamaIndex's JinaRerank": """
from llama_index.postprocessor.jinaai_rerank import JinaRerank
reranker = JinaRerank(base_url=url + "/v1", api_key=key, model="llamarec", top_n=2)
"""
    + LLAMA_INDEX,
    "LlamaIndex's CohereRerank": """
from llama_index.postprocessor.cohere_rerank import CohereRerank
reranker = CohereRerank(base_url=url, api_key=key, model="llamarec", top_n=2)
"""
    + LLAMA_INDEX,
}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory) -> Path:
    """Return the interpreter of a fresh environment with these packages, which could not share the project's."""
    return fresh_environment(tmp_path_factory.mktemp("environment"), PACKAGES)


@pytest.fixture(scope="module")
def running():
    client = FakeClient()
    with listening_gateway(client, ApiKeys([digest(KEY.encode())])) as url:
        yield client, url


@pytest.mark.thorough
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_reranker_ranks_with_the_gateway(interpreter, running, program):
    """It sends the query's lines as the history, and returns place and score of the two best documents."""
    client, url = running
    client.calls.clear()
    given = json.dumps([url, KEY, QUERY, DOCUMENTS])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [str(interpreter), "-c", COMMON + program + "print(json.dumps(found))", given],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == [pytest.approx(each) for each in BEST]
    ((_, arguments),) = client.calls
    assert arguments["history_titles"] == QUERY.split("\n")
    assert arguments["candidate_titles"] == DOCUMENTS
