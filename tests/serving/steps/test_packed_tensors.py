"""The one tensor in which a step hands on all that it made: whatever goes in comes out, and nothing else is read."""

import sys
import types
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llamarec_client.contract import TensorSpec
from serving.contract import CANDIDATE_ID, CANDIDATE_TEXT, HANDED_ON, HISTORY_ITEM, PACKED, STEP_SPECS, STEPS
from serving.steps.packing import DTYPES, PACKINGS, Packing
from serving.steps.worker import Inputs, Worker

NUMBERS = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


def values_of(spec: TensorSpec) -> st.SearchStrategy:
    """Arrays of a tensor's type of any length, NaN and infinities among the floats."""
    length = st.integers(0, 9) if spec.shape == (-1,) else st.just(1)
    if spec.data_type == "STRING":
        return length.flatmap(lambda size: st.lists(st.binary(max_size=20), min_size=size, max_size=size))
    return length.flatmap(lambda size: arrays(NUMBERS[spec.data_type], size))


@pytest.mark.parametrize("step", STEPS[:-1])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_packed_comes_out_bit_by_bit(step, data):
    """Any arrays of the contract's types, at any place in memory: Triton gives no alignment of a tensor of bytes."""
    answer = {spec: data.draw(values_of(spec)) for spec in HANDED_ON[step]}
    packing = PACKINGS[PACKED[step].name]
    packed = packing.pack(answer)
    shifted = np.concatenate((np.zeros(3, np.uint8), packed))[3:]
    found = packing.unpack(shifted)
    assert list(found) == list(HANDED_ON[step])
    for spec, array in found.items():
        assert array.dtype == DTYPES[spec.data_type]
        expected = np.asarray(answer[spec], DTYPES[spec.data_type])
        assert array.tolist() == expected.tolist() or array.tobytes() == expected.tobytes()


def test_tensors_of_another_version_are_refused():
    """A step that was restarted after an upgrade must not take one tensor for another."""
    other = Packing([*HANDED_ON["features"], TensorSpec("NEW", "INT32", (-1,))])
    packed = other.pack({spec: [1] if spec.shape == (1,) else [] for spec in other._specs})
    with pytest.raises(RuntimeError, match="different versions of llamarec: restart the server"):
        PACKINGS["FEATURES_PACKED"].unpack(packed)


def test_each_step_gets_all_that_it_takes():
    """What a step takes is in what the step before it packs, also where an earlier one made it."""
    for before, step in pairwise(STEPS):
        assert set(STEP_SPECS[step].inputs) <= set(HANDED_ON[before])


def test_what_no_later_step_takes_goes_no_further():
    """Written by hand: of the features, the ranker takes the limit and the user alone."""
    handed = {spec.name for spec in HANDED_ON["prompt_builder"]}
    assert handed.isdisjoint({"HISTORY_ITEM", "EXCLUDED_ITEM", "GIVEN_ITEM", "HISTORY_TEXT", "CANDIDATE_TEXT"})
    assert {"LIMIT", "USER", "CANDIDATE_ID", "TOKEN"} <= handed


def test_a_worker_hands_on_one_tensor_and_takes_it(monkeypatch):
    """`retriever` packs its candidates, and of what it received that which later steps take."""
    tensor = lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array)  # noqa: E731
    utils = types.SimpleNamespace(
        Tensor=tensor,
        InferenceResponse=lambda output_tensors: {made.name: made for made in output_tensors},
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)

    def asking(inputs, *outputs):
        return types.SimpleNamespace(inputs=inputs, requested_output_names=lambda: outputs)

    encoded = {spec: [7] if spec.shape == (1,) else [] for spec in HANDED_ON["features"]} | {HISTORY_ITEM: [5, 6]}
    features = tensor("FEATURES_PACKED", PACKINGS["FEATURES_PACKED"].pack(encoded)[np.newaxis])
    answer = {spec: [3, 1] for spec in STEP_SPECS["retriever"].outputs if spec.data_type != "STRING"}
    answer |= {CANDIDATE_ID: [b"three", b""], CANDIDATE_TEXT: []}
    step = types.SimpleNamespace(answer=lambda tensors: answer)
    worker = Worker("retriever", step)
    (response,) = worker.execute([asking({"FEATURES_PACKED": features}, "RETRIEVER_PACKED")])
    assert list(response) == ["RETRIEVER_PACKED"]
    assert response["RETRIEVER_PACKED"].as_numpy().shape[0] == 1

    read = Inputs("prompt_builder").read(asking(response))
    assert {spec.name: array.tolist() for spec, array in read.items()} == {
        "HISTORY_ITEM": [5, 6],
        "HISTORY_TEXT": [],
        "LIMIT": [7],
        "USER": [],
        "CANDIDATE_ITEM": [3, 1],
        "CANDIDATE_ID": [b"three", b""],
        "CANDIDATE_SCORE": [3, 1],
        "CANDIDATE_RANK": [3, 1],
        "CANDIDATE_TEXT": [],
        "CANDIDATE_BOOST": [3, 1],
    }

    # A health probe asks this step alone, without the tensors of earlier steps; Triton names all outputs for it.
    alone = asking({"LIMIT": tensor("LIMIT", np.array([[0]]))}, "CANDIDATE_ITEM", "RETRIEVER_PACKED")
    (response,) = worker.execute([alone])
    assert response["CANDIDATE_ITEM"].as_numpy().tolist() == [[3, 1]]
    assert "RETRIEVER_PACKED" not in response
