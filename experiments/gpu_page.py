"""Writes the generated block of docs/results/gpu.md from the kept files of the device checks.

python -m experiments.gpu_page    # make results-gpu; add files with --from DIR

A file of `python -m benchmarks.device` is kept as docs/results/data/gpu/SECTION.json. A section without a file, and one
that did not finish, is shown as such.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.kept import PAGES, RANKERS, RETRIEVERS
from experiments.pages import table, write_blocks
from preprocessing.errors import InputError

PAGE = PAGES / "gpu.md"
KEPT = RETRIEVERS / "gpu"
NOT_RUN = "not run"
PAPER_SECONDS = {"generation": "56.16", "verbalizer": "less than 1"}
"""The paper's seconds to rank 20 titles of 20 tokens on its GPU (Figure 3, section 4.3)."""
Findings = Mapping[str, Any]
Figures = Iterator[tuple[str, str]]


def versions(found: Findings) -> Figures:
    """Yield the rates of the machine."""
    for name, flops in found["matmul_flops"].items():
        yield f"matrix product, {name}", f"{flops / 1e12:.0f} TFLOP/s"
    for name, rate in found["copy_bytes_a_second"].items():
        yield f"copy {name}", f"{rate / 1e9:.1f} GB/s"
    yield "PyTorch, transformers", ", ".join(found["versions"][name] for name in ("torch", "transformers"))


def correctness(found: Findings) -> Figures:
    """Yield every deviation from the processor with its tolerance."""
    checks: dict[str, Findings] = {f"scores, {name}": row for name, row in found["scores"].items()}
    for name, row in found["training"].items():
        checks |= {f"{part}, {name}": row[part] for part in ("loss", "gradient")}
    named = ("after an evaluation", "merged", "resumed")
    checks |= {name: found[name] for name in named}
    for name, row in checks.items():
        verdict = "met" if row["within"] else "**not met**"
        yield name, f"{row['deviation']:.2g} (at most {row['tolerance']:g}: {verdict})"


def ranking(name: str, row: Findings) -> Figures:
    """Yield the time of a pass over one prompt."""
    yield name, f"{1e3 * row['seconds']:.1f} ms a prompt, {row['share_of_matmul']:.2f} of the matrix product's rate"
    if not row["bit_equal_when_repeated"]:
        yield name, "**scores differ when repeated**"


def training(name: str, row: Findings) -> Figures:
    """Yield the time and memory of a training step."""
    memory = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    prompts = f"{row['prompts_a_step']} prompts of {row['tokens_a_prompt']:.0f} tokens"
    yield name, f"{row['seconds_a_step']:.2f} s for {prompts}{memory}"


def small_models(found: Findings) -> Figures:
    """Yield the passes and the training steps of every shape."""
    for shape, rows in found.items():
        for name, row in rows.items():
            if isinstance(row, dict):
                yield from (training if name.startswith("QLoRA") else ranking)(f"{shape}, {name}", row)


def forward(found: Findings) -> Figures:
    """Yield the operations a layer, and prompts a second in the lean forward and in transformers' layers."""
    for name, count in found["operations_a_layer"].items():
        yield f"operations a layer, {name}", f"{count}"
    for shape, rows in found.items():
        for name, row in rows.items() if shape != "operations_a_layer" else ():
            seconds, title = row["seconds"], f"{shape}, {name}"
            yield f"{title}: transformers", f"{1e3 * seconds['transformers']:.1f} ms a prompt"
            yield f"{title}: lean, alone", f"{1e3 * seconds['packed, alone']:.1f} ms a prompt"
            together = (
                f"{row['prompts_a_second']:.0f} prompts/s, {row['share_of_matmul']:.2f} of the matrix product's rate"
            )
            yield f"{title}: lean, packed", together
            passes = ", ".join(map(str, row["passes"]["rows"]))
            equal = "bits equal those alone" if row["bit_equal"] else "**bits differ from those alone**"
            yield f"{title}: passes", f"{passes} tokens; {equal}"


def trainer(found: Findings) -> Figures:
    """Yield the operations a layer, and the times of the trainer before and now."""
    for name, count in found["operations_a_layer"].items():
        yield f"operations a layer, 16 prompts, {name}", f"{count}"
    for title, rows in found.items():
        for name, row in rows.items() if title != "operations_a_layer" else ():
            if isinstance(row, dict):
                memory = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
                speed = rows["prompts"] / row["seconds"]
                yield f"{title}: {name}", f"{1e3 * row['seconds']:.0f} ms, {speed:.1f} prompts/s{memory}"
            elif isinstance(row, float):
                yield f"{title}: {name}", f"{1e3 * row:.1f} ms"


def llama_7b(found: Findings) -> Figures:
    """Yield QLoRA, merge, load, ranking and the paper's Figure 3."""
    yield from training("QLoRA step, rank 8", found["qlora"])
    yield "merge and write", f"{found['merge_seconds']:.0f} s"
    yield "load", f"{found['load_seconds']:.0f} s, {found['load_peak_bytes'] / 2**30:.1f} GiB"
    yield from ranking(f"ranking, {found['ranking']['tokens']:.0f} tokens", found["ranking"])
    for row in found["figure_3"]:
        name = f"Figure 3, titles of {row['title_tokens']} tokens"
        yield f"{name}: verbalizer", f"{row['verbalizer_seconds']:.3f} s"
        yield f"{name}: generation", f"{row['generation_seconds']:.1f} s"
    for way, seconds in PAPER_SECONDS.items():
        yield f"*the paper's Figure 3, titles of 20 tokens: {way}*", f"{seconds} s"


def ensemble(found: Findings) -> Figures:
    """Yield whether served answers equal offline ones, throughput by load, and the time to heal."""
    for row in found["served_equals_offline"]:
        yield (
            f"bit-identical answers at concurrency {row['concurrency']}",
            f"{row['identical']} of {row['users']} users",
        )
    for row in found["perf_analyzer"]:
        yield (
            f"perf_analyzer, {row['load']:g} in flight",
            f"{row['throughput']:.1f} requests/s, p99 {row['p99_ms']:.1f} ms",
        )
    yield "ranker killed until the next ranked answer", f"{found['healing_seconds']:.1f} s"


def all_prompts(found: Findings) -> Figures:
    """Yield the time of the training and NDCG@10 on the test users whose true item is in their list."""
    yield "training", f"{found['training_seconds']:.0f} s"
    for name, value in found["test"].items():
        yield name, f"{value:.4f}"


SECTIONS: Mapping[str, tuple[str, Callable[[Findings], Figures]]] = {
    "machine": ("The machine", versions),
    "correctness": ("Deviation from the processor in fp32", correctness),
    "small-models": ("Small models", small_models),
    "forward": ("The lean forward", forward),
    "training": ("The trainer", trainer),
    "llama-7b": ("The shape of Llama 2 7B, random weights", llama_7b),
    "ensemble": ("The Triton ensemble, embedded base", ensemble),
    "ensemble-7b": ("The Triton ensemble, shape of Llama 2 7B", ensemble),
    "all-prompts-ml-lines": ("All prompts of ml-latest-small, lines", all_prompts),
    "all-prompts-beauty-lines": ("All prompts of Beauty, lines", all_prompts),
    "all-prompts-ml-letters": ("All prompts of ml-latest-small, letters", all_prompts),
    "all-prompts-beauty-letters": ("All prompts of Beauty, letters", all_prompts),
}


def block() -> str:
    """Return the tables of every section; a section that has no file is listed as not run."""
    lines: list[str] = []
    missing = []
    for name, (title, figures) in SECTIONS.items():
        path = KEPT / f"{name}.json"
        if not path.exists():
            missing.append([title, f"`python -m benchmarks.device {name}`", NOT_RUN])
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        source = "{card}, driver {driver}, {date}, commit {commit}".format(**kept)
        lines += [f"### {title}", "", f"{source}.", ""]
        if kept["status"] == "finished":
            lines += [*table(("", "measured"), map(list, figures(kept["findings"]))), ""]
        else:
            lines += [f"The section {kept['status']}; its findings until then are in `{path.name}`.", ""]
    if missing:
        lines += [*table(("section", "command", ""), missing), ""]
    return "\n".join(lines)


def keep(folder: Path) -> None:
    """Copy the sections' files and the scores of a run to the kept ones.

    Raises:
        InputError: the folder has no file of a section, or one of a dry run.
    """
    files = [path for name in SECTIONS if (path := folder / f"{name}.json").exists()]
    if not files:
        raise InputError(f"{folder} has no file of `python -m benchmarks.device`: name its --output folder")
    for path in files:
        if not json.loads(path.read_text(encoding="utf-8"))["driver"]:
            raise InputError(f"{path} is of a dry run: keep files of a GPU only")
    KEPT.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copy(path, KEPT)
    for path in folder.glob("*-tuned.parquet"):
        shutil.copy(path, RANKERS)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, help="Keep the files in this folder first.")
    given = parser.parse_args()
    try:
        if given.folder:
            keep(given.folder)
    except InputError as error:
        parser.error(str(error))
    write_blocks(PAGE, {"sections": block()})


if __name__ == "__main__":
    main()
