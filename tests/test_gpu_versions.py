"""Preprocessing with the versions that cuDF requires: pandas 2 and Dask 2024.11, without the GPU itself."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tomllib
from environments import fresh_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints-gpu.txt"
MERLIN = ["merlin-core==23.8.0", "merlin-dataloader==23.8.0", "nvtabular==23.8.0"]
DATA_ONLY = ["recbole==1.2.1"]
"""MovieLens-100K, which is read from the package's files."""
PACKAGES = [
    # What Merlin and the stage import.
    *("betterproto", "dask-cuda", "dask", "distributed", "npy-append-array", "numba", "numpy", "pandas", "pyarrow"),
    *("pynvml", "rich", "scipy", "tensorflow-metadata", "tqdm"),
    # What the command line imports, which some of the tests run.
    *("tritonclient[grpc]", "typer"),
    *("hypothesis", "polars", "pytest"),
]


def pins(path: Path) -> dict[str, str]:
    """Return the version of each package, by its normalised name."""
    lines = [line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in lines}


def extra(name: str) -> list[Requirement]:
    """Return the requirements of one of the project's extras, and of those that it includes."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = []
    for text in extras[name]:
        requirement = Requirement(text)
        own = requirement.name == "llamarec"
        found += [each for part in requirement.extras for each in extra(part)] if own else [requirement]
    return found


def test_the_constraints_fit_the_extra():
    """Every package of the `gpu` extra is pinned, at a version that the extra and the `train` extra's pandas allow."""
    pinned = pins(CONSTRAINTS)
    requirements = [*extra("gpu"), *(each for each in extra("train") if each.name == "pandas")]
    assert {"cudf-cu12", "pandas", "torch"} <= {each.name for each in requirements}
    for requirement in requirements:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_both_sets_of_constraints_train_with_the_same_packages():
    """Apart from what cuDF requires, the GPU's set pins the versions that all other tests run with."""
    default, gpu = pins(ROOT / "constraints.txt"), pins(CONSTRAINTS)
    differing = {name for name in default.keys() & gpu.keys() if default[name] != gpu[name]}
    assert differing == {
        *("dask", "dask-cuda", "distributed", "pandas", "pyarrow"),
        *("cuda-bindings", "cuda-pathfinder", "cuda-python"),
    }


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a fresh environment with these versions and Merlin, and without PyTorch."""
    folder = tmp_path_factory.mktemp("environment")
    return fresh_environment(folder, ["--constraint", str(CONSTRAINTS), *PACKAGES], ["--no-deps", *MERLIN, *DATA_ONLY])


@pytest.mark.thorough
def test_the_preprocessing_tests_pass_with_the_versions_of_cudf(interpreter):
    """The tests that pass with pandas 1.5 pass with the same expected sequences on pandas 2.2 and Dask 2024.11.

    The two options of Dask that these versions need are set by the package alone, not by the environment.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    # The conftest.py of the parent folder imports PyTorch, and the data sets that its fixture reads take minutes.
    options = ["-q", "--confcutdir", "tests/preprocessing", "-m", "not shared_data", "-p", "no:cacheprovider"]
    # The default tier draws fewer forms of the same.
    options += ["--deselect", "tests/preprocessing/test_raw_properties.py::test_one_log_in_all_forms"]
    run = subprocess.run(
        [str(interpreter), "-m", "pytest", *options, "tests/preprocessing"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"^(\d+) passed", run.stdout, re.MULTILINE)
    assert passed is not None, run.stdout
    assert int(passed[1]) > 100
