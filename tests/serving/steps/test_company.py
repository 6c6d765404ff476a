"""The steps as Triton runs them, without Triton: a request's answer does not depend on what is handed over with it."""

import sys
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamarec_client.contract import CANDIDATES, EXCLUDE, HISTORY, HISTORY_TITLE
from serving.contract import PACKED, STEP_SPECS
from serving.layout import step_artifact
from serving.steps.features import FeaturesStep
from serving.steps.packing import PACKINGS
from serving.steps.prompt_builder import PromptBuilderStep
from serving.steps.retriever import RetrieverStep
from serving.steps.worker import Worker

CLOCK = "QUEUED"
"""The only tensor that depends on the time."""


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Stands in for ``triton_python_backend_utils``, which exists only inside the server."""
    utils = types.SimpleNamespace(
        Tensor=lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array),
        InferenceResponse=lambda output_tensors, error=None: {made.name: made for made in output_tensors},
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    utils.TritonError = type("TritonError", (), {"INVALID_ARG": 1, "__init__": lambda self, *about: None})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


@pytest.fixture(scope="module")
def chain(repository) -> list[tuple[str, Worker]]:
    """Return the three steps before the ranker."""
    loaded = {"features": FeaturesStep, "retriever": RetrieverStep, "prompt_builder": PromptBuilderStep}
    return [(name, Worker(name, step.load(step_artifact(repository, name)))) for name, step in loaded.items()]


def run(chain: list[tuple[str, Worker]], requests: list[dict[str, Any]], *, packed: bool) -> list[dict[str, bytes]]:
    """Return each request's tensors before the ranker, by name; only those of the step that refused it are missing."""
    flowing = [
        {name: types.SimpleNamespace(as_numpy=lambda a=array: a) for name, array in each.items()} for each in requests
    ]
    for name, worker in chain:
        outputs = [PACKED[name].name] if packed else [spec.name for spec in STEP_SPECS[name].outputs]
        alive = [place for place, tensors in enumerate(flowing) if tensors]
        asked = [
            types.SimpleNamespace(inputs=flowing[place], requested_output_names=lambda wanted=outputs: wanted)
            for place in alive
        ]
        for place, response in zip(alive, worker.execute(asked), strict=True):
            flowing[place] = ({} if packed else flowing[place]) | response if response else {}
    return [read(tensors) for tensors in flowing]


def read(tensors: dict[str, Any]) -> dict[str, bytes]:
    """Return the bytes of the tensors that reach the ranker."""
    if not tensors:
        return {}
    name = PACKED["prompt_builder"].name
    taken = {spec.name for spec in STEP_SPECS["ranker"].inputs}
    arrays = {name: tensor.as_numpy()[0] for name, tensor in tensors.items() if name in taken}
    if name in tensors:
        arrays = {spec.name: array for spec, array in PACKINGS[name].unpack(tensors[name].as_numpy()[0]).items()}
    return {
        name: repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
        for name, array in arrays.items()
        if name != CLOCK
    }


def texts(values: list[str]) -> np.ndarray:
    return np.array([[value.encode() for value in values]], dtype=object).reshape(1, len(values))


ids = st.integers(1, 400).map(str)
requests_ = st.fixed_dictionaries(
    {HISTORY.name: st.lists(ids, max_size=30)},
    optional={
        EXCLUDE.name: st.lists(ids, max_size=5),
        CANDIDATES.name: st.lists(ids | st.just("no such item"), max_size=20),
    },
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests_, min_size=2, max_size=8), titled=st.booleans())
def test_what_reaches_the_ranker_is_that_of_the_request_alone(chain, batch, titled):
    """Bit for bit, for a random batch with refused requests in it, packed as in an ensemble or as single tensors."""
    given_ = [{name: texts(values) for name, values in each.items()} for each in batch]
    if titled:
        given_[0][HISTORY_TITLE.name] = texts([f"Title {item}" for item in batch[0][HISTORY.name]])
    together = run(chain, given_, packed=True)
    assert together == [run(chain, [each], packed=True)[0] for each in given_]
    assert together == run(chain, given_, packed=False)
