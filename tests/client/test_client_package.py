"""The client as a separate distribution: the modules that importing it loads, and the packages it installs."""

import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from environments import fresh_environment

import llamarec_client
from llamarec_client import RecommenderClient

CLIENT = Path(__file__).resolve().parents[2] / "client"
HISTORY = ["50", "181", "172"]
"""Items of MovieLens-100K."""


def python(program: str, *arguments: str, interpreter: str | Path = sys.executable) -> str:
    """Return the output of a fresh interpreter, which ignores the working directory and PYTHONPATH."""
    command = [str(interpreter), "-I", "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout


# --- importing


def test_the_contract_is_read_without_grpc_and_numpy():
    """Importing the contract loads neither gRPC nor numpy, which the processes of the server's steps do not need."""
    loaded = json.loads(python("import json, sys, llamarec_client.contract; print(json.dumps(sorted(sys.modules)))"))
    assert "llamarec_client.contract" in loaded
    assert not {"tritonclient", "grpc", "numpy", "google.protobuf"} & set(loaded)
    assert {name for name in loaded if name.startswith("llamarec_client")} == {
        "llamarec_client",
        "llamarec_client.contract",
    }


@pytest.mark.parametrize("name", llamarec_client.__all__)
def test_every_public_name_can_be_imported(name):
    """Every name in ``__all__`` is an object of one of the package's modules, the same at each look-up."""
    value = getattr(llamarec_client, name)
    assert value.__name__ == name
    assert value.__module__.startswith("llamarec_client.")
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert name in dir(llamarec_client)


def test_public_names_are_imported_by_a_star():
    """``from llamarec_client import *`` in a fresh interpreter imports all of ``__all__`` and nothing else."""
    program = (
        "given = {}; exec('from llamarec_client import *', given); given.pop('__builtins__'); print(*sorted(given))"
    )
    assert python(program).split() == sorted(llamarec_client.__all__)


@pytest.mark.parametrize("name", ["recommend", "Client", "grpc", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name):
    """An unknown name raises AttributeError, so that ``hasattr`` and ``from llamarec_client import ...`` work."""
    with pytest.raises(AttributeError, match=f"'llamarec_client' has no attribute '{name}'"):
        getattr(llamarec_client, name)


# --- installing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, because setuptools leaves folders next to the sources."""
    folder = tmp_path_factory.mktemp("client")
    kept_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    source = shutil.copytree(CLIENT, folder / "source", ignore=kept_out)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run = subprocess.run([*build, str(source)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def interpreter(wheel, tmp_path_factory) -> Path:
    """Return the interpreter of a fresh environment that contains only the wheel and its requirements."""
    return fresh_environment(tmp_path_factory.mktemp("environment"), [str(wheel)])


@pytest.mark.thorough
def test_the_wheels_metadata(wheel, metadata):
    """The wheel requires numpy 1.26 or 2, tritonclient 2.50 or newer with its gRPC extra, and Python 3.10 to 3.13."""
    assert wheel.name.startswith("llamarec_client-")
    assert wheel.name.endswith("-py3-none-any.whl")
    requirements = {requirement.replace(" ", "") for requirement in metadata.get_all("Requires-Dist")}
    assert requirements == {"numpy<3,>=1.26", "tritonclient[grpc]>=2.50"}
    assert metadata["Name"] == "llamarec-client"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload().strip(), "the README is the project's page at a package index"


@pytest.mark.thorough
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """The wheel contains all modules of the folder and PEP 561's marker, and no other package of the project."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = CLIENT / "llamarec_client"
    assert files == {f"llamarec_client/{path.name}" for path in package.iterdir() if path.suffix in (".py", ".typed")}
    assert "llamarec_client/py.typed" in files
    assert "llamarec_client/recommender.py" in files


@pytest.mark.thorough
def test_alone_it_brings_numpy_2_and_nothing_of_the_project(interpreter):
    """Installed alone, the client gets numpy 2 and none of the application's packages.

    The application needs numpy 1 for Triton's Python backend, but a service that uses the client does not. Type
    checkers find the marker at the place that PEP 561 specifies.
    """
    program = """
import importlib.resources, importlib.util, json, numpy, sys
print(json.dumps({
    "numpy": numpy.__version__,
    "found": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
    "typed": importlib.resources.files("llamarec_client").joinpath("py.typed").is_file(),
    "from": importlib.util.find_spec("llamarec_client").origin,
}))
"""
    others = ["preprocessing", "models", "export", "serving", "llamarec", "rich", "typer", "torch", "pyarrow"]
    installed = json.loads(python(program, *others, interpreter=interpreter))
    assert int(installed["numpy"].split(".")[0]) >= 2
    assert installed["found"] == []
    assert installed["typed"]
    assert Path(installed["from"]).is_relative_to(interpreter.parents[1])


@pytest.mark.thorough
def test_alone_it_asks_the_server_as_the_project_does(interpreter, server):
    """The installed client gets the same answer from the server as the client of this process.

    The former uses the newest tritonclient and numpy that pip finds, the latter the project's pinned versions.
    """
    program = """
import json, sys
from llamarec_client import RecommenderClient
with RecommenderClient(sys.argv[1]) as client:
    print(json.dumps([item.item_id for item in client.recommend(sys.argv[2:], top_k=5, user_id="one")]))
"""
    with RecommenderClient(server.url) as client:
        expected = [item.item_id for item in client.recommend(HISTORY, top_k=5, user_id="one")]
    assert len(expected) == 5
    assert json.loads(python(program, server.url, *HISTORY, interpreter=interpreter)) == expected


@pytest.mark.thorough
def test_alone_it_raises_its_own_errors(interpreter, server):
    """The asyncio client of the installed package raises the server's refusal as InvalidRequest."""
    program = """
import asyncio, sys
from llamarec_client import AsyncRecommenderClient, InvalidRequest
async def ask():
    async with AsyncRecommenderClient(sys.argv[1]) as client:
        try:
            await client.recommend(["50"], candidates=["no such item"])
        except InvalidRequest as error:
            print(error)
asyncio.run(ask())
"""
    assert "CANDIDATES" in python(program, server.url, interpreter=interpreter)
