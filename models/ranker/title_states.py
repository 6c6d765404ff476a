"""Encodes titles by the states of a base language model, for retrievers trained with ``--titles model``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from models.device import torch_device
from models.ranker.base import EMBEDDED, base_fingerprint, find_base
from models.ranker.loading import load_causal_lm
from models.ranker.prompt import TOKENIZER_FILE
from models.titles.vectors import KIND, load_vectors, save_vectors
from models.titles.words import unit_rows
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import load_data
from preprocessing.progress import track

TOKENS = 32
"""Maximum number of tokens of a title that are read."""
WHITENING_FILE = "whitening.safetensors"
AT_ONCE = 32
"""Number of titles in a pass."""
LAYER_SHARE = 0.3
"""The layer whose states are read by default, as a share of all layers."""
DIMENSIONS = 256
"""Maximum number of dimensions of a title's vector."""


def encode_titles(
    artifacts: Path, base: str = EMBEDDED, *, layer: int | None = None, device: str = "auto", keep: bool = False
) -> NDArray[np.float32]:
    """Write ``artifacts/titles``, the whitened vectors of all titles of the catalogue, and return them.

    A finished artifact made with the same base and layer is left as it is.

    Args:
        artifacts: folder that holds ``data``.
        base: see :func:`models.ranker.base.find_base`.
        layer: number of layers after which the states are read. Default: :data:`LAYER_SHARE` of them.
        device: see :func:`models.device.torch_device`.
        keep: whether the projection of an earlier artifact there is kept, for a training that goes on from an earlier
            one, whose weights fit no other projection.

    Returns:
        the vectors [items + 1, dimensions], zeros for the padding first; each has length 1, or 0 for an empty title.

    Raises:
        InputError: there is no preprocessed data or no such base.
    """
    data_manifest = read_manifest(artifacts / "data", "data", "llamarec preprocess")
    folder = find_base(base, artifacts / "base")
    inputs = {"data": data_manifest.fingerprint, "base": base_fingerprint(folder)}
    options = {"base": base, "layer": layer}
    catalogue = load_data(artifacts).catalogue
    if not is_finished(artifacts / KIND, KIND, options=options, inputs=inputs):
        titles = [catalogue.title(item) for item in range(1, len(catalogue) + 1)]
        states = title_states(folder, titles, layer, torch_device(device))
        earlier = artifacts / KIND / WHITENING_FILE
        whitening = (
            Whitening(**load_file(earlier))
            if keep and earlier.is_file()
            else fit_whitening(states[: catalogue.trained])
        )
        vectors = np.concatenate((np.zeros((1, whitening.kept), np.float32), whitening(states)))
        with new_artifact(artifacts / KIND, KIND, options=options, inputs=inputs) as partial:
            save_vectors(partial, vectors)
            whitening.save(partial)
    return load_vectors(artifacts / KIND, len(catalogue))


@dataclass(frozen=True)
class Whitening:
    """A projection of states to dimensions that are uncorrelated and vary equally over the titles of a catalogue.

    A language model's states share a few large components, which say little about a title and would dominate the
    likeness of two titles.
    """

    mean: NDArray[np.float32]
    """Mean state [hidden]."""
    projection: NDArray[np.float32]
    """The projection [hidden, dimensions]."""

    @property
    def kept(self) -> int:
        """Number of dimensions."""
        return self.projection.shape[1]

    def __call__(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the vectors [titles, dimensions] of states [titles, hidden]; each has length 1, or 0 for no title."""
        centred = (states - self.mean) * states.any(axis=1, keepdims=True)
        return unit_rows(centred @ self.projection)

    def save(self, folder: Path) -> None:
        """Write the projection into an existing folder, so that a title that is added later is encoded alike."""
        save_file({"mean": self.mean, "projection": self.projection}, folder / WHITENING_FILE)


def fit_whitening(states: NDArray[np.float32]) -> Whitening:
    """Return the whitening of states [titles, hidden], to at most :data:`DIMENSIONS` of their principal components."""
    encoded = states[states.any(axis=1)].astype(np.float64)
    mean = encoded.mean(axis=0) if len(encoded) else np.zeros(states.shape[1])
    centred = encoded - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / max(len(encoded), 1))
    largest = np.argsort(-variances)[: min(DIMENSIONS, max(len(encoded) - 1, 1))]
    scales = np.sqrt(np.maximum(variances[largest], np.finfo(np.float32).eps))
    return Whitening(mean.astype(np.float32), (directions[:, largest] / scales).astype(np.float32))


@torch.inference_mode()
def title_states(base: Path, titles: Sequence[str], layer: int | None, device: str = "cpu") -> NDArray[np.float32]:
    """Return each title's mean state over its tokens [titles, hidden]; zeros for a title without tokens.

    Titles of similar length share a pass, which computes the layers up to ``layer`` only.

    Args:
        base: folder of the base.
        titles: the titles.
        layer: number of layers after which the states are read. Default: :data:`LAYER_SHARE` of them.
        device: PyTorch's name of the device.
    """
    tokenizer = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    tokenizer.no_padding()
    tokens = [encoding.ids[:TOKENS] for encoding in tokenizer.encode_batch(list(titles), add_special_tokens=False)]
    decoder = load_causal_lm(base, "give another base", dtype=torch.float32).get_decoder()
    decoder.layers = decoder.layers[: layer or round(LAYER_SHARE * len(decoder.layers))]
    decoder.norm = torch.nn.Identity()
    decoder.to(device)
    states = np.zeros((len(titles), decoder.config.hidden_size), np.float32)
    order = sorted((place for place, ids in enumerate(tokens) if ids), key=lambda place: len(tokens[place]))
    batches = [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]
    for places in track(batches, "encoding titles", len(batches)):
        longest = len(tokens[places[-1]])
        # Padding on the right: no token of a causal model sees it.
        ids = torch.tensor([tokens[place] + [0] * (longest - len(tokens[place])) for place in places], device=device)
        real = torch.tensor([[1.0] * len(tokens[place]) + [0.0] * (longest - len(tokens[place])) for place in places])
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state.float().cpu()  # [titles, length, hidden]
        states[places] = ((hidden * real.unsqueeze(-1)).sum(dim=1) / real.sum(dim=1, keepdim=True)).numpy()
    return states
