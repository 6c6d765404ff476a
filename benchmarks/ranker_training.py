"""Prompts a second of training the ranker, beside the plain way, on the same base.

    python -m benchmarks.ranker_training --json
    python -m benchmarks.ranker_training --steps 1 --batch 4 --busy    # a few minutes on a slow and busy machine

Plain is what the paper's authors do, without the quantisation: fp32, prompts padded to the longest, the head at every
position, adapters on all layers. The rungs above it each add one thing; all but the last compute exactly the gradients
of their adapters, the last draws other examples: four candidate pools behind each history. Everything runs in one
process, in turn, and medians are printed. A step is forward, backward and AdamW.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import add_clock, chosen_clock
from benchmarks.movie_prompts import embedded_base, letters, movie_prompts
from models.ranker.options import PRESETS
from models.ranker.qlora import add_adapters, answer_loss, load_base
from models.ranker.scoring import has_native_bf16

END = 2
UPPER = PRESETS["smollm2-135m"]["layers"]
POOLS = 4
FLOOR = 2.2
ADAPTERS: dict[str, Any] = {"rank": 8, "alpha": 32, "dropout": 0.05, "targets": ("q_proj", "v_proj")}


def plain_loss(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Transformers' causal loss over a padded batch, logits everywhere, everything but the answers ignored."""
    length = max(map(len, prompts)) + len(answers[0])
    tokens = torch.full((len(prompts), length), END)
    labels = torch.full((len(prompts), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
    return loss


def rungs(native: bool) -> dict[str, tuple[Callable[..., Tensor], dict[str, Any], torch.dtype, bool]]:
    """Name to loss, adapters' layers, precision, and whether four pools share a history."""
    best = torch.bfloat16 if native else torch.float32
    upper = {"layers": UPPER}
    ladder = {
        "plain": (plain_loss, {}, torch.float32, False),
        "head at the answers, packed": (answer_loss, {}, torch.float32, False),
        f"adapters on the upper {UPPER} layers": (answer_loss, upper, torch.float32, False),
        "bf16": (answer_loss, upper, best, False),
        f"{POOLS} pools behind a history": (answer_loss, upper, best, True),
    }
    return ladder if native else {name: rung for name, rung in ladder.items() if name != "bf16"}


def measure(steps: int, batch: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds a prompt of every rung, medians over ``steps`` rounds of ``batch`` prompts."""
    ladder = rungs(has_native_bf16("cpu"))
    models = {}
    for name, (_, layers, dtype, _) in ladder.items():
        key = (dtype, layers.get("layers"))
        if key not in models:
            base = load_base(embedded_base(), quantisation="none", dtype=dtype, device="cpu")
            model = add_adapters(base, **ADAPTERS, **layers)
            models[key] = (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        step(*models[key], ladder[name][0], movie_prompts(1))  # the first one warms up
    seconds: dict[str, list[float]] = {name: [] for name in ladder}
    for number in range(steps):
        apart = movie_prompts(batch, seed=number)
        together = movie_prompts(-(-batch // POOLS), POOLS, seed=number)
        for name, (loss, layers, dtype, shares) in ladder.items():
            prompts = together if shares else apart
            started = clock()
            step(*models[dtype, layers.get("layers")], loss, prompts)
            seconds[name].append((clock() - started) / len(prompts))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "prompts_a_step": batch,
        "rounds": steps,
        "threads": torch.get_num_threads(),
        "bf16": has_native_bf16("cpu"),
        "seconds_a_prompt": {name: round(value, 3) for name, value in medians.items()},
        "times_plain": {name: round(medians["plain"] / value, 2) for name, value in medians.items()},
        "best": best,
        "floor_met": medians["plain"] / medians[best] >= FLOOR,
    }


def step(model: Any, optimizer: Any, loss: Callable[..., Tensor], prompts: list[list[int]]) -> None:
    """One optimisation step; the answer is always A and the end."""
    loss(model, prompts, [[letters()[0], END]] * len(prompts)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Parses the command line and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="rounds, of which the median is printed")
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    add_clock(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    result = {**measure(given.steps, given.batch, chosen_clock(given)), "processor_seconds": given.busy}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result["seconds_a_prompt"].items():
        print(f"{name:36} {value:8.3f} s a prompt  {result['times_plain'][name]:5.2f}x")
    print(f"floor of {FLOOR}x met: {result['floor_met']}")


if __name__ == "__main__":
    main()
