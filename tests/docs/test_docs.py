"""The documentation's code blocks run or state what they need, and the command reference equals the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from gateways import FakeClient, listening_gateway
from supervised import ask, serving, wait_for

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
"""Pages with code blocks to run. Those of `results/` are left out, since their commands take minutes to hours."""
NOT_RUN = re.compile(r"^# not run here: needs .+")
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def runs(self) -> bool:
        return not NOT_RUN.match(self.text)


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page that contain code, without output and drawings (`text`, `console`, none)."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(path.name, text[: match.start()].count("\n") + 1, match[1], match[2])
        for match in found
        if match[1] not in ("text", "console")
    ]


ALL = [block for page in PAGES for block in blocks(page)]
TUTORIAL = [block for block in ALL if block.page == "tutorial.md"]
EVENTS = [block for block in ALL if block.page == "events.md" and block.runs]
GATEWAY = [block for block in ALL if block.page == "gateway.md" and block.runs]
REFRESH = [block for block in ALL if block.page == "refresh.md" and block.runs]
IN_ORDER = ("tutorial.md", "events.md", "gateway.md", "refresh.md")
SINGLE = [block for block in ALL if block.page not in IN_ORDER and block.runs]


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_what_is_not_run_is_known():
    """The list below names every block that is not run, so that a new one has to be added on purpose.

    TLS, changes of items, several servers, benchmarks and the soak run have separate tests.
    """
    assert [(block.page, block.language) for block in ALL if not block.runs] == [
        ("bases.md", "bash"),
        ("benchmarking.md", "bash"),
        ("benchmarking.md", "bash"),
        ("benchmarking.md", "yaml"),
        ("benchmarking.md", "python"),
        ("client.md", "python"),
        ("client.md", "python"),
        ("client.md", "python"),
        ("events.md", "bash"),
        ("events.md", "bash"),
        ("faq.md", "bash"),
        ("feedback.md", "bash"),
        ("feedback.md", "bash"),
        ("gateway.md", "bash"),
        ("gateway.md", "python"),
        ("gateway.md", "bash"),
        ("gpu.md", "bash"),
        ("gpu.md", "bash"),
        ("gpu.md", "bash"),
        ("policy.md", "bash"),
        ("refresh.md", "bash"),
        ("refresh.md", "ini"),
        ("refresh.md", "ini"),
        ("robustness.md", "bash"),
        ("robustness.md", "bash"),
        ("serving.md", "bash"),
        ("serving.md", "bash"),
        ("serving.md", "bash"),
        ("serving.md", "bash"),
        ("stages.md", "bash"),
        ("stages.md", "bash"),
    ]


@pytest.mark.parametrize("block", SINGLE, ids=name)
def test_a_block_runs(block, server):
    """Each Python block outside the tutorial runs on its own against the real server."""
    assert block.language == "python", "a shell block outside the tutorial must say what it needs"
    code = block.text.replace("127.0.0.1:8001", server.url)
    exec(compile(code, name(block), "exec"), {"__name__": "__main__"})


def shell(text: str, folder: Path) -> str:
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def succeeds(text: str, folder: Path) -> bool:
    try:
        shell(text, folder)
    except AssertionError:
        return False
    return True


@pytest.mark.slow
def test_the_tutorial_ends_with_a_recommendation(tmp_path):
    """The tutorial's blocks run in order in one folder; only the block of the server runs in the background.

    In its data, shoppers buy articles in numerical order, so the expected recommendations are those that follow the
    history.
    """
    *before, serve, ask = TUTORIAL
    for block in before:
        if block.language == "python":
            subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, check=True)
        else:
            shell(block.text, tmp_path)
    assert serve.text.strip() == "llamarec serve --repository served"
    with serving(tmp_path / "served", tmp_path / "log") as served:
        printed = shell(ask.text.replace("127.0.0.1:8001", served.url), tmp_path)
    recommended = re.findall(r"sku-(\d+)", printed)
    assert len(recommended) == 5
    assert {"6", "7"} & set(recommended)


@pytest.mark.thorough
def test_the_page_of_events_leads_from_an_empty_store_to_an_answer(repository, tmp_path):
    """The blocks run in order on one empty store, the block of the server in the background. Ann's three events are
    shown in the order of their times; after the last command she has none. The items are added and hidden after that.
    """
    serve, *others = EVENTS
    assert serve.text.strip() == "llamarec serve --store sqlite:///histories.sqlite"
    store = f"sqlite:///{tmp_path}/histories.sqlite"
    with serving(repository, tmp_path / "log", f"--store={store}") as served:
        outputs = []
        for block in others:
            text = block.text.replace("127.0.0.1:8001", served.url)
            if block.language == "python":
                subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True)
            else:
                outputs.append(shell(text, tmp_path))
    printed, items = outputs
    shown, merged = printed.index("3 events of ann"), printed.index("merged")
    assert re.findall(r"│ +(172|50|181) +│ (\w+)", printed[shown:merged]) == [
        ("172", "purchase"),
        ("50", "view"),
        ("181", "view"),
    ]
    assert re.findall(r"│ +(\d+) +│ ([^│]*?) +│ +(yes)? +│", items[items.index("2 added, 1 hidden") :]) == [
        ("5000", "A New Film (2026)", ""),
        ("5001", "Another One (2026)", "yes"),
    ]
    assert "0 events of ann" in shell(f"llamarec users show ann --store {store}", tmp_path)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on PATH")
def test_the_page_of_the_gateway_has_requests_that_are_answered(tmp_path):
    """Each curl command succeeds at a gateway in front of a client that needs no server: its body is a valid one."""
    with listening_gateway(FakeClient()) as url:
        for block in GATEWAY:
            text = block.text.replace("http://127.0.0.1:8090", url).replace("curl -s ", "curl -sS --fail-with-body ")
            answers = shell(text, tmp_path).replace("}{", "}\n{").splitlines()
            assert len(answers) == text.count("curl ")
            assert all({"request_id", "id"} & set(json.loads(answer)) for answer in answers)


@pytest.mark.thorough
def test_the_page_of_refreshes_leads_from_the_first_log_to_the_second_release(shop, tmp_path):
    """The blocks run in order on the tutorial's shop, with a ranker that took seconds to train.

    The shoppers' habits have changed, so the second release is served in the end. The first server is stopped before
    the log of its answers is read, since it writes a file only every five minutes otherwise.
    """
    shutil.copytree(shop / "artifacts", tmp_path / "artifacts")
    build, serve, promote, use, feedback, refresh, listed = REFRESH
    flags = ("--store", f"sqlite:///{tmp_path}/histories.sqlite", "--answers", str(tmp_path / "answers"))
    assert serve.text.split() == [
        "llamarec",
        "serve",
        "--repository",
        "releases",
        *(flag.replace(f"{tmp_path}/", "") for flag in flags),
    ]
    shell(build.text, tmp_path)
    with serving(tmp_path / "releases", tmp_path / "log", *flags, ready=False) as served:
        assert wait_for(lambda: succeeds(promote.text, tmp_path), 120), "the server starts without a release"
        served.wait_until_ready()
        code = use.text.replace("127.0.0.1:8001", served.url)
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert re.search(r"300 answers .*│ r1 +│ +300 │ +300 │", shell(feedback.text, tmp_path), re.DOTALL)
    with serving(tmp_path / "releases", tmp_path / "log", *flags) as served:
        assert "r2 is not worse than r1 and is served now" in shell(refresh.text, tmp_path)
        rows = re.findall(r"│ (r\d) +│.*│ ([a-z, ]*?) *│", shell(listed.text, tmp_path))
        assert rows == [("r1", "previous"), ("r2", "current, canary")]
        first = [row[0] for row in ask(served.url, ["sku-1", "sku-8", "sku-15"])[:3]]
        assert "sku-22" in first, "every seventh article"


def test_the_command_reference_is_the_codes():
    """`docs/commands.md` equals typer's output; run the command again after changing an option."""
    command = [str(BIN / "typer"), "llamarec.cli", "utils", "docs", "--name", "llamarec", "--title", "Commands"]
    written = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=ENVIRONMENT).stdout
    assert (DOCS / "commands.md").read_text(encoding="utf-8").strip() == written.strip()
