"""The image of the Dockerfile without Docker: its Python, its packages and its programs, on the wheel's tritonserver.

What Docker itself and NVIDIA's base image add is not covered: layers, the user, the server of 25.07, CUDA.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from chart import CHART, EVERYTHING_ON, render
from supervised import ask, serving, wait_for

from export.release import build_release
from export.repository import Export
from serving.offline import ExportedSteps
from serving.server.releases import State

pytestmark = pytest.mark.container
ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HISTORY = ["181", "50", "172"]
TRITON_OF_THE_WHEEL = "nvidia-pytriton==0.7.0"
HELM = "helm-sdkpy==0.1.32"


def python_of_the_image() -> str:
    """Return a Python 3.12, the version in NVIDIA's image: of PATH, or of pyenv."""
    known = [shutil.which("python3.12"), *map(str, Path.home().glob(".pyenv/versions/3.12.*/bin/python"))]
    for program in filter(None, [os.environ.get("PYTHON312"), *known]):
        command = [program, "-c", "import sys; print(*sys.version_info[:2])"]
        if subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "3 12":
            return program
    pytest.skip("no Python 3.12: install one, or name it with PYTHON312")


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an environment with what the Dockerfile copies and installs, the server and Helm."""
    folder = tmp_path_factory.mktemp("image")
    context, environment = folder / "context", folder / "environment"
    context.mkdir()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, context / (target if copy is shutil.copytree else source))
    (installed,) = re.findall(
        r"python3 -m pip install --no-cache-dir --break-system-packages (.+?) \\$", DOCKERFILE, re.M
    )
    subprocess.run([python_of_the_image(), "-m", "venv", str(environment)], check=True)
    pip = f"{environment}/bin/python -m pip install --quiet"
    for command in (f"{pip} {installed}", f"{pip} --no-deps {TRITON_OF_THE_WHEEL}", f"{pip} {HELM}"):
        run = subprocess.run(["bash", "-c", command], cwd=context, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return environment


def run(container: Path, program: str, *arguments: str, given: str = "") -> str:
    """Return what a program of the environment prints."""
    done = subprocess.run(
        [str(container / "bin" / program), *arguments],
        cwd=container,
        env=environment(container),
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(container: Path) -> dict[str, str]:
    """Return variables under which nothing of this checkout and of its environment is found."""
    return {**os.environ, "PATH": f"{container}/bin:{os.environ['PATH']}", "PYTHONPATH": ""}


def test_pytorch_is_built_for_the_cuda_that_the_page_names(container):
    """docs/serving.md says which CUDA the image's PyTorch is built for, from which the driver that it needs follows."""
    version, cuda = run(container, "python", "-c", "import torch; print(torch.__version__, torch.version.cuda)").split()
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"PyTorch {version.split('+')[0]} in the image is built for CUDA {cuda}" in " ".join(page.split())


def test_the_image_has_no_training_packages(container):
    """Neither NVTabular nor what only trains is installed; the service must not need it."""
    installed = {line.split("==")[0].lower() for line in run(container, "python", "-m", "pip", "freeze").splitlines()}
    assert {"torch", "tritonclient", "onnxruntime"} <= installed
    assert not installed & {"nvtabular", "merlin-core", "pandas", "peft", "bitsandbytes", "accelerate", "scikit-learn"}


def test_a_release_is_promoted_and_healed_in_the_image(container, artifacts, tmp_path):
    """A release that this environment built is promoted by the image's `llamarec`, answers as offline, comes back after
    its ranker was killed, and is replaced by the next release.

    The image's PyTorch is another build than this environment's, so that scores agree within the probes' tolerance.
    """
    releases = tmp_path / "releases"
    build_release(Export(threads=1), artifacts, releases)
    build_release(Export(threads=1, retrieve=10), artifacts, releases)
    program = [str(container / "bin" / "llamarec")]
    with serving(
        releases, tmp_path / "log", ready=False, environment=environment(container), program=program
    ) as served:
        assert wait_for(lambda: promoted(container, releases, "r1"), 120), served.log_path.read_text()[-3000:]
        served.wait_until_ready()
        expected = {name: ExportedSteps.load(releases, f"_{name}").recommend(HISTORY) for name in ("r1", "r2")}
        assert_close(ask(served.url, HISTORY), expected["r1"])
        (before,) = served.stubs("ranker_r1")
        served.kill("ranker_r1")
        assert wait_for(lambda: served.stubs("ranker_r1") not in ([], [before]), 60)
        served.wait_until_ready()
        assert_close(ask(served.url, HISTORY), expected["r1"])
        assert promoted(container, releases, "r2")
        assert State.read(releases).current == "r2"
        assert_close(ask(served.url, HISTORY), expected["r2"])
        assert len(expected["r2"]) == 10


def promoted(container: Path, releases: Path, name: str) -> bool:
    """Return whether the image's `llamarec release promote` succeeds."""
    command = [str(container / "bin" / "llamarec"), "release", "promote", name, f"--repository={releases}"]
    done = subprocess.run(command, cwd=container, env=environment(container), capture_output=True, check=False)
    return done.returncode == 0


def assert_close(answer, expected):
    """Assert that the same items have the same ranks of the retriever and nearly the same scores."""
    assert {item: rank for item, _, rank in answer} == {item: rank for item, _, rank in expected}
    scores = {item: score for item, score, _ in expected}
    assert [score for _, score, _ in answer] == pytest.approx([scores[item] for item, *_ in answer], abs=1e-4)


@pytest.mark.parametrize("values", [{}, EVERYTHING_ON], ids=["defaults", "everything on"])
def test_helm_lints_and_renders_the_chart(container, values):
    """Helm 4 finds no error, its manifests are valid Kubernetes objects, and they equal those of the faster tests."""
    script = Path(__file__).parent / "helm.py"
    found = json.loads(run(container, "python", str(script), str(CHART), given=json.dumps(values)))
    assert found["linted"]["Errors"] is None
    rendered = [manifest for manifest in yaml.safe_load_all(found["manifest"]) if manifest]
    for manifest in rendered:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    key = json.JSONEncoder(sort_keys=True).encode
    assert sorted(map(key, rendered)) == sorted(map(key, render(values)))
