"""The generated ``config.pbtxt`` files and the committed repository."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from client.contract import ENSEMBLE, REQUEST, RESPONSE, RETRIEVAL_ENSEMBLE, STEPS
from export.config import CONFIG, MAX_BATCH_SIZE, REPOSITORY, model_configs, write_configs

ENSEMBLES = (ENSEMBLE, RETRIEVAL_ENSEMBLE)


def test_committed_files_are_the_generated_ones(tmp_path):
    """After a change to the contract: run ``python -m export.config`` and commit what it writes."""
    write_configs(tmp_path)
    generated = {path.parent.name: path.read_text() for path in tmp_path.glob(f"*/{CONFIG}")}
    committed = {path.parent.name: path.read_text() for path in REPOSITORY.glob(f"*/{CONFIG}")}
    assert generated == committed
    assert set(committed) == {*STEPS, *ENSEMBLES}


@pytest.mark.parametrize("name", [*STEPS, *ENSEMBLES])
def test_text_reads_back_as_the_same_message(name):
    """Triton's own protobuf refuses unknown fields and wrong types, and nothing is lost in the text."""
    text = (REPOSITORY / name / CONFIG).read_text()
    assert text_format.Parse(text, ModelConfig()) == model_configs()[name]


def test_a_clone_holds_all_that_triton_wants_of_a_repository():
    """A version folder for every model, an ensemble too: git keeps no empty folder."""
    for name in ENSEMBLES:
        assert any((REPOSITORY / name / "1").iterdir())
    for name in STEPS:
        assert (REPOSITORY / name / "1" / "model.py").is_file()


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_tensor_of_an_ensemble_is_made_before_it_is_taken(name):
    """What each step takes came in with the request or from an earlier step, with the type that step gives it."""
    configs = model_configs()
    known = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[name].input}
    for step in configs[name].ensemble_scheduling.step:
        inputs = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[step.model_name].input}
        outputs = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[step.model_name].output}
        assert set(step.input_map) == set(inputs)
        assert {inside: known[outside] for inside, outside in step.input_map.items()} == inputs
        for inside, outside in step.output_map.items():
            assert outside not in known, f"{outside} is made twice"
            known[outside] = outputs[inside]
    for tensor in configs[name].output:
        assert known[tensor.name] == (tensor.data_type, tuple(tensor.dims))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_no_output_of_an_ensemble_is_taken_by_a_step(name):
    """Such a tensor would deadlock requests that ask for a subset of the outputs."""
    steps = model_configs()[name].ensemble_scheduling.step
    taken = {tensor for step in steps for tensor in step.input_map.values()}
    assert taken.isdisjoint(spec.name for spec in RESPONSE)


def test_both_ensembles_take_and_give_the_same():
    """One is the other's fall-back: a client changes nothing but the name."""
    full, retrieval = (model_configs()[name] for name in ENSEMBLES)
    assert list(full.input) == list(retrieval.input)
    assert list(full.output) == list(retrieval.output)


def test_optional_inputs_enter_the_first_step_only():
    """Requests with different sets of optional inputs share no batch where those enter; later steps batch all."""
    optional = {spec.name for spec in REQUEST if spec.optional}
    for step in STEPS:
        inputs = {tensor.name for tensor in model_configs()[step].input if tensor.optional}
        assert inputs == (optional if step == "features" else set())


@pytest.mark.parametrize("step", STEPS)
def test_requests_of_different_lengths_may_share_a_batch(step):
    """Every input of variable length is ragged, and no request waits for company; CPU instances run anywhere."""
    config = model_configs()[step]
    assert config.max_batch_size == MAX_BATCH_SIZE == 64
    assert all(tensor.allow_ragged_batch == (-1 in tensor.dims) for tensor in config.input)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]
