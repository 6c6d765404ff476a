"""Device names: what each of them means, and the error for a device that this machine does not have."""

from pathlib import Path

import pytest
import torch

from models import device as module
from models.device import random_state, restore_random_state, torch_device
from preprocessing.errors import InputError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes PyTorch report a number of GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("name", "count", "found"),
    [
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("gpu", 2, "cuda:0"),
        ("cuda", 2, "cuda:0"),
        ("gpu:1", 2, "cuda:1"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_each_name_is_one_of_pytorchs(gpus, name: str, count: int, found: str):
    """PyTorch writes ``cuda:N``; ``cuda`` is an alias, and resolving a name twice changes nothing."""
    gpus(count)
    assert torch_device(name) == found
    assert torch_device(found) == found


@pytest.mark.parametrize("name", ["", "gpu:", "gpu:-1", "tpu", "cuda0", "GPU", "cpu:0"])
def test_other_names_are_refused(gpus, name: str):
    """The error lists the valid names."""
    gpus(1)
    with pytest.raises(InputError, match="choose auto, cpu, gpu or gpu:N"):
        torch_device(name)


@pytest.mark.parametrize(
    ("count", "cuda", "driver", "remedy"),
    [
        (2, "13.0", True, "this machine has 2 GPUs, numbered from 0"),
        (0, None, True, "install a CUDA build"),
        (0, "13.0", True, "does not support CUDA 13.0, .*: update the driver"),
        (0, "13.0", False, "no NVIDIA driver: install it"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(gpus, monkeypatch, tmp_path: Path, count, cuda, driver, remedy):
    """The error distinguishes a number too high, a build without CUDA, a driver older than the build, and no driver."""
    gpus(count)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(module, "DRIVER", tmp_path / "version")
    if driver:
        (tmp_path / "version").touch()
    with pytest.raises(InputError, match=rf"device gpu:7 cannot be used: .*{remedy}"):
        torch_device("gpu:7")


def test_a_training_goes_on_with_its_own_random_numbers(monkeypatch):
    """On the CPU the same numbers are drawn again; on a GPU, only the state of that GPU is saved and restored."""
    state = random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    restore_random_state([{"cpu": torch.get_rng_state()}, state], torch.device("cpu"), 1)
    assert torch.equal(torch.rand(3), drawn)
    assert set(state) == {"cpu"}

    states = {torch.device("cuda:0"): "first", torch.device("cuda:1"): "second"}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    saved = random_state(torch.device("cuda:1"))
    assert saved["cuda"] == "second"
    states[torch.device("cuda:1")] = "drawn from"
    restore_random_state([saved], torch.device("cuda:1"), 1)  # a process that the training did not have then
    assert states[torch.device("cuda:1")] == "drawn from"
    restore_random_state([saved], torch.device("cuda:1"), 0)
    assert states == {torch.device("cuda:0"): "first", torch.device("cuda:1"): "second"}
