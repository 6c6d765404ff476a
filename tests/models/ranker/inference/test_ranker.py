"""The served ranker: letters' logits, order, and the refusal to serve another model than was stored."""

import json
import os
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from tiny import tiny_base
from transformers import LlamaForCausalLM

from models.ranker import precision
from models.ranker.inference import runtimes
from models.ranker.inference.openvino_scorer import hidden_states, weights_of
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
    """The logits of transformers over the whole vocabulary behind the prompt, in fp32."""
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0, -1]


def first(count: int) -> Prompt:
    """The prompt as one of so many candidates."""
    return Prompt(TOKENS, ENDS[:count])


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """What the export writes for the ranker's step."""
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
    """The letters' rows of transformers' full logits; a letter for each candidate and no more."""
    expected = full_logits(exported / "merged")[list(LETTERS.values())].numpy()
    assert Ranker.load(exported).logits(first(7)) == pytest.approx(expected[:7], abs=1e-4)


def test_order_and_probabilities_are_the_letters(exported: Path):
    """Weight 0: softmax of the first five letters' logits, descending."""
    logits = full_logits(exported / "merged")[list(LETTERS.values())[:5]]
    places, probabilities = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    assert places.tolist() == logits.argsort(descending=True).tolist()
    assert probabilities == pytest.approx(logits.softmax(0).sort(descending=True).values.numpy(), abs=1e-4)
    assert (places.dtype, probabilities.dtype) == (np.int64, np.float32)


def test_the_stored_weight_brings_the_retriever_in(exported: Path):
    """With all the weight on it the retriever's order comes back."""
    (exported / "fusion.json").write_text('{"weight": 1.0}')
    places, _ = Ranker.load(exported).rank(first(3), np.array([1.0, 3.0, 2.0], np.float32), np.array([3, 1, 2]))
    assert places.tolist() == [1, 2, 0]


def test_no_candidates_is_an_empty_answer_without_a_pass(exported: Path):
    """Everything excluded: nothing to rank, and no prompt either."""
    places, probabilities = Ranker.load(exported).rank(Prompt([], []), np.empty(0, np.float32), np.empty(0, np.int32))
    assert places.shape == probabilities.shape == (0,)


def test_bf16_stays_within_its_tolerance(exported: Path):
    """The probes stored in fp32 are accepted by a bf16 runtime, whose scores are close and not equal."""
    exact = Ranker.load(exported).logits(PROMPT)
    rounded = Ranker.load(exported, Runtime(dtype="bfloat16")).logits(PROMPT)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.5


def test_a_model_that_disagrees_with_its_probes_is_not_served(exported: Path):
    """Other weights under the same name: the first probe tells."""
    torch.manual_seed(7)
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match="not served: probe prompt 0 moved by"):
        Ranker.load(exported)


def test_scores_that_are_no_numbers_are_not_served(exported: Path):
    """A comparison with NaN is false, so it has to be asked the right way round."""
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match="moved by nan"):
        Ranker.load(exported)


@pytest.mark.parametrize("name", ["verbalizer", "fusion", "probes", "runtime"])
def test_a_missing_file_is_named(exported: Path, name: str):
    """Half an export says which half is missing and what to run."""
    (exported / f"{name}.json").unlink()
    with pytest.raises(InputError, match=rf"{name}\.json is missing: run `llamarec export`"):
        Ranker.load(exported)


def test_an_unknown_runtime_is_refused():
    """An artifact exported by a later version may name a runtime that this one has not."""
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
    """bf16 only where the processor multiplies it itself, emulated it is slow; OpenVINO where it is there."""
    monkeypatch.setattr(precision, "_processor_has_bf16", lambda: native)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: object() if installed else None)
    runtime = choose_runtime("cpu")
    assert (runtime.runtime, runtime.dtype, runtime.device) == (*expected, "cpu")
    assert runtime.threads >= 1


@pytest.mark.parametrize("runtime", [{"runtime": "openvino", "device": "cuda"}, {"dtype": "float16"}])
def test_runtimes_that_do_not_exist_are_refused(runtime: dict[str, str]):
    """OpenVINO runs on the processor here, and fp16 on a GPU only."""
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
    """Rows of transformers' full fp32 logits, for prompts of 1 to 61 tokens, in the order asked for."""
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
    """Transformers' own states behind its last norm, at places in any order, the first token's among them."""
    folder = tiny_base(tmp_path)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    direction, places = np.random.default_rng(0).normal(size=64).astype(np.float32), [59, 0, 17, 18]
    with torch.inference_mode():
        states = model.model(input_ids=torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    scorer = load_scorer(folder, Runtime(runtime=name))  # type: ignore[arg-type]
    assert scorer.score_lines(TOKENS, places, direction) == pytest.approx(states[places] @ direction, abs=1e-4)


def test_a_ranker_that_reads_lines_is_stored_and_orders_by_them(exported: Path):
    """The states at the first three ends along the stored direction, whatever the letters say."""
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
    """A caller past the ensemble may send anything: one too few, or a place outside of 60 tokens."""
    with pytest.raises(InputError, match=r"line ends for 3 candidates in 60 tokens: give one position"):
        Ranker.load(exported).rank(Prompt(TOKENS, ends), np.zeros(3, np.float32), np.arange(1, 4))


@pytest.mark.parametrize(
    "runtime", [Runtime(), Runtime(runtime="openvino"), Runtime(runtime="openvino", dtype="bfloat16")]
)
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, runtime: Runtime):
    """Alone or between others of other lengths: the same to the bit, also where there is a cache."""
    scorer = load_scorer(tiny_base(tmp_path), runtime)
    batch = [TOKENS[:40], TOKENS, TOKENS[:7]]
    together = scorer.score(batch, [49, 50])
    assert all((scorer.score([prompt], [49, 50])[0] == row).all() for prompt, row in zip(batch, together, strict=True))


def test_openvino_replays_the_probes_like_any_runtime(exported: Path):
    """Accepted when it agrees with the stored fp32 scores, refused when the model is another."""
    runtime = Runtime(runtime="openvino")
    expected = Ranker.load(exported).logits(PROMPT)
    assert Ranker.load(exported, runtime).logits(PROMPT) == pytest.approx(expected, abs=1e-4)
    model = LlamaForCausalLM.from_pretrained(str(exported / "merged"))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(exported / "merged")
    with pytest.raises(InputError, match=r"moved by .* openvino in float32"):
        Ranker.load(exported, runtime)


def test_openvino_recognises_what_it_is_fast_at(tmp_path: Path):
    """Attention with a cache below the last layer and rotary embeddings: another form of the same graph, or another
    OpenVINO, would only be slower.
    """
    folder = tiny_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    graph = hidden_states(config, weights_of(folder), cached=True)
    compiled = openvino.Core().compile_model(graph, "CPU").get_runtime_model()
    layers = Counter(node.get_rt_info()["layerType"].astype(str) for node in compiled.get_ops())
    count = config["num_hidden_layers"]
    assert (layers["ScaledDotProductAttention"], layers["RoPE"]) == (count - 1, 2 * count)


def test_openvino_leaves_its_threads_to_the_kernel(tmp_path: Path):
    """Pinned while they score, as they are by default, two instances shared one core: twice the time."""
    scorer = load_scorer(tiny_base(tmp_path), Runtime(runtime="openvino", threads=1))
    thread = threading.Thread(target=scorer.score, args=([TOKENS] * 300, [49, 50]))
    thread.start()
    seen = set()
    while thread.is_alive():
        with suppress(OSError):  # a thread has ended
            seen |= {tuple(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()}
    assert seen == {tuple(os.sched_getaffinity(0))}


def test_openvino_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An artifact exported elsewhere may ask for it."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "models.ranker.inference.openvino_scorer", raising=False)
    with pytest.raises(InputError, match=r"pip install 'llamarec\[openvino\]'"):
        load_scorer(tmp_path, Runtime(runtime="openvino"))


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}]
)
def test_openvino_refuses_what_its_graph_has_not(tmp_path: Path, change: dict[str, object]):
    """Biases and scaled positions would be left out silently."""
    folder = tiny_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match="without biases and rope scaling only: export with --runtime torch"):
        load_scorer(folder, Runtime(runtime="openvino"))


def test_the_temperature_changes_probabilities_and_no_order(exported: Path):
    """Stored temperature 2: softmax of half the logits."""
    logits = full_logits(exported / "merged")[list(LETTERS.values())[:5]]
    before, _ = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    (exported / "fusion.json").write_text('{"weight": 0.0, "temperature": 2.0}')
    places, probabilities = Ranker.load(exported).rank(first(5), np.zeros(5, np.float32), np.arange(1, 6))
    assert places.tolist() == before.tolist()
    assert probabilities == pytest.approx((logits / 2).softmax(0).sort(descending=True).values.numpy(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_keep_their_precision(tmp_path: Path, dtype: str):
    """Only parameters are rounded to bf16. The frequencies are theta^(-2i / width) of Su et al. 2021, to fp32; in bf16
    they would be off by up to 1 part in 256.
    """
    merged = tiny_base(tmp_path)
    scorer = load_scorer(merged, Runtime(dtype=dtype))
    layers = scorer._layers
    assert {parameter.dtype for parameter in layers.parameters()} == {getattr(torch, dtype)}
    expected = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(layers.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_a_gpu_that_emulates_bf16_does_not_count_as_having_it(monkeypatch: pytest.MonkeyPatch):
    """PyTorch answers yes for a T4 or V100 unless emulation is left out of the question."""
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert not precision.has_native_bf16("cuda:0")
    assert asked == [False]


def test_a_gpu_serves_in_fp16(monkeypatch: pytest.MonkeyPatch):
    """Merged models are stored in fp16; the number of the GPU is Triton's to give to each instance."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = choose_runtime("gpu:1")
    assert (chosen.runtime, chosen.dtype, chosen.device) == ("torch", "float16", "cuda")
