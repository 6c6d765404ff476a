"""The one tensor in which a step hands on all that it made: whatever goes in comes out, and nothing else is read."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llamarec_client.contract import TensorSpec
from serving.contract import HANDED_ON, PACKED, STEP_SPECS, STEPS
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
    found = dict(packing.unpack(shifted, HANDED_ON[step]))
    assert list(found) == list(HANDED_ON[step])
    for spec, array in found.items():
        assert array.dtype == DTYPES[spec.data_type]
        expected = np.asarray(answer[spec], DTYPES[spec.data_type])
        assert array.tolist() == expected.tolist() or array.tobytes() == expected.tobytes()


def test_only_what_is_wanted_is_unpacked():
    """The ranker reads two of the nine tensors that `features` packs."""
    packing = PACKINGS["FEATURES_PACKED"]
    packed = packing.pack({spec: [1] if spec.shape == (1,) else [] for spec in HANDED_ON["features"]})
    assert {spec.name for spec, _ in packing.unpack(packed, STEP_SPECS["ranker"].inputs)} == {"LIMIT", "USER"}


def test_tensors_of_another_version_are_refused():
    """A step that was restarted after an upgrade must not take one tensor for another."""
    other = Packing([*HANDED_ON["features"], TensorSpec("NEW", "INT32", (-1,))])
    packed = other.pack({spec: [1] if spec.shape == (1,) else [] for spec in other._specs})
    with pytest.raises(RuntimeError, match="different versions of llamarec: restart the server"):
        dict(PACKINGS["FEATURES_PACKED"].unpack(packed, HANDED_ON["features"]))


def test_every_tensor_between_steps_is_packed():
    """Written by hand: what `retriever`, `prompt_builder` and `ranker` take is made by exactly one earlier step."""
    for place, step in enumerate(STEPS[1:], 1):
        for spec in STEP_SPECS[step].inputs:
            makers = [earlier for earlier in STEPS[:place] if spec in HANDED_ON[earlier]]
            assert len(makers) == 1, spec.name


def test_a_worker_hands_on_one_tensor_and_takes_it(monkeypatch):
    """`retriever` answers with its packed candidates; `prompt_builder` reads them and the history like single ones."""
    tensor = lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array)  # noqa: E731
    utils = types.SimpleNamespace(
        Tensor=tensor,
        InferenceResponse=lambda output_tensors: {made.name: made for made in output_tensors},
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)

    def asking(inputs, *outputs):
        return types.SimpleNamespace(inputs=inputs, requested_output_names=lambda: outputs)

    answer = {spec: [3, 1] if spec.data_type != "STRING" else [b"three", b""] for spec in HANDED_ON["retriever"]}
    step = types.SimpleNamespace(answer=lambda tensors: answer)
    (response,) = Worker("retriever", step).execute([asking({}, "RETRIEVER_PACKED")])
    assert list(response) == ["RETRIEVER_PACKED"]
    assert response["RETRIEVER_PACKED"].as_numpy().shape[0] == 1

    history = {spec: [7] if spec.shape == (1,) else [] for spec in HANDED_ON["features"]}
    history |= {spec: [5, 6] for spec in history if spec.name == "HISTORY_ITEM"}
    features = tensor("FEATURES_PACKED", PACKINGS["FEATURES_PACKED"].pack(history)[np.newaxis])
    read = Inputs("prompt_builder").read(asking({"FEATURES_PACKED": features, **response}))
    assert {spec.name: array.tolist() for spec, array in read.items()} == {
        "HISTORY_ITEM": [5, 6],
        "CANDIDATE_ITEM": [3, 1],
        "HISTORY_TEXT": [],
        "CANDIDATE_TEXT": [b"three", b""],
    }
