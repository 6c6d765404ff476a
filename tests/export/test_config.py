"""Tests of the generated ``config.pbtxt`` files and of the committed model repository."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export.config import (
    CONFIG,
    DEFAULTS,
    REPOSITORY,
    Serving,
    config_text,
    model_configs,
    parse_processes,
    read_serving,
    write_configs,
)
from llamarec_client.contract import (
    ENSEMBLE,
    EVENTS,
    ITEMS,
    REQUEST,
    RETRIEVAL_ENSEMBLE,
    SIMILAR,
)
from preprocessing.errors import InputError
from serving.contract import (
    NEIGHBOURS,
    QUEUE_PARAMETER,
    RELEASE_STEPS,
    RETRIEVER_SCORES,
    SIZE_PARAMETER,
    STEP_SPECS,
    STEPS,
    STORE_MODELS,
    packed_input,
)

RECOMMENDING = (ENSEMBLE, RETRIEVAL_ENSEMBLE)
ENSEMBLES = (*RECOMMENDING, SIMILAR)


def test_committed_files_are_the_generated_ones(tmp_path):
    """The committed files equal the generated ones.

    After a change to the contract, run ``python -m export.config`` and commit what it writes.
    """
    write_configs(tmp_path)
    generated = {path.parent.name: path.read_text() for path in tmp_path.glob(f"*/{CONFIG}")}
    committed = {path.parent.name: path.read_text() for path in REPOSITORY.glob(f"*/{CONFIG}")}
    assert generated == committed
    assert set(committed) == {*RELEASE_STEPS, *ENSEMBLES, *STORE_MODELS}


@pytest.mark.parametrize("name", [*RELEASE_STEPS, *ENSEMBLES, *STORE_MODELS])
def test_text_reads_back_as_the_same_message(name):
    """Triton's own protobuf parses each file, so no field is unknown or of a wrong type, and no value is lost."""
    text = (REPOSITORY / name / CONFIG).read_text()
    assert text_format.Parse(text, ModelConfig()) == model_configs()[name]


def test_a_clone_holds_all_that_triton_wants_of_a_repository():
    """Every model, even an ensemble, has a version folder with a file in it: git does not store empty folders."""
    for name in ENSEMBLES:
        assert any((REPOSITORY / name / "1").iterdir())
    for name in (*RELEASE_STEPS, *STORE_MODELS):
        assert (REPOSITORY / name / "1" / "model.py").is_file()


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_tensor_of_an_ensemble_is_made_before_it_is_taken(name):
    """Each input of a step comes from the request or from an earlier step, with the type that is declared there."""
    configs = model_configs()
    known = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[name].input}
    for step in configs[name].ensemble_scheduling.step:
        inputs = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[step.model_name].input}
        outputs = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in configs[step.model_name].output}
        required = {tensor.name for tensor in configs[step.model_name].input if not tensor.optional}
        assert required <= set(step.input_map)
        for inside, outside in step.input_map.items():
            assert known[outside] == inputs[inside]
        for inside, outside in step.output_map.items():
            assert outside not in known, f"{outside} is made twice"
            known[outside] = outputs[inside]
    for tensor in configs[name].output:
        assert known[tensor.name] == (tensor.data_type, tuple(tensor.dims))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_no_output_of_an_ensemble_is_taken_by_a_step(name):
    """An output that is also a step's input would deadlock requests that ask for a subset of the outputs."""
    steps = model_configs()[name].ensemble_scheduling.step
    taken = {tensor for step in steps for tensor in step.input_map.values()}
    assert taken.isdisjoint(tensor.name for tensor in model_configs()[name].output)


def test_both_ensembles_take_and_give_the_same():
    """The retrieval ensemble is the fallback of the full one: a client only changes the model name."""
    full, retrieval = (model_configs()[name] for name in RECOMMENDING)
    assert list(full.input) == list(retrieval.input)
    assert list(full.output) == list(retrieval.output)


def test_optional_inputs_of_a_request_enter_the_first_step_only():
    """Requests with different sets of optional inputs cannot share a batch in a step that takes these inputs. Later
    steps can batch all requests: an ensemble gives them packed tensors alone, which every request has.
    """
    configs = model_configs()
    for name in RECOMMENDING:
        first, *later = configs[name].ensemble_scheduling.step
        assert set(first.input_map) == {spec.name for spec in REQUEST}
        for step in later:
            assert set(step.input_map) == {packed_input(step.model_name).name}


def test_three_tensors_go_from_step_to_step():
    """Each tensor costs the server and two processes time: every step but the last hands on one, and the retriever of
    the retrieval ensemble none. Written out by hand.
    """
    configs = model_configs()
    made = {name: [set(step.output_map) for step in configs[name].ensemble_scheduling.step] for name in ENSEMBLES}
    answer = {"ITEM_ID", "SCORE", "RETRIEVER_RANK"}
    packed = [{"FEATURES_PACKED"}, {"RETRIEVER_PACKED"}, {"PROMPT_BUILDER_PACKED"}]
    assert made[ENSEMBLE] == [*packed, answer]
    assert made[RETRIEVAL_ENSEMBLE] == [packed[0], answer]
    assert made[SIMILAR] == [{"ITEM_ID", "SCORE", "TRANSITIONS", "TITLES"}]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_still_takes_and_returns_single_tensors(step):
    """Health probes send them, and so does whoever asks a step alone; the contract names them."""
    config = model_configs()[step]
    assert {spec.name for spec in STEP_SPECS[step].inputs} <= {tensor.name for tensor in config.input}
    assert {spec.name for spec in STEP_SPECS[step].outputs} <= {tensor.name for tensor in config.output}


@pytest.mark.parametrize("step", [*RELEASE_STEPS, *STORE_MODELS])
def test_requests_of_different_lengths_may_share_a_batch(step):
    """Every input of variable length is ragged, no request waits for others, and the instances are CPU instances.

    The steps of a recommendation get one request at a time: they would answer all requests of a batch only after the
    last one.
    """
    config = model_configs()[step]
    assert config.max_batch_size == 64
    assert all(tensor.allow_ragged_batch == (-1 in tensor.dims) for tensor in config.input)
    assert config.HasField("dynamic_batching") == (step not in STEPS)
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]


@pytest.mark.parametrize(
    ("serving", "step", "text"),
    [
        (Serving(instances=2), "ranker", "count: 2"),
        (Serving(processes={"features": 3}), "features", "count: 3"),
        (Serving(processes={"neighbours": 2}), NEIGHBOURS, "count: 2"),
        (Serving(max_batch_size=8), "ranker", "max_batch_size: 8"),
        (Serving(max_batch_size=8), ENSEMBLE, "max_batch_size: 8"),
        (Serving(queue_delay_us=500), "ranker", "max_queue_delay_microseconds: 500"),
        (Serving(device="gpu"), "ranker", "kind: KIND_GPU"),
        (Serving(rank_cache=500), "ranker", 'string_value: "500"'),
        (Serving(prefix_cache=64), "ranker", 'string_value: "64"'),
        (Serving(store="sqlite:///x"), "features", 'string_value: "sqlite:///x"'),
        (Serving(store="sqlite:///x"), EVENTS, 'string_value: "sqlite:///x"'),
        (Serving(store="sqlite:///x"), ITEMS, 'string_value: "sqlite:///x"'),
        (Serving(retriever_runtime="onnxruntime"), "retriever_scores", 'backend: "onnxruntime"'),
        (Serving(retriever_runtime="onnxruntime"), "retriever", 'string_value: "retriever_scores"'),
    ],
)
def test_each_option_reaches_the_text_that_triton_parses(serving, step, text):
    """Triton's own protobuf parses every variant, even for the GPU and the ONNX backend, which are not run here."""
    for name, config in model_configs(serving).items():
        written = config_text(config)
        assert text_format.Parse(written, ModelConfig()) == config
        assert (text in written) or name != step


@pytest.mark.parametrize(
    "serving",
    [
        DEFAULTS,
        Serving(instances=2, max_batch_size=8, queue_delay_us=500, device="gpu:1", pass_seconds=0.2),
        Serving(device="gpu", rank_cache=500, prefix_cache=64, queue_seconds=1.5),
        Serving(device="gpu", pass_seconds=0.0005),
        Serving(processes={"retriever": 2, "prompt_builder": 3}),
        Serving(retriever_runtime="onnxruntime", store="sqlite:///x", pass_seconds=0.123456789),
    ],
)
@pytest.mark.parametrize("suffix", ["", "_r1"])
def test_the_options_are_read_back_from_the_files(tmp_path, serving, suffix):
    """The next release is served as this one: what was written is what is read, a wait that was not given as None."""
    write_configs(tmp_path, serving, suffix)
    assert read_serving(tmp_path, suffix, serving.pass_seconds) == serving


def test_triton_caches_nothing_and_queues_without_a_policy():
    """Triton's cache key ignores parameters and requested outputs, and its batcher stalls under any queue policy."""
    for config in model_configs(Serving(rank_cache=500)).values():
        assert not config.HasField("response_cache")
        assert not config.dynamic_batching.HasField("default_queue_policy")


@pytest.mark.parametrize(
    ("serving", "seconds"),
    [
        (Serving(pass_seconds=2), 16),
        (Serving(pass_seconds=0.01), 5),
        (Serving(pass_seconds=2, queue_seconds=1), 1),
    ],
)
def test_the_wait_for_the_ranker_is_limited_by_its_pass(serving, seconds):
    """The limit is eight passes and at least 5 s, or the value of the option; a caller may shorten it."""
    for step in ("prompt_builder", "ranker"):
        assert float(model_configs(serving)[step].parameters[QUEUE_PARAMETER].string_value) == seconds


@pytest.mark.parametrize(
    ("serving", "size"),
    [
        (Serving(pass_seconds=2), 7),
        (Serving(pass_seconds=2, instances=2), 14),
        (Serving(pass_seconds=0.01), 499),
        (Serving(pass_seconds=2, queue_seconds=1), 1),
        (Serving(pass_seconds=0.125, queue_seconds=1, device="gpu", max_batch_size=16), 7),
        (Serving(pass_seconds=2, processes={"prompt_builder": 2}), 3),
        (Serving(pass_seconds=2, processes={"prompt_builder": 9}), 1),
    ],
)
def test_as_many_may_wait_as_are_ranked_in_that_time(serving, size):
    """By hand: the queue holds the longest wait divided by the pass, minus the running pass, for each instance. Several
    processes that admit requests share it.
    """
    assert int(model_configs(serving)["prompt_builder"].parameters[SIZE_PARAMETER].string_value) == size


def test_a_suffix_names_every_model_of_a_release():
    """Two releases share no model: an ensemble lists only steps of its own release. Events and items belong to none."""
    configs = model_configs(Serving(retriever_runtime="onnxruntime"), "_r3")
    assert set(configs) == {f"{name}_r3" for name in (*RELEASE_STEPS, *ENSEMBLES, RETRIEVER_SCORES)}
    assert all(name == config.name for name, config in configs.items())
    for ensemble in ENSEMBLES:
        assert all(step.model_name.endswith("_r3") for step in configs[f"{ensemble}_r3"].ensemble_scheduling.step)
    assert configs["retriever_r3"].parameters["RETRIEVER_SCORES"].string_value == "retriever_scores_r3"


@pytest.mark.parametrize(
    "options",
    [
        {"instances": 0},
        {"processes": {"retriever": 0}},
        {"processes": {"ranker": 2}},
        {"processes": {"llamarec": 2}},
        {"max_batch_size": 0},
        {"queue_delay_us": -1},
        {"pass_seconds": 0},
        {"queue_seconds": -1},
        {"device": "tpu"},
        {"retriever_runtime": "torch"},
    ],
)
def test_an_option_out_of_range_is_named(options):
    """The error is one sentence that names the option, and it is raised before anything is written."""
    with pytest.raises(InputError, match=next(iter(options)).split("_")[0]):
        Serving(**options)


def test_numbers_of_processes_are_read_from_the_command_line():
    """Steps and numbers, with spaces or without."""
    assert parse_processes("features=2, retriever=3") == {"features": 2, "retriever": 3}


@pytest.mark.parametrize("text", ["", "features", "features=", "features=two", "features=-1", "=2", "a=1,a=2", "a=1,"])
def test_other_text_is_no_number_of_processes(text):
    """The error quotes what was given and shows the form."""
    with pytest.raises(InputError, match=f"processes is '{text}': .*features=2"):
        parse_processes(text)


def test_the_queue_of_a_gpu_holds_what_is_ranked_in_time():
    """A pass of 16 ms and the shortest queue of 5 s allow 311 prompts besides the running one, for each instance.

    The batch size has no effect: a pass is the duration of one prompt among others.
    """
    assert Serving(device="gpu", pass_seconds=0.016).queue_size == 311
    assert Serving(device="gpu", pass_seconds=0.016, instances=2).queue_size == 622


@pytest.mark.parametrize(
    ("serving", "size"),
    [
        (Serving(device="gpu", pass_seconds=1 / 60), 15),
        (Serving(device="gpu", pass_seconds=1 / 2000), 500),
        (Serving(device="gpu", pass_seconds=1 / 5000), 512),
        (Serving(device="gpu", pass_seconds=2), 1),
        (Serving(device="gpu", pass_seconds=2, max_batch_size=8), 8),
        (Serving(pass_seconds=0.05, queue_delay_us=500), 5),
    ],
)
def test_a_batch_is_ranked_in_a_quarter_of_a_second(serving, size):
    """By hand: 0.25 s divided by the measured time of a prompt, at least 1 and at most 512, or the option's value."""
    assert {config.max_batch_size for name, config in model_configs(serving).items() if name in STEPS} == {size}


def test_the_retriever_stays_on_the_processor():
    """The offline evaluation runs this graph on the CPU; on a GPU, served scores would differ from offline ones."""
    configs = model_configs(Serving(device="gpu", retriever_runtime="onnxruntime"))
    assert [group.kind for group in configs["retriever_scores"].instance_group] == [ModelInstanceGroup.KIND_CPU]
    assert [group.kind for group in configs["ranker"].instance_group] == [ModelInstanceGroup.KIND_GPU]


def test_one_gpu_of_several_can_be_chosen():
    """``gpu`` leaves the choice to Triton, which uses every GPU; ``gpu:1`` selects one of them."""
    (every,) = model_configs(Serving(device="gpu"))["ranker"].instance_group
    (one,) = model_configs(Serving(device="gpu:1", instances=2))["ranker"].instance_group
    assert (list(every.gpus), list(one.gpus), one.count) == ([], [1], 2)
