"""Chooses the ranker's runtime for this machine, and opens a merged model in it."""

import importlib.util
import os
from pathlib import Path

from models.ranker.inference.scorer import Runtime, Scorer
from preprocessing.errors import InputError


def choose_runtime(device: str | None = None) -> Runtime:
    """Return the fastest accurate runtime of this machine.

    It computes in bf16 where the hardware multiplies bf16 natively, on a processor with OpenVINO if that is installed,
    and elsewhere in fp32 with PyTorch.

    Args:
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
    """
    import torch  # not at module level: OpenVINO serves without torch

    from models.ranker.precision import has_native_bf16

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    native = has_native_bf16(device)
    installed = importlib.util.find_spec("openvino") is not None
    return Runtime(
        runtime="openvino" if native and installed and device == "cpu" else "torch",
        dtype="bfloat16" if native else "float32",
        threads=len(os.sched_getaffinity(0)),
        device=device,
    )


def load_scorer(folder: Path, runtime: Runtime) -> Scorer:
    """Return a scorer that runs a merged model.

    Args:
        folder: the model's Hugging Face folder.
        runtime: see :class:`Runtime`; for PyTorch, the thread count is set for the whole process.

    Raises:
        InputError: the runtime is not installed, or cannot run this model.
    """
    if runtime.runtime == "torch":
        from models.ranker.inference.torch_scorer import TorchScorer

        return TorchScorer(folder, runtime)
    try:
        from models.ranker.inference.openvino_scorer import OpenVinoScorer
    except ModuleNotFoundError as error:
        raise InputError(
            f"this ranker was exported for OpenVINO, which is not installed ({error}):"
            " pip install 'llamarec[openvino]', or export with --runtime torch"
        ) from None
    return OpenVinoScorer(folder, runtime)
