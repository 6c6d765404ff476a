"""Several processes under `accelerate launch`: the same loss and gradients as one, and one that writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_base

from models.processes import share_of
from serving.server.programs import free_ports

PROGRAM = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path

import pytest, torch
from ranker_artifacts import write_artifacts

from models.ranker import training
from models.ranker.fitting import loop
from models.ranker.options import RankerTraining

folder, base, options = Path(sys.argv[1]), sys.argv[2], RankerTraining(**json.loads(sys.argv[3]))
rank = os.environ["RANK"]
with pytest.MonkeyPatch.context() as patch:
    if rank == "0":
        write_artifacts(folder, patch)
        (folder / "ready").touch()
    else:
        from ranker_artifacts import made_up
        import numpy as np
        patch.setattr(training, "load_data", lambda _: made_up([np.arange(20, 30, dtype=np.int32)] * 4))
        while not (folder / "ready").exists():
            time.sleep(0.05)

        def refused(*given, **named):
            raise AssertionError("only the first process writes")

        patch.setattr(training, "new_artifact", refused)
        patch.setattr(loop, "plot_curves", refused)
        patch.setattr(loop, "_events", refused)
        patch.setattr(loop.Checkpoint, "save", refused)
    gradients, summed = [], loop.sum_gradients

    def kept(parameters, processes):
        summed(parameters, processes)
        gradients.append(torch.cat([one.grad.flatten() for one in parameters]).clone())

    patch.setattr(loop, "sum_gradients", kept)
    metrics = training.train_ranker(options, folder, base)
    if os.environ["WORLD_SIZE"] != "1":  # the others wait while the first one writes gigabytes
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout >= timedelta(hours=12), group.options._timeout
torch.save(gradients, folder / f"gradients-{rank}.pt")
print(json.dumps(metrics))
"""


def launched(program: Path, processes: int, *arguments: str) -> list[tuple[bytes, bytes]]:
    """Return what each process of `accelerate launch` prints.

    On CPUs, each call starts one process; the environment variables are those that mpirun or torchrun would set.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", str(program), *arguments]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(processes),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    running = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * processes, b"".join(printed[-1]).decode()[-3000:]
    return printed


@pytest.mark.thorough
def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    """Losses, gradients and validations of two processes over gloo are those of one, up to rounding.

    A batch has five prompts, so that the shares differ, and the last one has one, so that a process has none. All but
    the first process are kept from writing.
    """
    options = {
        "read": "lines", "max_prompts": 11, "batch_size": 5, "micro_batch_size": 2, "validation_users": 3,
        "dropout": 0.0,
        "validate_every": 2, "quantisation": "none", "dtype": "float32", "threads": 1, "warmup_steps": 0,
        "learning_rate": 1e-3, "checkpoint_every": 1, "checkpoint_minutes": 0,
    }  # fmt: skip
    base = tiny_base(tmp_path / "base")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found: dict[int, Any] = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        printed = launched(program, processes, str(folder), str(base), json.dumps(options))
        metrics = [json.loads(out.splitlines()[-1]) for out, _ in printed]
        gradients = [torch.load(folder / f"gradients-{rank}.pt") for rank in range(processes)]
        assert all(one == metrics[0] for one in metrics)
        assert all(torch.equal(a, b) for other in gradients for a, b in zip(other, gradients[0], strict=True))
        assert (folder / "ranker" / "merged" / "model.safetensors").is_file()
        found[processes] = metrics[0], gradients[0]
    (alone, expected), (shared, given) = found[1], found[2]
    assert [row["step"] for row in shared["training"]] == [0, 2, 3]
    for ours, theirs in zip(shared["training"], alone["training"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(given, expected, strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # The two did not each train alone: sums in another order differ in the last digits.
    assert any(not torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize(("rows", "processes"), [(16, 4), (5, 2), (1, 3), (0, 2)])
def test_shares_are_neighbours_and_together_everything(rows: int, processes: int):
    shares = [
        list(share_of(range(rows), SimpleNamespace(process_index=rank, num_processes=processes)))  # type: ignore[arg-type]
        for rank in range(processes)
    ]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
