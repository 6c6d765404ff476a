"""The bundle for GPU machines: what is packed, and how it is refused or unpacked there."""

import ast
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomllib

from benchmarks import bundle, unpack
from benchmarks.bundle import PACKAGES, Tree, pack, split, write_bundle
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.errors import InputError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIMIT = 4096
"""Small enough that the base, 10,000 random bytes, becomes three pieces."""


def tree(folder: Path, name: str, files: dict[str, bytes | str], purposes=unpack.PURPOSES, inside: str = "") -> Tree:
    for path, content in files.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Tree(name, folder / name, inside or name, purposes)


@pytest.fixture
def weights() -> bytes:
    return random.Random(0).randbytes(10_000)


@pytest.fixture
def made(tmp_path: Path, weights: bytes) -> Path:
    """Return a small bundle with code, artifacts, a numpy of its own and a base in three pieces."""
    trees = tmp_path / "trees"
    packed = [
        tree(trees, "code", {"probe.py": "import sys, numpy\nprint(numpy.__version__, *sys.argv[1:])\n"}),
        tree(trees, "artifacts-tiny", {"data/manifest.json": "{}"}, inside="artifacts/tiny"),
        tree(trees, "base", {"weights": weights}, ("training",)),
        tree(trees, "numpy", {"numpy/__init__.py": "__version__ = 'the bundle'\n"}, ("serving",)),
    ]
    return write_bundle(tmp_path / "bundle", packed, COMMIT, python=PYTHON, limit=LIMIT)


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "unpack.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(folder: Path, *arguments: str) -> str:
    """Return the sentence with which unpack.py refuses; it must exit with code 1 and leave nothing behind."""
    to = folder.parent / "unpacked"
    before = sorted(path.name for path in folder.parent.iterdir())
    ended = start(folder, "--to", str(to), *arguments)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    (line,) = ended.stderr.splitlines()
    return line.removeprefix("error: ")


def test_a_large_archive_is_split_into_pieces_that_join_to_the_same_bytes(tmp_path: Path):
    """10 bytes at a limit of 4 are three pieces of at most 4 bytes, in order; at a limit of 10 the file stays."""
    (tmp_path / "base.tar.xz").write_bytes(b"0123456789")
    assert split(tmp_path / "base.tar.xz", 10) == [tmp_path / "base.tar.xz"]
    pieces = split(tmp_path / "base.tar.xz", 4)
    assert [piece.name for piece in pieces] == [f"base.tar.xz.{n}-of-3" for n in (1, 2, 3)]
    assert [piece.read_bytes() for piece in pieces] == [b"0123", b"4567", b"89"]
    assert sorted(tmp_path.iterdir()) == pieces


def test_the_manifest_says_what_each_purpose_needs(made: Path):
    """Every piece is within the limit and recorded with its size and hash, by the archive that it belongs to."""
    manifest = json.loads((made / "manifest.json").read_text())
    archives = manifest["facts"]["archives"]
    pieces = [piece for archive in archives.values() for piece in archive["pieces"]]
    assert len(archives["base"]["pieces"]) == 3
    serving = {name for name, archive in archives.items() if "serving" in archive["purposes"]}
    assert serving == {"code", "artifacts-tiny", "numpy"}
    assert manifest["facts"]["commit"] == COMMIT
    assert {*pieces, "unpack.py"} == set(manifest["files"])
    assert all(manifest["files"][piece]["bytes"] <= LIMIT for piece in pieces)


@pytest.mark.parametrize(
    ("packages", "files", "kept"),
    [
        (
            "training",
            [
                "bin/gguf-dump",
                "bitsandbytes/libbitsandbytes_cpu.so",
                *(f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cuda118", "cuda128", "cuda130", "cuda132")),
                *(f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("rocm64", "xpu2025")),
                "gguf/quants.py",
            ],
            ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so", "gguf/quants.py"],
        ),
        (
            "server",
            [
                "bin/perf_analyzer",
                "bin/perf_client",
                *(f"pytriton/tritonserver/python_backend_stubs/{v}/stub" for v in ("3.8", "3.11", "3.12", "3.13")),
                "nvidia_pytriton.libs/libpython3-419a3a08.13.so.1.0",
                "nvidia_pytriton.libs/libtritonserver-717102f0.so",
            ],
            [
                "bin/perf_client",
                "nvidia_pytriton.libs/libtritonserver-717102f0.so",
                "pytriton/tritonserver/python_backend_stubs/3.12/stub",
            ],
        ),
        (
            "numpy",
            [
                *("bin/f2py", "numpy/core/tests/test_api.py", "numpy/testing/print.py", "pyarrow/include/arrow/api.h"),
                *("pyarrow/libarrow.so.1400", "pyarrow/libarrow_flight.so.1400", "pyarrow/libarrow_substrait.so.1400"),
            ],
            ["numpy/testing/print.py", "pyarrow/libarrow.so.1400"],
        ),
    ],
)
def test_what_the_target_machine_does_not_need_is_left_out(tmp_path: Path, packages: str, files: list, kept: list):
    """The files are those of the wheels; CUDA 13.0 and Python 3.12 are the target's."""
    (left_out,) = (entry.left_out for entry in PACKAGES if entry.name == packages)
    folder = tree(tmp_path, packages, dict.fromkeys(files, "")).folder
    with tarfile.open(pack(Tree(packages, folder, packages, left_out=left_out), tmp_path)) as packed:
        assert sorted(entry.name for entry in packed if entry.isfile()) == [f"{packages}/{path}" for path in kept]


def test_the_bundle_contains_every_package_of_the_project():
    """The packages are those that import-linter checks; a package that is not packed could not be imported there."""
    pyproject = tomllib.loads((bundle.ROOT / "pyproject.toml").read_text())
    packages = set(pyproject["tool"]["importlinter"]["root_packages"]) - {"llamarec_client"}  # in client/
    assert packages < set(bundle.TRACKED)


def test_unpack_imports_only_the_standard_library():
    """The target machine runs the script before it has any of the project's packages."""
    parsed = ast.parse(Path(unpack.__file__).read_text())
    imported = [node.module for node in ast.walk(parsed) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(parsed) if isinstance(node, ast.Import) for alias in node.names]
    assert imported
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_both_environments_run_the_bundle_s_code(made: Path, weights: bytes):
    """Training sees the machine's numpy, serving the bundle's; a module in the working directory shadows neither."""
    import numpy

    to = made.parent / "un packed"
    ended = start(made, "--to", str(to))
    assert ended.returncode == 0, ended.stderr
    assert (to / "base" / "weights").read_bytes() == weights
    # The code finds its commit and the artifacts as in a checkout.
    assert (to / "code" / "artifacts" / "tiny" / "data" / "manifest.json").read_text() == "{}"
    assert (to / "code" / "COMMIT").read_text() == f"{COMMIT}\n"
    elsewhere = made.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "probe.py").write_text("print('the wrong one')\n")
    for script, version in (("run", numpy.__version__), ("run-serving", "the bundle")):
        assert str(to / script) in ended.stdout
        command = [to / script, "probe", "an argument"]
        assert subprocess.check_output(command, text=True, cwd=elsewhere) == f"{version} an argument\n"


def test_serving_sees_the_machine_s_packages_except_those_of_numpy_2(made: Path):
    """PyTorch is the machine's; scipy, scikit-learn and pandas are hidden, and so are their metadata."""
    to = made.parent / "unpacked"
    assert start(made, "--to", str(to), "--only", "serving").returncode == 0
    linked = {path.name for path in (to / "machine").iterdir()}
    assert {"torch", "google", "safetensors"} < linked
    hidden = ("numpy", "pandas", "pyarrow", "scikit_learn", "scipy", "sklearn")
    assert not [name for name in linked if name.split("-")[0].split(".")[0] in hidden]
    assert not (to / "run").exists()
    assert not (to / "base").exists()


def test_one_purpose_needs_only_its_own_pieces(made: Path):
    """Machines take a few pieces at a time: training must not wait for the server."""
    (made / "numpy.tar.xz").unlink()
    assert start(made, "--to", str(made.parent / "unpacked"), "--only", "training").returncode == 0
    shutil.rmtree(made.parent / "unpacked")
    assert "numpy.tar.xz is missing" in refusal(made, "--only", "serving")


def test_a_missing_piece_is_named(made: Path):
    (made / "base.tar.xz.2-of-3").unlink()
    assert refusal(made) == f"{made}/base.tar.xz.2-of-3 is missing: copy it from the bundle"


def test_a_piece_of_another_bundle_is_named(made: Path):
    """The same name and size with other content, as after making the bundle again."""
    piece = made / "base.tar.xz.3-of-3"
    piece.write_bytes(bytes(piece.stat().st_size))
    sentence = refusal(made)
    assert f"{piece} is damaged or a piece of another bundle" in sentence
    assert f"made on {json.loads((made / 'manifest.json').read_text())['facts']['date']}" in sentence
    assert COMMIT in sentence


def test_a_bundle_in_a_checkout_of_another_commit_is_refused(made: Path):
    """The bundle's code would not be the checkout's."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "another")):
        subprocess.run(["git", "-C", made.parent, *command], check=True)
    head = subprocess.check_output(["git", "-C", made.parent, "rev-parse", "HEAD"], text=True).strip()
    sentence = refusal(made)
    assert f"made from commit {COMMIT}, but it is in a checkout of {head}" in sentence
    assert "make gpu-bundle" in sentence


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is missing"), ("{", "not the manifest of a bundle"), ("[]", "not the manifest")]
)
def test_a_missing_or_foreign_manifest_is_named(made: Path, content: str | None, said: str):
    manifest = made / "manifest.json"
    manifest.write_text(content) if content else manifest.unlink()
    sentence = refusal(made)
    assert sentence.startswith(str(manifest))
    assert said in sentence


def test_another_python_is_refused(tmp_path: Path):
    """The packages in the bundle are compiled for one version of Python."""
    made = write_bundle(tmp_path / "bundle", [tree(tmp_path / "trees", "code", {"a.py": ""})], COMMIT, python="3.99")
    assert refusal(made) == f"{sys.executable} is Python {PYTHON}, but the bundle's packages need 3.99: use that one"


def test_a_python_without_pytorch_is_refused(made: Path):
    """-S hides the installed packages, as the system's Python would."""
    command = [sys.executable, "-S", str(made / "unpack.py"), "--to", str(made.parent / "unpacked")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "has no PyTorch: start this script with the Python that has it" in ended.stderr
    assert not (made.parent / "unpacked").exists()


def test_a_folder_that_exists_is_left_alone(made: Path):
    (made.parent / "unpacked").mkdir()
    (made.parent / "unpacked" / "mine").write_text("kept")
    assert refusal(made) == f"{made.parent}/unpacked already exists: delete it or give another folder with --to"
    assert (made.parent / "unpacked" / "mine").read_text() == "kept"


def test_a_full_disk_leaves_nothing_behind(made: Path):
    """Simulated by a limit of 8 KiB on the size of a file, which the base of 10,000 bytes exceeds."""
    to = made.parent / "unpacked"
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192));"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limited, made / "unpack.py", "--to", to]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(f"error: {to} could not be written ([Errno 27] File too large")
    assert sentence.endswith("make room, or give another folder with --to")
    assert sorted(path.name for path in made.parent.iterdir()) == ["bundle", "trees"]


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path: Path):
    """The output is checked before anything is packed; an older bundle may be replaced."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    with pytest.raises(InputError, match="thesis is not a complete bundle: delete it or give another folder"):
        bundle.make_bundle(tmp_path / "thesis", [])
    bundle.check_output(write_bundle(tmp_path / "old", [], COMMIT))


def test_code_that_is_not_committed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bundle contains HEAD: a changed or new file would silently be missing."""
    (tmp_path / "models").mkdir()
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    (tmp_path / "models" / "a.py").write_text("")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    bundle.check_committed()
    (tmp_path / "notes").write_text("not packed")
    bundle.check_committed()
    (tmp_path / "models" / "new.py").write_text("")
    with pytest.raises(InputError, match=r"models/new.py differs from HEAD.*commit your changes first"):
        bundle.check_committed()


def test_artifacts_that_training_would_refuse_are_refused_here(tmp_path: Path):
    """The target machine could not mend them: unfinished, made from other data, or two folders of one name."""
    movies, scratch = tmp_path / "movies", tmp_path / "scratch"
    with pytest.raises(InputError, match=r"data does not exist or is not finished: run `llamarec preprocess` first"):
        bundle.artifacts_tree(movies, scratch)
    for kind, inputs in (("data", {}), ("retriever", {"data": "of another data set"})):
        with new_artifact(movies / kind, kind, options={}, inputs=inputs) as folder:
            (folder / "content").write_text(kind)
    with pytest.raises(InputError, match=r"retriever was made from other data: run `llamarec train-retriever` again"):
        bundle.artifacts_tree(movies, scratch)
    data = read_manifest(movies / "data", "data", "").fingerprint
    with new_artifact(movies / "retriever", "retriever", options={}, inputs={"data": data}) as folder:
        (folder / "content").write_text("retriever")
    (movies / "retriever-checkpoint.pt").write_text("left out")
    packed = bundle.artifacts_tree(movies, scratch)
    assert packed.inside == "artifacts/movies"
    assert sorted(path.name for path in packed.folder.iterdir()) == ["data", "retriever"]
    assert read_manifest(packed.folder / "data", "data", "").fingerprint == data
    with pytest.raises(InputError, match="movies has the same name as another folder of artifacts"):
        bundle.artifacts_tree(movies, scratch)


def test_a_package_that_cannot_be_downloaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without an index and other folders of wheels, pip finds no package."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"pip could not download gguf \(ERROR: .+check the access to PyPI"):
        bundle.install(bundle.Packages("training", ("gguf",), ()), tmp_path / "training")
