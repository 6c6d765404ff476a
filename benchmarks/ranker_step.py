"""Measures the seconds per prompt of a training step of the ranker, from the baseline to the preset of this project.

    python -m benchmarks.ranker_step --json
    python -m benchmarks.ranker_step --steps 1 --batch 4 --busy    # a few minutes on a slow machine with other work

The baseline (``plain``) is the implementation of the paper's authors without the quantisation: fp32, prompts padded to
the longest, the head at every position, adapters on all layers, computed by peft. Each further rung adds one change and
computes exactly the gradients of its adapters, with two exceptions: four candidate pools that share a history are
different examples, and the lines of the lower layers (the preset `smollm2-135m`) have a different loss. All rungs run
in one process, in turn; figures are medians. A step is a forward pass, a backward pass and AdamW.
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

from benchmarks.clock import add_clock, add_device, chosen_clock
from benchmarks.movie_prompts import embedded_base, letters, movie_prompts
from models.ranker.fitting.qlora import add_adapters, answer_loss, line_loss, load_base
from models.ranker.options import PRESETS
from models.ranker.precision import has_native_bf16
from models.ranker.prompt import Prompt

END = 2
"""Token id of the base's end of text."""
UPPER = 12
DEPTH = PRESETS["smollm2-135m"]["depth"]
POOLS, CANDIDATES = 4, 20
FLOOR = 2.2
"""Minimum speed-up over the baseline."""
ADAPTERS: dict[str, Any] = {"rank": 8, "alpha": 32, "dropout": 0.05, "targets": ("q_proj", "v_proj")}


@dataclass(frozen=True)
class Rung:
    """One implementation of the training step."""

    loss: Callable[[Any, list[Prompt]], Tensor]
    layers: int | None = None
    """Number of upper layers with adapters; all if absent."""
    depth: int | None = None
    """Number of lower layers that are kept; all if absent."""
    dtype: torch.dtype = torch.float32
    pools: int = 1
    """Candidate pools that share a history."""


def answers_of(prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of the prompts and of their answers, which are always A and the end of text."""
    return [prompt.tokens for prompt in prompts], [[letters()[0], END]] * len(prompts)


def plain_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Return the causal loss of transformers over a padded batch: logits everywhere, labels at the answers only."""
    prompts, answers = answers_of(given)
    length = max(map(len, prompts)) + len(answers[0])
    tokens = torch.full((len(prompts), length), END)
    labels = torch.full((len(prompts), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    tokens, labels = tokens.to(model.device), labels.to(model.device)
    loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
    return loss


def letter_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Return the loss at the letter and the end of text, with packed prompts."""
    return answer_loss(model, *answers_of(given))


def lower_loss(model: Any, given: list[Prompt]) -> Tensor:
    """Return the loss over the candidates' lines; the first candidate is the true one."""
    direction = torch.ones(model.config.hidden_size, device=model.device, requires_grad=True)
    return line_loss(model, direction, given, [0] * len(given), [torch.zeros(CANDIDATES)] * len(given))


def rungs(native: bool) -> dict[str, Rung]:
    """Return every rung by name, without bf16 if the processor has none."""
    best = torch.bfloat16 if native else torch.float32
    ladder = {
        "plain": Rung(plain_loss),
        "head at the answers, packed": Rung(letter_loss),
        f"adapters on the upper {UPPER} layers": Rung(letter_loss, UPPER),
        "bf16": Rung(letter_loss, UPPER, dtype=best),
        f"{POOLS} pools sharing a history": Rung(letter_loss, UPPER, dtype=best, pools=POOLS),
        f"lines of the lower {DEPTH} layers": Rung(lower_loss, depth=DEPTH, dtype=best),
    }
    return ladder if native else {name: rung for name, rung in ladder.items() if name != "bf16"}


def measure(steps: int, batch: int, clock: Callable[[], float], device: str) -> dict[str, Any]:
    """Return the seconds per prompt of every rung, medians over ``steps`` rounds of ``batch`` prompts."""
    ladder = rungs(has_native_bf16(device))
    models = {}
    for name, rung in ladder.items():
        base = load_base(embedded_base(), quantisation="none", dtype=rung.dtype, device=device, depth=rung.depth)
        model = add_adapters(base, **ADAPTERS, layers=rung.layers)
        if rung.loss is plain_loss:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_variant.clear()
        models[name] = (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        step(*models[name], rung, movie_prompts(1))  # warm-up
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
        "device": device,
        "bf16": has_native_bf16(device),
        "seconds_a_prompt": {name: round(value, 3) for name, value in medians.items()},
        "times_plain": {name: round(medians["plain"] / value, 2) for name, value in medians.items()},
        "best": best,
        "floor_met": medians["plain"] / medians[best] >= FLOOR,
    }


def step(model: Any, optimizer: Any, rung: Rung, prompts: list[Prompt]) -> None:
    """Take one optimisation step."""
    rung.loss(model, prompts).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="Rounds; their median is printed.")
    parser.add_argument("--batch", type=int, default=4, help="Prompts per step.")
    add_clock(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    given = parser.parse_args()
    clock = chosen_clock(given)
    result = {**measure(given.steps, given.batch, clock, given.device), "processor_seconds": given.busy}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result["seconds_a_prompt"].items():
        print(f"{name:36} {value:8.3f} s per prompt  {result['times_plain'][name]:5.2f}x")
    print(f"floor of {FLOOR}x met: {result['floor_met']}")


if __name__ == "__main__":
    main()
