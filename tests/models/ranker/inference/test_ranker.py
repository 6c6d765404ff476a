"""The served ranker: the letters' logits, the order, and the refusal to serve a model that has changed."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_base
from transformers import LlamaForCausalLM

from models.ranker import precision
from models.ranker.inference import runtimes
from models.ranker.inference.openvino_graph import hidden_states, weights_of
from models.ranker.inference.openvino_scorer import openvino_core
from models.ranker.inference.ranker import Ranker, write_runtime
from models.ranker.inference.runtimes import choose_runtime, load_scorer
from models.ranker.inference.scorer import Runtime
from models.ranker.inference.verbalizer import LineVerbalizer
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

TOKENS = list(range(100, 160))
ENDS = list(range(20, 60, 2))
PROMPT = Prompt(TOKENS, ENDS)
LETTERS = {letter: 49 + place for place, letter in enumerate("ABCDEFGHIJKLMNOPQRST")}


def full_logits(folder: Path) -> torch.Tensor:
    """Return transformers' fp32 logits over the whole vocabulary for the token after the prompt."""
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0, -1]


def first(count: int) -> Prompt:
    """Return the prompt with the line ends of the first ``count`` candidates."""
    return Prompt(TOKENS, ENDS[:count])


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Return a folder with the files that the export writes for the ranker's step."""
    merged = tiny_base(tmp_path / "merged")
    logprobs = full_logits(merged)[list(LETTERS.values())].log_softmax(0).tolist()
    contents = {
        "verbalizer": {"letters": LETTERS},
        "fusion": {"weight": 0.0},
        "probes": [{**PROMPT._asdict(), "logprobs": logprobs}],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_runtime(tmp_path, Runtime())
    return tmp_path


def test_logits_are_those_of_the_full_model(exported: Path):
    """The reference is the letters' rows of transformers' full logits, one letter for each candidate."""
    expected = full_logits(exported / "merged")[list(LETTERS.values())].numpy()
    assert Ranker.load(exported).logits(first(7)) == pytest.approx(expected[:7], abs=1e-4)


def test_order_and_probabilities_are_the_letters(exported: Path):
    """With weight 0, the expected values are the softmax of the first five letters' logits, in descending order."""
    logits = full_logits(exported / "merged")[list(LETTERS.values())[:5]]
    places, probabilities = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    assert places.tolist() == logits.argsort(descending=True).tolist()
    assert probabilities == pytest.approx(logits.softmax(0).sort(descending=True).values.numpy(), abs=1e-4)
    assert (places.dtype, probabilities.dtype) == (np.int64, np.float32)


def test_the_stored_weight_brings_the_retriever_in(exported: Path):
    """With a weight of 1, the result is the retriever's order."""
    (exported / "fusion.json").write_text('{"weight": 1.0}')
    places, _ = Ranker.load(exported).rank(first(3), np.array([1.0, 3.0, 2.0], np.float32), np.array([3, 1, 2]))
    assert places.tolist() == [1, 2, 0]


def test_no_candidates_is_an_empty_answer_without_a_pass(exported: Path):
    """If every item is excluded, there is nothing to rank, and there is no prompt either."""
    places, probabilities = Ranker.load(exported).rank(Prompt([], []), np.empty(0, np.float32), np.empty(0, np.int32))
    assert places.shape == probabilities.shape == (0,)


def test_bf16_stays_within_its_tolerance(exported: Path):
    """Probes stored in fp32 are accepted by a bf16 runtime, whose scores are close but not equal."""
    exact = Ranker.load(exported).logits(PROMPT)
    rounded = Ranker.load(exported, Runtime(dtype="bfloat16")).logits(PROMPT)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.5


def test_a_model_that_disagrees_with_its_probes_is_not_served(exported: Path):
    """The first probe detects other weights under the same name."""
    torch.manual_seed(7)
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match="not served: probe prompt 0 moved by"):
        Ranker.load(exported)


def test_scores_that_are_no_numbers_are_not_served(exported: Path):
    """Every comparison with NaN is false, so the check must be written such that it fails on NaN."""
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match="moved by nan"):
        Ranker.load(exported)


@pytest.mark.parametrize("name", ["verbalizer", "fusion", "probes", "runtime"])
def test_a_missing_file_is_named(exported: Path, name: str):
    """If an export is incomplete, the error names the missing file and the command to run."""
    (exported / f"{name}.json").unlink()
    with pytest.raises(InputError, match=rf"{name}\.json is missing: run `llamarec export`"):
        Ranker.load(exported)


def test_an_unknown_runtime_is_refused():
    """An artifact exported by a later version may name a runtime that this version does not have."""
    with pytest.raises(InputError, match="not a runtime of this version"):
        Runtime(dtype="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("native", "installed", "expected"),
    [
        (True, True, ("openvino", "bfloat16")),
        (True, False, ("torch", "bfloat16")),
        (False, True, ("torch", "float32")),
    ],
)
def test_runtime_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, native: bool, installed: bool, expected: tuple[str, str]
):
    """bf16 requires a processor with native support, because emulation is slow; OpenVINO must be installed."""
    monkeypatch.setattr(precision, "processor_has_bf16", lambda: native)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: object() if installed else None)
    runtime = choose_runtime("cpu")
    assert (runtime.runtime, runtime.dtype, runtime.device) == (*expected, "cpu")
    assert runtime.threads >= 1


@pytest.mark.parametrize("runtime", [{"runtime": "openvino", "device": "cuda"}, {"dtype": "float16"}])
def test_runtimes_that_do_not_exist_are_refused(runtime: dict[str, str]):
    """OpenVINO runs on the CPU only, and fp16 on a GPU only."""
    with pytest.raises(InputError, match="not a runtime of this version"):
        Runtime(**runtime)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("runtime", "tolerance"),
    [
        (Runtime(), 1e-4),
        (Runtime(runtime="openvino"), 1e-4),
        (Runtime(runtime="openvino", dtype="bfloat16"), 0.1),
    ],
)
def test_every_runtime_gives_the_full_models_logits(tmp_path: Path, runtime: Runtime, tolerance: float, tied: bool):
    """The reference is transformers' full fp32 logits, for prompts of 1 to 61 tokens, in the order of the letters."""
    folder = tiny_base(tmp_path, tie_word_embeddings=tied)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    prompts = [list(range(100, 100 + length)) for length in (61, 1, 17)]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0, -1, [60, 49, 50]].numpy() for prompt in prompts]
    scored = load_scorer(folder, runtime).score(prompts, [60, 49, 50])
    assert (scored.shape, scored.dtype) == ((3, 3), np.float32)
    assert scored == pytest.approx(np.stack(expected), abs=tolerance)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_every_runtime_reads_the_lines_where_the_model_does(tmp_path: Path, name: str):
    """The reference is transformers' states after its last norm, at places in any order, including the first token."""
    folder = tiny_base(tmp_path)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    direction, places = np.random.default_rng(0).normal(size=64).astype(np.float32), [59, 0, 17, 18]
    with torch.inference_mode():
        states = model.model(input_ids=torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    scorer = load_scorer(folder, Runtime(runtime=name))  # type: ignore[arg-type]
    assert scorer.score_lines(TOKENS, places, direction) == pytest.approx(states[places] @ direction, abs=1e-4)


def test_a_ranker_that_reads_lines_is_stored_and_orders_by_them(exported: Path):
    """The order follows the states at the first three line ends along the stored direction and ignores the letters."""
    direction = np.random.default_rng(0).normal(size=64).astype(np.float32)
    (exported / "verbalizer.json").write_text(json.dumps(LineVerbalizer(direction).stored()))
    scorer = load_scorer(exported / "merged", Runtime())
    expected = scorer.score_lines(TOKENS, ENDS, direction)
    logprobs = torch.from_numpy(expected).log_softmax(0).tolist()
    (exported / "probes.json").write_text(json.dumps([{**PROMPT._asdict(), "logprobs": logprobs}]))
    places, _ = Ranker.load(exported).rank(first(3), np.zeros(3, np.float32), np.arange(1, 4))
    assert places.tolist() == np.argsort(-expected[:3]).tolist()


@pytest.mark.parametrize("ends", [[3, 4], [3, 4, 60], [3, 4, -1]])
def test_line_ends_that_are_no_places_of_the_candidates_are_refused(exported: Path, ends: list[int]):
    """A caller that bypasses the ensemble may send one line end too few, or a place outside the 60 tokens."""
    with pytest.raises(InputError, match=r"line ends for 3 candidates in 60 tokens: give one position"):
        Ranker.load(exported).rank(Prompt(TOKENS, ends), np.zeros(3, np.float32), np.arange(1, 4))


@pytest.mark.parametrize(
    "runtime", [Runtime(), Runtime(runtime="openvino"), Runtime(runtime="openvino", dtype="bfloat16")]
)
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, runtime: Runtime):
    """A prompt has bit-identical scores alone and between prompts of other lengths, even where there is a cache."""
    scorer = load_scorer(tiny_base(tmp_path), runtime)
    batch = [TOKENS[:40], TOKENS, TOKENS[:7]]
    together = scorer.score(batch, [49, 50])
    assert all((scorer.score([prompt], [49, 50])[0] == row).all() for prompt, row in zip(batch, together, strict=True))


def test_openvino_replays_the_probes_like_any_runtime(exported: Path):
    """OpenVINO is accepted when it agrees with the stored fp32 scores, and refused when the model is another one."""
    runtime = Runtime(runtime="openvino")
    expected = Ranker.load(exported).logits(PROMPT)
    assert Ranker.load(exported, runtime).logits(PROMPT) == pytest.approx(expected, abs=1e-4)
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match=r"moved by .* openvino in float32"):
        Ranker.load(exported, runtime)


SIGNAL_AFTER_SCORERS = """
import os, signal, sys
from pathlib import Path
from models.ranker.inference.openvino_scorer import OpenVinoScorer
from models.ranker.inference.scorer import Runtime

scorers = [OpenVinoScorer(Path(sys.argv[1]), Runtime(runtime="openvino")) for _ in range(2)]
for place in range(2):
    scorers[place].states([1, 2, 3], [2])
for place in range(2):
    scorers[place] = None
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_scorers_were_deleted(exported: Path):
    """An OpenVINO core replaces the stack for signals; two that were deleted in order would leave a freed one."""
    command = [sys.executable, "-c", SIGNAL_AFTER_SCORERS, str(exported / "merged")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_openvino_recognises_what_it_is_fast_at(tmp_path: Path):
    """OpenVINO recognises rotary embeddings, and attention with a cache below the last layer.

    With another form of the same graph, or another OpenVINO, scoring would only become slower.
    """
    folder = tiny_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    graph = hidden_states(config, weights_of(folder), cached=True)
    compiled = openvino_core().compile_model(graph, "CPU").get_runtime_model()
    layers = Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_ops())
    count = config["num_hidden_layers"]
    assert (layers["ScaledDotProductAttention"], layers["RoPE"]) == (count - 1, 2 * count)


def test_openvino_leaves_its_threads_to_the_kernel(tmp_path: Path):
    """With pinned threads, the default, two instances shared one core while scoring and took twice the time."""
    scorer = load_scorer(tiny_base(tmp_path), Runtime(runtime="openvino", threads=1))
    scorer.score([TOKENS], [49, 50])  # compiles the graph, with threads of its own
    thread = threading.Thread(target=scorer.score, args=([TOKENS] * 300, [49, 50]))
    thread.start()
    seen = set()
    while thread.is_alive():
        with suppress(OSError):  # a thread has ended
            seen |= {tuple(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()}
    assert seen == {tuple(os.sched_getaffinity(0))}


def test_openvino_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An artifact that was exported on another machine may require OpenVINO."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "models.ranker.inference.openvino_scorer", raising=False)
    with pytest.raises(InputError, match=r"pip install 'llamarec\[openvino\]'"):
        load_scorer(tmp_path, Runtime(runtime="openvino"))


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
        {"architectures": ["OPTForCausalLM"]},
    ],
)
def test_openvino_refuses_what_its_graph_has_not(tmp_path: Path, change: dict[str, object]):
    """The graph would leave out biases and scaled positions; OPT's weights have other names (a KeyError)."""
    folder = tiny_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match="without biases and rope scaling only: export with --runtime torch"):
        load_scorer(folder, Runtime(runtime="openvino"))


def test_the_temperature_changes_probabilities_and_no_order(exported: Path):
    """With a stored temperature of 2, the probabilities are the softmax of half the logits."""
    logits = full_logits(exported / "merged")[list(LETTERS.values())[:5]]
    before, _ = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    (exported / "fusion.json").write_text('{"weight": 0.0, "temperature": 2.0}')
    places, probabilities = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    assert places.tolist() == before.tolist()
    assert probabilities == pytest.approx((logits / 2).softmax(0).sort(descending=True).values.numpy(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_keep_their_precision(tmp_path: Path, dtype: str):
    """Only parameters are rounded to bf16.

    The frequencies are theta^(-2i / width) of Su et al. 2021, in fp32; in bf16 they would be off by up to 1 part in
    256.
    """
    merged = tiny_base(tmp_path)
    scorer = load_scorer(merged, Runtime(dtype=dtype))
    layers = scorer._layers
    assert {parameter.dtype for parameter in layers.parameters()} == {getattr(torch, dtype)}
    expected = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(layers.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_a_gpu_that_emulates_bf16_does_not_count_as_having_it(monkeypatch: pytest.MonkeyPatch):
    """PyTorch reports bf16 support for a T4 or V100 unless the call excludes emulation."""
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert not precision.has_native_bf16("cuda:0")
    assert asked == [False]


def test_a_gpu_serves_in_fp16(monkeypatch: pytest.MonkeyPatch):
    """Merged models are stored in fp16; the device has no number, because Triton gives each instance its GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = choose_runtime("gpu:1")
    assert (chosen.runtime, chosen.dtype, chosen.device) == ("torch", "float16", "cuda")
