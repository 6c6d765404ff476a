"""Every file of `examples/`, run against the real server with the command in its first lines."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llamarec_client.recommender import RecommenderClient
from serving.server.programs import free_ports

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def expected(server):
    """Return the items that the project's client receives."""
    with RecommenderClient(server.url) as client:
        return [row.item_id for row in client.recommend(["50", "181"])]


def run(*command: object) -> str:
    ended = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_plain_tritonclient(server, expected):
    """The example prints the items of the project's client in the same order."""
    printed = run(sys.executable, EXAMPLES / "plain_tritonclient.py", server.url, "50", "181")
    assert [line.split()[0] for line in printed.splitlines()] == expected


@pytest.mark.skipif(
    not shutil.which("grpcurl", path=ENVIRONMENT["PATH"]), reason="grpcurl is not installed (`make setup` does)"
)
def test_grpcurl(server, expected):
    """The raw answer holds the items of the project's client in base64, each preceded by its length in four bytes."""
    answer = json.loads(run("bash", EXAMPLES / "grpcurl.sh", server.url, "50", "181"))
    place = [output["name"] for output in answer["outputs"]].index("ITEM_ID")
    content, items = base64.b64decode(answer["raw_output_contents"][place]), []
    while content:
        size = int.from_bytes(content[:4], "little")
        items.append(content[4 : 4 + size].decode())
        content = content[4 + size :]
    assert items == expected


def test_fastapi_service(server, expected):
    """The service returns the ten best items as JSON; a bad request returns status 400 with the server's message."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", str(port), "fastapi_service:app"]
    service = subprocess.Popen(command, env={**ENVIRONMENT, "LLAMAREC": server.url}, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/recommendations?item=50&item=181"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(address, timeout=30) as response:
                    answer = json.load(response)
                break
            except urllib.error.URLError:
                assert time.monotonic() < end
                time.sleep(0.2)
        assert answer == {"degraded": False, "items": expected[:10]}
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(f"{address}&top_k=21")
        assert "TOP_K is 21" in json.load(refused.value)["detail"]
    finally:
        service.terminate()
        service.wait(20)
