"""Independent lines: a score depends on the prefix and the line alone, bit by bit, whatever else is ranked."""

import json
import logging
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import base_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import embedded_base, tiny_base
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.ranker.fitting.qlora import hidden_states, load_base, pack_lines
from models.ranker.inference.prefixes import Prefix, PrefixCache
from models.ranker.inference.ranker import Ranker, check_prefix_cache, write_runtime
from models.ranker.inference.runtimes import load_scorer
from models.ranker.inference.scorer import Runtime, SlabScorer
from models.ranker.inference.slab_check import settle_slabs
from models.ranker.inference.slabs import SLAB_ROWS, slabs_of
from models.ranker.inference.verbalizer import LineVerbalizer
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

RUNTIMES = {
    "torch": Runtime(),
    "torch, two threads": Runtime(threads=2),
    "torch bf16": Runtime(dtype="bfloat16"),
    "openvino": Runtime(runtime="openvino"),
    "openvino bf16": Runtime(runtime="openvino", dtype="bfloat16"),
}
PREFIX = list(range(100, 137))
LINES = [[200 + number, *range(300, 300 + number % 13 + 1)] for number in range(40)]
"""Lines of 2 to 14 tokens."""
PROMPT = Prompt.of_lines(PREFIX, LINES[:20])


@cache
def direction(hidden: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=hidden).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny"))


def settled(folder: Path, runtime: Runtime) -> SlabScorer:
    """Return a scorer as a ranker loads it."""
    scorer = load_scorer(folder, runtime)
    scorer.settle([PROMPT])
    return scorer


def score(scorer: SlabScorer, lines: list[list[int]]) -> list[bytes]:
    """Return the bits of each line's score."""
    hidden = scorer.rows([0]).shape[1]
    return [value.tobytes() for value in scorer.score_independent(Prompt.of_lines(PREFIX, lines), direction(hidden))]


@st.composite
def companies(draw: st.DrawFn) -> list[list[int]]:
    """Draw 1 to 60 lines of 1 to 40 tokens, possibly repeated, in any order."""
    line = st.sampled_from(LINES) | st.lists(st.integers(3, 900), min_size=1, max_size=40)
    return draw(st.lists(line, min_size=1, max_size=60))


def check_bits(scorer: SlabScorer, lines: list[list[int]], order: list[int]) -> None:
    """Check that each line's score has the same bits among all lines, in another order, and alone."""
    together = score(scorer, lines)
    assert score(scorer, [lines[number] for number in order]) == [together[number] for number in order]
    assert score(scorer, lines[:1]) == together[:1]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough) if name == "torch, two threads" else name for name in RUNTIMES],
)
def test_a_score_depends_neither_on_order_nor_on_company_nor_on_number(tiny: Path, name: str):
    """Bit by bit, on every runtime and precision of the processor, for lines of any lengths that share slabs or not."""
    scorer = settled(tiny, RUNTIMES[name])

    @settings(max_examples=10, deadline=None)
    @given(lines=companies(), data=st.data())
    def check(lines: list[list[int]], data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(lines))))
        check_bits(scorer, lines, order[: data.draw(st.integers(1, len(order)))])

    check()


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_two_hundred_candidates_have_the_scores_of_twenty(tiny: Path, name: str):
    """The number of candidates changes no bit of the first twenty scores."""
    scorer = settled(tiny, RUNTIMES[name])
    assert score(scorer, LINES * 5)[:20] == score(scorer, LINES[:20])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_the_pretrained_bases_scores_depend_on_nothing_else(name: str):
    """The same for SmolLM2's widths, whose products other kernels compute than those of a tiny model."""
    scorer = settled(embedded_base(), RUNTIMES[name])
    chance = np.random.default_rng(0)
    for count in (1, 3, 30):
        check_bits(scorer, (LINES * 2)[:count], chance.permutation(count).tolist())


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_states_are_those_of_each_line_after_the_prefix(tiny: Path, name: str):
    """The reference is transformers over the prefix and one line, for each line by itself."""
    model = LlamaForCausalLM.from_pretrained(str(tiny), dtype=torch.float32).eval().model
    with torch.inference_mode():
        alone = (model(input_ids=torch.tensor([[*PREFIX, *line]])).last_hidden_state for line in LINES)
        expected = [states[0, -1].numpy() for states in alone]
    found = load_scorer(tiny, RUNTIMES[name]).independent_states(Prompt.of_lines(PREFIX, LINES))
    assert found == pytest.approx(np.stack(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Qwen2"])
def test_other_architectures_compute_lines_too(tmp_path: Path, name: str):
    """Learned positions, biases and another layer than Llama's last one; the reference is each model by itself."""
    folder = base_of(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval().get_decoder()
    with torch.inference_mode():
        alone = (model(input_ids=torch.tensor([[*PREFIX, *line]])).last_hidden_state for line in LINES[:5])
        expected = [states[0, -1].numpy() for states in alone]
    found = load_scorer(folder, Runtime()).independent_states(Prompt.of_lines(PREFIX, LINES[:5]))
    assert found == pytest.approx(np.stack(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_training_computes_what_inference_does(tiny: Path, name: str):
    """The packed sequences of the training give the states that the served model gives."""
    base = load_base(tiny, quantisation="none", dtype=torch.float32, device="cpu")
    packed, (ends,) = pack_lines([PROMPT], torch.device("cpu"))
    with torch.inference_mode():
        trained = hidden_states(base.get_decoder(), packed)[ends].numpy()
    assert len(packed.tokens[0]) == len(PROMPT.tokens)  # the prefix is computed once
    assert load_scorer(tiny, RUNTIMES[name]).independent_states(PROMPT) == pytest.approx(trained, abs=1e-4)


def test_whole_prompts_keep_their_bits_after_lines_were_scored(tiny: Path):
    """Scoring lines replaces the layers' attention and the last layer, which must not reach other prompts."""
    scorer = load_scorer(tiny, Runtime())
    before = scorer.states(PROMPT.tokens, PROMPT.line_ends)
    scorer.independent_states(PROMPT)
    assert scorer.states(PROMPT.tokens, PROMPT.line_ends).tobytes() == before.tobytes()


@given(lengths=st.lists(st.integers(1, 300), max_size=60), sizes=st.sampled_from([SLAB_ROWS, (128,), ()]))
def test_slabs_hold_each_line_once(lengths: list[int], sizes: tuple[int, ...]):
    """Each line stands whole in one slab, at the prefix's positions, and its members are its own rows."""
    lines = [list(range(1, length + 1)) for length in lengths]
    held = []
    for slab in slabs_of(lines, 7, sizes):
        assert len(slab.tokens) in sizes or len(slab.numbers) == 1
        for place, number in enumerate(slab.numbers):
            length = lengths[number]
            rows = slab.members[place, :length]
            assert slab.tokens[rows].tolist() == lines[number]
            assert slab.positions[rows].tolist() == list(range(7, 7 + length))
            assert slab.members.flatten()[slab.slots[rows]].tolist() == rows.tolist()
            assert (slab.ends[place], slab.lasts[place]) == (rows[-1], length - 1)
        held += slab.numbers
    assert sorted(held) == list(range(len(lines)))


class FakeScorer(SlabScorer):
    """A scorer of made-up states: each line's first token, plus an error where ``error`` says so."""

    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    def states(self, token_ids, places):
        raise NotImplementedError

    def rows(self, label_ids):
        raise NotImplementedError

    def settle(self, prompts):
        raise NotImplementedError

    def prefix(self, token_ids):
        return Prefix([])

    def slab_states(self, prefix, slab):
        firsts = slab.tokens[slab.members[:, 0]].astype(np.float32)
        errors = [self.error(len(slab.tokens), place) for place in range(len(firsts))]
        return (firsts + np.array(errors, np.float32))[:, None]


def test_sizes_at_which_other_kernels_compute_are_left_out():
    """OpenVINO's products of up to 80 rows, for one, have other last bits than larger ones."""
    scorer = FakeScorer(lambda rows, place: 0.5 * (rows <= 80))
    settle_slabs(scorer, PROMPT)
    assert scorer.slab_rows == SLAB_ROWS[2:]


def test_a_library_whose_rows_depend_on_their_place_gets_one_line_a_slab(caplog: pytest.LogCaptureFixture):
    """The warning names the axis and the deviation."""
    scorer = FakeScorer(lambda rows, place: 0.25 * (place == 1))
    with caplog.at_level(logging.WARNING):
        settle_slabs(scorer, PROMPT)
    assert scorer.slab_rows == ()
    assert "in slabs of 256 rows the lines' states depend on their order (by up to 0.25)" in caplog.text
    assert all(len(slab.numbers) == 1 for slab in slabs_of(LINES, 0, scorer.slab_rows))


def test_a_runtime_that_does_not_repeat_itself_is_reported(caplog: pytest.LogCaptureFixture):
    """Nothing helps there; the warning says so."""
    calls = iter(range(10**6))
    scorer = FakeScorer(lambda rows, place: float(next(calls)))
    with caplog.at_level(logging.WARNING):
        settle_slabs(scorer, PROMPT)
    assert "this runtime does not repeat its results: even alone, lines' states depend on their order" in caplog.text


@pytest.mark.parametrize("name", ["torch", "openvino", "openvino bf16"])
def test_a_kept_prefix_changes_no_bit(tiny: Path, name: str):
    """The second request of a user, with other candidates, takes the prefix from the cache and gives the same bits."""
    scorer = settled(tiny, RUNTIMES[name])
    expected = score(scorer, LINES)
    scorer.prefixes = PrefixCache(1 << 20)
    score(scorer, LINES[:3])
    computed = scorer.prefix
    scorer.prefix = None  # type: ignore[method-assign,assignment]  # a second pass over the prefix would fail
    assert score(scorer, LINES) == expected
    assert computed(PREFIX).nbytes == 2 * 2 * 2 * 16 * len(PREFIX) * (2 if name == "torch bf16" else 4)


def prefix_of(floats: int) -> Prefix:
    return Prefix([(np.zeros(floats, np.float32), np.zeros(0, np.float32))])


def test_the_cache_drops_what_was_used_longest_ago():
    """Three prefixes of 40 bytes do not fit in 100; one of 101 bytes is never kept and drops nothing."""
    computed: list[tuple[int, ...]] = []

    def compute(tokens):
        computed.append(tuple(tokens))
        return prefix_of(30 if tokens == [9] else 10)

    cache = PrefixCache(100)
    for tokens in ([1], [2], [1], [3], [1], [9], [1], [3], [2]):
        cache.get(tokens, compute)
    assert computed == [(1,), (2,), (3,), (9,), (2,)]


def test_a_cache_below_one_prefix_is_refused():
    """3.5 MiB of one user's history need 4 MB; a ranker without prefixes has nothing to keep."""
    check_prefix_cache(4, 7 << 19)
    with pytest.raises(InputError, match=r"of 3 MB does not hold one user's history, which takes 4 MB: .* 4, or 0"):
        check_prefix_cache(3, 7 << 19)
    with pytest.raises(InputError, match="for rankers that read independent lines: leave out --prefix-cache"):
        check_prefix_cache(3, 0)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Return a folder with the files that the export writes for a ranker of independent lines."""
    merged = tiny_base(tmp_path / "merged")
    logits = load_scorer(merged, Runtime()).score_independent(PROMPT, direction(64))
    logprobs = torch.from_numpy(logits).log_softmax(0).tolist()
    contents = {
        "verbalizer": LineVerbalizer(direction(64)).stored(),
        "fusion": {"weight": 0.0},
        "probes": [{**PROMPT._asdict(), "logprobs": logprobs}],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_runtime(tmp_path, Runtime())
    return tmp_path


@pytest.mark.parametrize("name", ["torch", "openvino", "torch bf16"])
def test_a_ranker_of_independent_lines_is_loaded_and_ranks_any_number(exported: Path, name: str):
    """It replays its probes on every runtime; of 200 candidates, the order is that of their scores."""
    ranker = Ranker.load(exported, RUNTIMES[name], prefix_cache=1)
    prompt = Prompt.of_lines(PREFIX, LINES * 5)
    places, probabilities = ranker.rank(prompt, np.zeros(200, np.float32), np.arange(1, 201))
    assert places.tolist() == np.argsort(-ranker.logits(prompt), kind="stable").tolist()
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ends", [[36, 40], [40, 40], [45, 40]])
def test_lines_that_overlap_are_refused(exported: Path, ends: list[int]):
    """A caller that bypasses the ensemble may send an end within the 37 tokens of the prefix, or ends out of order."""
    with pytest.raises(InputError, match="2 line ends for 2 candidates in 50 tokens"):
        Ranker.load(exported).rank(Prompt(list(range(50)), ends, 37), np.zeros(2, np.float32), np.arange(1, 3))
