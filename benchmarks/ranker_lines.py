"""How many prompts it takes until a letter stands for its title, with and without what candidates' lines are taught.

    python -m benchmarks.ranker_lines --artifacts artifacts/movielens-100k

Both ways train the embedded base on the same prompts, whose answer is an item of the history itself among few random
ones, and are validated on others: there is nothing to know, only the letter to find. Ranks at random among 6 have an
NDCG@10 of .551, the mean of 1 / log2(rank + 1); the first line is the untuned base.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llamarec.tables import print_table
from models.ranker.base import EMBEDDED, find_base
from models.ranker.examples import CopiedPools, sample_examples
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings
from models.ranker.tuning import tune
from models.ranker.verbalizer import letter_ids
from preprocessing.data import load_data

CANDIDATES = 6
HELD_OUT = 60


def measure(artifacts: Path, prompts: int, every: int, seed: int) -> list[dict[str, float]]:
    """NDCG@10 of held-out prompts behind every so many training prompts, without the lines and with them."""
    data = load_data(artifacts)
    base = find_base(EMBEDDED, artifacts / "base")
    tokenizer = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    preset = PRESETS["smollm2-135m"]
    changed = {"seed": seed, "patience": prompts, "validate_by": "letters"}
    taught = RankerTraining(**{**preset, **changed, "validate_every": every // preset["batch_size"]})
    plain = replace(taught, line_weight=0.0)
    settings = PromptSettings(max_history=plain.max_history, title_tokens=plain.title_tokens)
    builder = PromptBuilder(data.catalogue, tokenizer, settings)
    copying = CopiedPools(data.catalogue.trained, CANDIDATES, plain.max_history)
    examples = sample_examples(data.training, copying, count=prompts + HELD_OUT, seed=seed)
    scores = [np.zeros(CANDIDATES, np.float32)] * HELD_OUT
    found: list[dict[str, float]] = []
    for name, options in (("without", plain), ("with", taught)):
        with tempfile.TemporaryDirectory() as folder:
            tuned = tune(
                options,
                base,
                builder,
                letter_ids(tokenizer, RESPONSE, CANDIDATES),
                examples[HELD_OUT:],
                examples[:HELD_OUT],
                scores,
                Path(folder),
                name,
            )
        for place, row in enumerate(tuned.log):
            if len(found) <= place:
                found.append({"prompts": row["step"] * options.batch_size})
            found[place][name] = row["NDCG@10"]
    return found


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, required=True, help="holds data; the base is converted into it")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="prompts between two validations")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows = measure(given.artifacts, given.prompts, given.every, given.seed)
    if given.json:
        print(json.dumps(rows))
        return
    names = ["prompts", "without", "with"]
    print_table(
        f"NDCG@10 of {HELD_OUT} held-out prompts, {CANDIDATES} candidates", names, [[*r.values()] for r in rows]
    )


if __name__ == "__main__":
    main()
