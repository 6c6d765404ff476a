"""Unpacks a bundle of :mod:`benchmarks.bundle` on a machine without a network.

    python3 unpack.py --to DIR [--only {training,serving}]

The bundle contains a copy of this script, which needs only Python's standard library. Start it with the Python that
has PyTorch. The pieces are read from the script's own folder and checked before anything is written.

Then ``DIR/run MODULE`` runs a module of the project with the machine's own packages, and ``DIR/run-serving MODULE`` in
an environment where the bundle's numpy 1.26 replaces the machine's, because Triton's Python backend fails with numpy 2.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PURPOSES = ("training", "serving")
MANIFEST = "manifest.json"
CODE, BASE, TRAINING, NUMPY, SERVER, LIBPYTHON = "code", "base", "training", "numpy", "server", "libpython"
"""Names of the archives; each is unpacked into a folder of its name."""
ARTIFACTS = "artifacts"
"""Folder into which the data sets' artifacts are unpacked; a link in the code's folder leads to it."""
COMMIT = f"{CODE}/COMMIT"
"""File with the commit of the code, which has no git repository there."""
RUN_SERVING = "LLAMAREC_RUN_SERVING"
"""Environment variable that tells the checks how to start a module where a server can run."""
MACHINE = "machine"
"""Folder of links to the machine's own packages, for serving."""
ENVIRONMENT = "environment"
"""Folder of the virtual environment for serving."""
REPLACED = re.compile(r"(numpy|pandas|pyarrow|scikit_learn|scipy|sklearn)(\.libs|-.*\.(dist|egg)-info)?")
"""Packages of the machine that serving leaves out: numpy and pyarrow, which the bundle replaces, and others that are
compiled for numpy 2 and would be imported by transformers."""


class BundleError(Exception):
    """A bundle that cannot be unpacked; the message is one sentence that names the piece and the remedy."""


def unpack(bundle: Path, to: Path, purposes: Sequence[str] = PURPOSES) -> list[str]:
    """Unpack a bundle for the given purposes into a folder, which is complete or absent.

    Args:
        bundle: the folder with the manifest and the pieces.
        to: the folder to write; it must not exist or be empty.
        purposes: some of :data:`PURPOSES`.

    Returns:
        the lines to print: the command that starts each purpose.

    Raises:
        BundleError: a piece is missing or belongs to another bundle, the bundle does not fit this Python or the
            checkout that contains it, or the folder exists.
    """
    manifest = read_manifest(bundle)
    facts = manifest["facts"]
    archives = {
        name: archive["pieces"]
        for name, archive in facts["archives"].items()
        if not set(purposes).isdisjoint(archive["purposes"]) and (name != LIBPYTHON or not has_libpython())
    }
    check_python(facts["python"])
    check_pieces(bundle, [piece for pieces in archives.values() for piece in pieces], manifest)
    check_commit(bundle, facts["commit"])
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise BundleError(f"{to} already exists: delete it or give another folder with --to")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    try:
        partial.mkdir(parents=True)
        for name, pieces in archives.items():
            extract(name, [bundle / piece for piece in pieces], partial)
        (partial / COMMIT).write_text(f"{facts['commit']}\n", encoding="utf-8")
        (partial / CODE / ARTIFACTS).symlink_to(Path("..") / ARTIFACTS)
        if "training" in purposes:
            write_training(partial, to, serving="serving" in purposes)
        if "serving" in purposes:
            write_serving(partial, to)
        partial.replace(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return started_by(to, purposes)


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Return the bundle's manifest.

    Raises:
        BundleError: it is missing or not a bundle's.
    """
    path = bundle / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: copy it from the bundle, next to {Path(__file__).name}") from None
    except ValueError:
        manifest = {}
    if not isinstance(manifest, dict) or manifest.get("kind") != "gpu-bundle":
        raise BundleError(f"{path} is not the manifest of a bundle: copy it from the bundle again")
    return manifest


def check_pieces(bundle: Path, pieces: Sequence[str], manifest: dict[str, Any]) -> None:
    """Check that every piece is there and has the content that the manifest records.

    Raises:
        BundleError: one is missing or differs.
    """
    for piece in pieces:
        if not (bundle / piece).is_file():
            raise BundleError(f"{bundle / piece} is missing: copy it from the bundle")
    for piece in pieces:
        with (bundle / piece).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest["files"][piece]["sha256"]:
            facts = manifest["facts"]
            raise BundleError(
                f"{bundle / piece} is damaged or a piece of another bundle: copy it again from the bundle that was made"
                f" on {facts['date']} from commit {facts['commit']}"
            )


def check_commit(bundle: Path, commit: str) -> None:
    """Check that a git checkout that contains the bundle, if any, is at the commit that the bundle was made from.

    Raises:
        BundleError: it is at another one.
    """
    try:
        command = ["git", "-C", str(bundle), "rev-parse", "HEAD"]
        head = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return
    if head.returncode == 0 and head.stdout.strip() != commit:
        raise BundleError(
            f"{bundle / MANIFEST} says that the bundle was made from commit {commit}, but it is in a checkout of"
            f" {head.stdout.strip()}: run `make gpu-bundle` again, or copy the bundle to a folder outside the checkout"
        )


def check_python(wanted: str) -> None:
    """Check that this is the Python that the bundle's packages are built for, and that it has PyTorch.

    Raises:
        BundleError: it is not, or it has not.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != wanted:
        raise BundleError(
            f"{sys.executable} is Python {version}, but the bundle's packages need {wanted}: use that one"
        )
    if importlib.util.find_spec("torch") is None:
        raise BundleError(f"{sys.executable} has no PyTorch: start this script with the Python that has it")


def extract(name: str, pieces: Sequence[Path], folder: Path) -> None:
    """Join an archive's pieces and extract it into ``folder``."""
    whole = folder / f"{name}.tar"
    with whole.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, joined)
    with tarfile.open(whole) as archive:
        archive.extractall(folder, filter="data")
    whole.unlink()


def write_training(folder: Path, final: Path, *, serving: bool) -> None:
    """Write the script that starts modules with the machine's packages.

    Args:
        folder: folder to write into.
        final: the name that this folder gets in the end.
        serving: whether the environment for serving is there too; the checks then start servers in it.
    """
    paths = [final / CODE, final / CODE / "client", final / TRAINING, final / BASE]
    path = shlex.quote(":".join(map(str, paths)))
    lines = [f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"]
    if serving:
        lines.append(f"export {RUN_SERVING}={shlex.quote(str(final / 'run-serving'))}")
    write_script(folder / "run", [*lines, f"exec {shlex.quote(sys.executable)}"])


def write_serving(folder: Path, final: Path) -> None:
    """Write the environment with numpy 1.26, and the script that starts modules in it; see :func:`write_training`."""
    link_machine_packages(folder / MACHINE)
    environment = folder / ENVIRONMENT
    venv.create(environment, symlinks=True)
    (environment / "bin" / "perf_client").symlink_to(final / SERVER / "bin" / "perf_client")
    paths = [final / name for name in (NUMPY, SERVER, CODE, f"{CODE}/client", TRAINING, BASE, MACHINE)]
    lines = ["unset PYTHONPATH"]  # it comes before the environment's own paths
    if not has_libpython():
        library = final / LIBPYTHON
        paths.append(library / "lib-dynload")
        lines.append(f"export LD_LIBRARY_PATH={shlex.quote(str(library))}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")
    packages = next((environment / "lib").glob("python*/site-packages"))
    (packages / "bundle.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    lines.append(f"exec {shlex.quote(str(final / ENVIRONMENT / 'bin' / 'python'))}")
    write_script(folder / "run-serving", lines)


def write_script(path: Path, lines: Sequence[str]) -> None:
    """Write a shell script whose last line starts a Python, to which ``-m`` and the script's arguments are added."""
    # -P: a checkout in the working directory must not shadow the bundle's code.
    text = "\n".join(["#!/bin/sh", *lines])
    path.write_text(f'{text} -P -m "$@"\n', encoding="utf-8")
    path.chmod(0o755)


def link_machine_packages(folder: Path) -> None:
    """Fill a folder with links to the installed packages of this Python, except those of :data:`REPLACED`."""
    folder.mkdir()
    for packages in (Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))):
        for package in packages.iterdir() if packages.is_dir() else ():
            link = folder / package.name
            if not REPLACED.fullmatch(package.name) and not link.is_symlink():  # the first on the path counts
                link.symlink_to(package)


def has_libpython() -> bool:
    """Return whether Triton's Python backend finds this Python's shared library."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    if (Path(sysconfig.get_config_var("LIBDIR")) / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def started_by(folder: Path, purposes: Sequence[str]) -> list[str]:
    """Return the lines that say how each purpose is started."""
    run, serve = folder / "run", folder / "run-serving"
    lines = {
        "training": f"the checks, and training with the machine's numpy:\n  {run} benchmarks.device SECTION...",
        "serving": f"serving, with numpy 1.26:\n  {serve} llamarec.cli serve",
    }
    return [lines[purpose] for purpose in purposes]


def main() -> None:
    """Unpack the bundle that contains this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="Folder to write; it must not exist.")
    parser.add_argument("--only", choices=PURPOSES, help="Unpack only what this purpose needs.")
    options = parser.parse_args()
    purposes = (options.only,) if options.only else PURPOSES
    try:
        print("\n".join(unpack(Path(__file__).resolve().parent, options.to.absolute(), purposes)))
    except BundleError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {options.to} could not be written ({error}): make room, or give another folder with --to")


if __name__ == "__main__":
    main()
