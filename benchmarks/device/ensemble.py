"""Runs the real Triton ensemble with a ranker on the device.

The variant ``embedded`` tunes the embedded base briefly. The variant ``llama-7b`` tunes random weights of Llama 2 7B's
shape for one step, and is measured at a few loads only. The training runs here; export and server run where numpy 1.26
is (:mod:`benchmarks.device.served`).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.device.section import ROOT, Section, section_of
from benchmarks.device.shapes import LLAMA_2_7B, TINY, write_model
from benchmarks.unpack import RUN_SERVING
from models.ranker.inference.ranker import FUSION_FILE
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.training import train_ranker
from preprocessing.artifacts import MANIFEST, new_artifact, read_manifest


def measure(section: Section, variant: str) -> None:
    """Train the variant's ranker, and record what the server does with it."""
    train(section, variant, section.exported(variant)[0])
    if RUN_SERVING not in os.environ:
        from benchmarks.device import served  # not at module level: only the environment that serves has tritonclient

        served.measure(section, variant)
        return
    command = [os.environ[RUN_SERVING], "benchmarks.device.served", variant, "--result", str(section.result)]
    command += ["--work", str(section.work), "--bases", str(section.bases), "--artifacts", str(section.artifacts)]
    subprocess.run([*command, *(["--dry-run"] if section.dry_run else [])], cwd=ROOT, check=True)


def train(section: Section, variant: str, artifacts: Path) -> None:
    """Tune the variant's base into ``artifacts``, next to links to the data and the retriever of the section."""
    artifacts.mkdir(parents=True, exist_ok=True)
    for name in ("data", "retriever"):
        if not (artifacts / name).exists():
            (artifacts / name).symlink_to((section.artifacts / name).resolve())
    options = RankerTraining(**{**PRESETS["quick"], "device": section.device})
    base = section.embedded_base()
    if section.dry_run or variant != "embedded":
        shape = TINY if section.dry_run else LLAMA_2_7B
        base = write_model(shape, base, section.work / f"{variant}-base", section.device)
        options = RankerTraining(
            max_prompts=4, batch_size=4, validation_users=2, full_validation=False, device=section.device
        )
    train_ranker(options, artifacts, str(base))
    share_weight(artifacts / "ranker")
    if variant != "embedded":
        shutil.rmtree(base)


def share_weight(ranker: Path) -> None:
    """Give retriever and language model half of the weight each, so that every answer depends on both.

    A language model that has learned nothing gets no weight from the fit, and equal answers would then say little.
    """
    made = read_manifest(ranker, "ranker", "llamarec train-ranker")
    facts = dict(made.facts)
    with new_artifact(ranker, "ranker", options=made.options, inputs=made.inputs, facts=facts) as new:
        shutil.copytree(ranker, new, copy_function=os.link, dirs_exist_ok=True)
        for name in (MANIFEST, FUSION_FILE):
            (new / name).unlink()  # the links, not the files
        (new / FUSION_FILE).write_text(json.dumps({"weight": 0.5, "temperature": 1.0}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measure(*section_of(__doc__, None, "embedded", "llama-7b"))
