"""Prompts a second of training the ranker, beside the plain way, on the same base.

    python -m benchmarks.ranker_training --json
    python -m benchmarks.ranker_training --steps 1 --batch 4 --busy    # a few minutes on a slow and busy machine

Plain is what the paper's authors do, without the quantisation: fp32, prompts padded to the longest, the head at every
position, adapters on all layers, computed by peft's own. The rungs above it each add one thing and compute exactly the
gradients of their adapters, but for two: four candidate pools behind each history are other examples, and the lines of
the lower layers, the preset `smollm2-135m`, are another loss. Everything runs in one process, in turn, and medians are
printed. A step is forward, backward and AdamW.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from benchmarks.clock import add_clock, chosen_clock
from benchmarks.movie_prompts import embedded_base, letters, movie_prompts
from models.ranker.fitting.qlora import add_adapters, answer_loss, line_loss, load_base
from models.ranker.options import PRESETS
from models.ranker.precision import has_native_bf16
from models.ranker.prompt import Prompt

END = 2
UPPER = 12
DEPTH = PRESETS["smollm2-135m"]["depth"]
POOLS, CANDIDATES = 4, 20
FLOOR = 2.2
ADAPTERS: dict[str, Any] = {"rank": 8, "alpha": 32, "dropout": 0.05, "targets": ("q_proj", "v_proj")}


@dataclass(frozen=True)
class Rung:
    """A way to train."""

    loss: Callable[[Any, list[Prompt]], Tensor]
    layers: int | None = None
    """How many of the upper layers have adapters."""
    depth: int | None = None
    """How many of the lower layers there are."""
    dtype: torch.dtype = torch.float32
    pools: int = 1
    """Candidate pools behind one history."""


def answers_of(prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of their answers: always A and the end."""
    return [prompt.tokens for prompt in prompts], [[letters()[0], END]] * len(prompts)


def plain_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Transformers' causal loss over a padded batch, logits everywhere, everything but the answers ignored."""
    prompts, answers = answers_of(given)
    length = max(map(len, prompts)) + len(answers[0])
    tokens = torch.full((len(prompts), length), END)
    labels = torch.full((len(prompts), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
    return loss


def letter_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Of the letter and the end behind packed prompts."""
    return answer_loss(model, *answers_of(given))


def lower_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Of the candidates' lines, the first candidate the true one."""
    direction = torch.ones(model.config.hidden_size, requires_grad=True)
    return line_loss(model, direction, given, [0] * len(given), [torch.zeros(CANDIDATES)] * len(given))


def rungs(native: bool) -> dict[str, Rung]:
    """Every rung by name, without the one for bf16 where the processor has none."""
    best = torch.bfloat16 if native else torch.float32
    ladder = {
        "plain": Rung(plain_loss),
        "head at the answers, packed": Rung(letter_loss),
        f"adapters on the upper {UPPER} layers": Rung(letter_loss, UPPER),
        "bf16": Rung(letter_loss, UPPER, dtype=best),
        f"{POOLS} pools behind a history": Rung(letter_loss, UPPER, dtype=best, pools=POOLS),
        f"lines of the lower {DEPTH} layers": Rung(lower_loss, depth=DEPTH, dtype=best),
    }
    return ladder if native else {name: rung for name, rung in ladder.items() if name != "bf16"}


def measure(steps: int, batch: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds a prompt of every rung, medians over ``steps`` rounds of ``batch`` prompts."""
    ladder = rungs(has_native_bf16("cpu"))
    models = {}
    for name, rung in ladder.items():
        base = load_base(embedded_base(), quantisation="none", dtype=rung.dtype, device="cpu", depth=rung.depth)
        model = add_adapters(base, **ADAPTERS, layers=rung.layers)
        if rung.loss is plain_loss:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_variant.clear()
        models[name] = (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        step(*models[name], rung, movie_prompts(1))  # the first one warms up
    seconds: dict[str, list[float]] = {name: [] for name in ladder}
    for number in range(steps):
        for name, rung in ladder.items():
            prompts = movie_prompts(-(-batch // rung.pools), rung.pools, seed=number)
            started = clock()
            step(*models[name], rung, prompts)
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


def step(model: Any, optimizer: Any, rung: Rung, prompts: list[Prompt]) -> None:
    """One optimisation step."""
    rung.loss(model, prompts).backward()
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
