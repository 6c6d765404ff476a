"""Chooses the ranker's runtime for this machine, and opens a merged model in it."""

import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path

from models.device import torch_device
from models.ranker.inference.openvino_support import UNSUPPORTED, openvino_runs
from models.ranker.inference.scorer import Runtime, Scorer
from preprocessing.errors import InputError


def choose_runtime(device: str = "auto") -> Runtime:
    """Return the fastest accurate runtime of a device.

    A GPU computes in fp16, the precision in which merged models are stored. A processor computes in bf16 with OpenVINO
    where it multiplies bf16 natively and OpenVINO is installed, and elsewhere in fp32 with PyTorch.

    Args:
        device: see :func:`models.device.torch_device`.

    Raises:
        InputError: this machine has no such device.
    """
    from models.ranker.precision import has_native_bf16  # not at module level: OpenVINO serves without torch

    place, threads = torch_device(device), len(os.sched_getaffinity(0))
    if place != "cpu":
        # Without the number of the GPU: Triton tells each instance its own.
        return Runtime(runtime="torch", dtype="float16", threads=threads, device="cuda")
    native = has_native_bf16("cpu")
    installed = importlib.util.find_spec("openvino") is not None
    return Runtime(
        runtime="openvino" if native and installed else "torch",
        dtype="bfloat16" if native else "float32",
        threads=threads,
        device="cpu",
    )


def suited_runtime(runtime: Runtime, folder: Path, *, chosen: bool) -> Runtime:
    """Return ``runtime``, or PyTorch in the same precision if OpenVINO cannot run the model, and log that.

    Args:
        runtime: see :class:`Runtime`.
        folder: the merged model's Hugging Face folder.
        chosen: whether the caller asked for this runtime by name.

    Raises:
        InputError: OpenVINO was asked for by name and cannot run the model.
    """
    if runtime.runtime != "openvino" or openvino_runs(folder):
        return runtime
    if chosen:
        raise InputError(UNSUPPORTED)
    logging.getLogger(__name__).warning("the ranker runs in PyTorch: OpenVINO's graph does not know this model")
    return replace(runtime, runtime="torch")


def load_scorer(folder: Path, runtime: Runtime) -> Scorer:
    """Return a scorer that runs a merged model.

    Args:
        folder: the model's Hugging Face folder.
        runtime: see :class:`Runtime`; for PyTorch, the thread count is set for the whole process.

    Raises:
        InputError: the runtime is not installed, or cannot run this model.
    """
    if runtime.runtime == "torch":
        return _torch_scorer(folder, runtime)
    try:
        from models.ranker.inference.openvino_scorer import OpenVinoScorer
    except ModuleNotFoundError as error:
        raise InputError(
            f"this ranker was exported for OpenVINO, which is not installed ({error}):"
            " pip install 'llamarec[openvino]', or export with --runtime torch"
        ) from None
    return OpenVinoScorer(folder, runtime)


def _torch_scorer(folder: Path, runtime: Runtime) -> Scorer:
    """Return the scorer of the packed forward if the runtime asks for it or is on a GPU, else that of transformers.

    Raises:
        InputError: the runtime names the packed forward, or fp8, which only that computes, and it does not compute the
            model.
    """
    from models.ranker.forward.shape import UnsupportedBaseError
    from models.ranker.inference.packed_scorer import PackedScorer
    from models.ranker.inference.torch_scorer import TorchScorer

    packed = runtime.forward == "packed" or runtime.dtype == "float8"
    if packed or (runtime.forward == "auto" and runtime.device != "cpu"):
        try:
            return PackedScorer(folder, runtime)
        except UnsupportedBaseError as reason:
            if packed:
                raise
            logging.getLogger(__name__).warning(
                "the ranker runs one prompt at a time in transformers' layers: %s", reason
            )
    return TorchScorer(folder, runtime)
