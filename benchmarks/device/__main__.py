"""Runs the checks of the GPU path and keeps what they find, one JSON file for each section.

    python -m benchmarks.device                              # the sections, and the time that each may take
    python -m benchmarks.device machine correctness          # on the first GPU
    python -m benchmarks.device --all --dry-run              # the same code with tiny shapes on the processor

Every section is a process of its own with a deadline. Its file is written as soon as it ends, or holds what it had
found until it failed or was stopped; the other sections go on. The exit code is 1 if any of them failed. Kept files
(docs/results/data/gpu) become docs/results/gpu.md with `make results-gpu`.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.section import ROOT, add_section_options
from models.device import torch_device
from preprocessing.artifacts import replacing
from preprocessing.errors import InputError

DRIVER_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
COMMIT_FILE = ROOT / "COMMIT"
"""Written by the GPU bundle, which holds no git repository."""
QUOTED = 2000
"""Characters of a failed section's output that its file quotes."""


@dataclass(frozen=True)
class Program:
    """The program of a section."""

    module: str
    seconds: int
    """Deadline, after which the section is stopped."""
    summary: str
    arguments: tuple[str, ...] = ()


SECTIONS = {
    "machine": Program("benchmarks.device.machine", 90, "versions, copy rates, matrix products"),
    "correctness": Program(
        "benchmarks.device.correctness", 180, "scores, losses and gradients against the processor's in fp32"
    ),
    "small-models": Program("benchmarks.device.small_models", 180, "ranking and training of SmolLM2 and of a 1B shape"),
    "forward": Program(
        "benchmarks.device.forward", 420, "the lean forward beside transformers' layers, prompts alone and packed"
    ),
    "training": Program(
        "benchmarks.device.trainer", 240, "the trainer beside what it did before: ranker's and retriever's steps"
    ),
    "llama-7b": Program(
        "benchmarks.device.llama_7b", 360, "QLoRA, merge, ranking and Figure 3 at the shape of Llama 2 7B"
    ),
    "ensemble": Program(
        "benchmarks.device.ensemble", 300, "the real Triton ensemble with the ranker on the GPU", ("embedded",)
    ),
    "ensemble-7b": Program("benchmarks.device.ensemble", 420, "the same with the shape of Llama 2 7B", ("llama-7b",)),
    "all-prompts-ml-lines": Program(
        "experiments.all_prompts", 480, "all training prompts of ml-latest-small, lines", ("ml-latest-small", "lines")
    ),
    "all-prompts-beauty-lines": Program(
        "experiments.all_prompts", 540, "all training prompts of Beauty, lines", ("amazon-2014-beauty", "lines")
    ),
    "all-prompts-ml-letters": Program(
        "experiments.all_prompts", 540, "the same for ml-latest-small, letters", ("ml-latest-small", "letters")
    ),
    "all-prompts-beauty-letters": Program(
        "experiments.all_prompts", 840, "the same for Beauty, letters", ("amazon-2014-beauty", "letters")
    ),
}


def run_section(name: str, output: Path, options: Sequence[str], seconds: float | None = None) -> bool:
    """Run one section, write its file, and return whether it succeeded.

    Args:
        name: a key of :data:`SECTIONS`.
        output: folder for the file.
        options: options that every section takes.
        seconds: deadline. Default: the section's own.
    """
    program = SECTIONS[name]
    deadline = program.seconds if seconds is None else seconds
    output.mkdir(parents=True, exist_ok=True)
    # Sections write other files beside their findings: scores and adapters.
    findings, log = output / f".{name}-findings.json", output / f".{name}.log"
    findings.unlink(missing_ok=True)
    command = [sys.executable, "-m", program.module, *program.arguments, "--result", str(findings), *options]
    started = time.perf_counter()
    status = _status(command, log, deadline)
    content = {
        "section": name,
        "status": status,
        **machine_facts("--dry-run" in options),
        "seconds": round(time.perf_counter() - started, 1),
        "findings": json.loads(findings.read_text(encoding="utf-8")) if findings.exists() else {},
    }
    if status != "finished":
        content["output"] = log.read_text(encoding="utf-8", errors="replace")[-QUOTED:]
    with replacing(output / f"{name}.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in (findings, log):
        path.unlink(missing_ok=True)
    print(f"{name}: {status} after {content['seconds']} s", flush=True)
    if status != "finished":
        print(content["output"], file=sys.stderr, flush=True)
    return status == "finished"


def _status(command: Sequence[str], log: Path, deadline: float) -> str:
    """Return how a command ended: ``finished``, ``failed`` or ``stopped at its deadline``."""
    with log.open("wb") as output:
        # In a session of its own, so that the servers and their steps that it starts are ended with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return "finished" if process.wait(deadline) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return f"stopped at its deadline of {deadline:g} s"
        finally:
            _end_session(process)


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def machine_facts(dry_run: bool) -> dict[str, Any]:
    """Return card, driver, date and commit."""
    card, driver, memory = "none, a dry run on the processor", "", ""
    if not dry_run:
        answer = subprocess.run(DRIVER_QUERY, capture_output=True, text=True, check=True).stdout
        card, driver, memory = (part.strip() for part in answer.splitlines()[0].split(","))
    return {
        "card": card,
        "driver": driver,
        "memory": memory,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of this code, and whether files differ from it."""
    if COMMIT_FILE.exists():
        return COMMIT_FILE.read_text(encoding="utf-8").strip()
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the given sections, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="Default: list them.")
    parser.add_argument("--all", action="store_true", help="Run every section.")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="Folder for the JSON files.")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="Deadline of each section.")
    add_section_options(parser)
    given = parser.parse_args(arguments)
    names = list(SECTIONS) if given.all else given.sections
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not names:
        print("\n".join(f"{name:28} {row.seconds:4} s  {row.summary}" for name, row in SECTIONS.items()))
        return 0
    if not given.dry_run:
        try:
            torch_device("gpu")
        except InputError as error:
            parser.error(f"{error}; --dry-run runs the sections on the processor")
    options = ["--bases", str(given.bases.resolve()), "--artifacts", str(given.artifacts.resolve())]
    options += ["--work", str(given.work.resolve())]
    options += ["--dry-run"] if given.dry_run else []
    succeeded = [run_section(name, given.output.resolve(), options, given.deadline) for name in names]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
