"""The packed scorer: the scores of transformers, and bits that do not depend on who shares a pass."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import base_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import tiny_base

from models.ranker.forward.batch import BUCKET_ROWS, Bucket, Item
from models.ranker.forward.model import Forward, Rows
from models.ranker.forward.shape import UnsupportedBaseError
from models.ranker.inference import packed_scorer, ranker
from models.ranker.inference.packed_scorer import PackedScorer, pass_bytes, sizes_in
from models.ranker.inference.promise import Settled, probe_items, settle_buckets
from models.ranker.inference.ranker import Ranker, write_runtime
from models.ranker.inference.runtimes import load_scorer
from models.ranker.inference.scorer import Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.inference.verbalizer import LetterVerbalizer, LineVerbalizer, Verbalizer
from models.ranker.prompt import LETTERS, Prompt
from preprocessing.errors import InputError

PACKED = Runtime(forward="packed")
SIZES = packed_scorer.PROCESSOR_ROWS
LABELS = list(range(49, 69))
DIRECTION = np.random.default_rng(0).normal(size=64).astype(np.float32)
PREFIX = list(range(100, 137))
LINES = [[200 + number, *range(300, 300 + number % 13 + 1)] for number in range(20)]
INDEPENDENT = [Prompt.of_lines(PREFIX, LINES[:8]), Prompt.of_lines(PREFIX[::-1], LINES[5:9])]
draw = np.random.default_rng(1)
WHOLE = [Prompt(draw.integers(3, 900, tokens).tolist(), list(range(20, 60, 2))) for tokens in (60, 301, 75)]
GIVEN = {"letters": WHOLE, "independent lines": INDEPENDENT}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny"))


def settled(folder: Path, read: str, runtime: Runtime = PACKED) -> PackedScorer:
    """Return a scorer as a ranker loads it, with two shapes of passes."""
    scorer = PackedScorer(folder, runtime, SIZES)
    scorer.settle(GIVEN[read])
    return scorer


def scores(scorer: Any, prompts: Sequence[Prompt]) -> list[NDArray[np.float32]]:
    """Return the scores of prompts that are scored together: of letters, or of independent lines."""
    if prompts[0].prefix:
        return scorer.score_prompts(prompts, DIRECTION)
    return list(scorer.score([prompt.tokens for prompt in prompts], LABELS))


def one_by_one(scorer: TorchScorer, prompt: Prompt) -> NDArray[np.float32]:
    """Return today's scores in transformers."""
    return scorer.score_independent(prompt, DIRECTION) if prompt.prefix else scorer.score([prompt.tokens], LABELS)[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 0.1, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("read", GIVEN)
def test_scores_are_those_of_transformers(tiny: Path, read: str, dtype: Any, tolerance: float):
    """The reference is the scorer in transformers' layers in the same precision; the tolerance is relative."""
    runtime = replace(PACKED, dtype=dtype)
    found = scores(settled(tiny, read, runtime), GIVEN[read])
    reference = TorchScorer(tiny, replace(runtime, forward="transformers"))
    for values, prompt in zip(found, GIVEN[read], strict=True):
        expected = one_by_one(reference, prompt)
        assert values == pytest.approx(expected, abs=tolerance * float(np.abs(expected).max()))


def test_every_way_to_read_gives_the_same_scores(tiny: Path):
    """Lines within a whole prompt, states and fewer letters, against transformers; readouts replace each other."""
    scorer, reference = settled(tiny, "letters"), TorchScorer(tiny, Runtime())
    prompt = WHOLE[1]
    letters = scorer.score([prompt.tokens], LABELS)
    assert scorer.score_lines(*prompt[:2], DIRECTION) == pytest.approx(
        reference.score_lines(*prompt[:2], DIRECTION), abs=1e-4
    )
    assert scorer.states(*prompt[:2]) == pytest.approx(reference.states(*prompt[:2]), abs=1e-4)
    assert scorer.score([prompt.tokens], LABELS[:3]).tobytes() == letters[:, :3].tobytes()
    assert scorer.independent_states(INDEPENDENT[0]) == pytest.approx(
        reference.independent_states(INDEPENDENT[0]), abs=1e-4
    )
    assert scorer.prefix_bytes(PREFIX) == reference.prefix_bytes(PREFIX)


@st.composite
def strangers(draw: st.DrawFn, read: str) -> list[Prompt]:
    """Draw 0 to 8 other prompts of any lengths that fit the context."""
    tokens = st.lists(st.integers(3, 900), min_size=1, max_size=400)
    if read == "letters":
        return [Prompt(drawn, []) for drawn in draw(st.lists(tokens, max_size=8))]
    lines = st.lists(st.lists(st.integers(3, 900), min_size=1, max_size=40), min_size=1, max_size=30)
    return [Prompt.of_lines(prefix, own) for prefix, own in draw(st.lists(st.tuples(tokens, lines), max_size=4))]


@pytest.mark.parametrize("read", GIVEN)
def test_a_known_prompt_has_the_same_bits_in_any_batch(tiny: Path, read: str):
    """Whatever is scored with it, before it and after it, and in whichever shape of pass that ends."""
    scorer, known = settled(tiny, read), GIVEN[read][0]
    assert scorer.settled == Settled(SIZES, "prompts")
    (expected,) = scores(scorer, [known])

    @settings(max_examples=8, deadline=None)
    @given(others=strangers(read), data=st.data())
    def check(others: list[Prompt], data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(others)))
        found = scores(scorer, [*others[:place], known, *others[place:]])[place]
        assert found.tobytes() == expected.tobytes()

    check()


def leak(monkeypatch: pytest.MonkeyPatch, rows: Sequence[int]) -> None:
    """Let passes of these numbers of rows add a trace of the whole pass to each state, as a kernel might."""
    whole = Forward.__call__

    def leaking(self: Forward, given: Rows) -> torch.Tensor:
        states = whole(self, given)
        return states + 1e-6 * given.tokens.float().mean() if len(given.tokens) in rows else states

    monkeypatch.setattr(Forward, "__call__", leaking)


@pytest.mark.parametrize("read", GIVEN)
def test_without_the_check_company_would_show(tiny: Path, monkeypatch: pytest.MonkeyPatch, read: str):
    """The inverse: if passes depend on their company, scores differ with the check off, and do not with it on."""
    leak(monkeypatch, SIZES)
    known, other = GIVEN[read][0], GIVEN[read][1]
    scorer = PackedScorer(tiny, PACKED, SIZES)
    scorer.settled = Settled(SIZES, "prompts")  # the check is off
    unchecked = [scores(scorer, batch)[0].tobytes() for batch in ([known], [known, other])]
    assert unchecked[0] != unchecked[1]
    scorer.settle(GIVEN[read])
    assert scorer.settled == Settled(SIZES, "line")
    alone, together = (scores(scorer, batch)[0].tobytes() for batch in ([known], [known, other]))
    assert alone == together
    if known.prefix:  # nor does a line depend on the other lines of its prompt
        (found,) = scores(scorer, [Prompt.of_lines(PREFIX, LINES[3:4])])
        assert found.tobytes() == scores(scorer, [known])[0][3:4].tobytes()


@pytest.mark.parametrize("read", GIVEN)
def test_a_shape_that_depends_on_company_is_dropped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, read: str
):
    """The warning names the shape and how far scores moved."""
    leak(monkeypatch, SIZES[1:])
    with caplog.at_level(logging.INFO):
        assert settled(tiny, read).settled == Settled(SIZES[:1], "prompts")
    assert "in passes of 1024 tokens scores depend on what shares the pass (by up to" in caplog.text
    assert "the ranker computes several prompts at once in passes of 512 tokens" in caplog.text


def test_a_tolerant_runtime_accepts_what_rounding_explains(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """The same trace, small beside the states, is within 1e-5 of them only if it is a tenth of that above."""
    leak(monkeypatch, SIZES)
    monkeypatch.setitem(packed_scorer.COMPANY_TOLERANCE, "float32", 1.0)
    assert settled(tiny, "letters", replace(PACKED, batching="tolerant")).settled == Settled(SIZES, "prompts")
    monkeypatch.setitem(packed_scorer.COMPANY_TOLERANCE, "float32", 1e-9)
    assert settled(tiny, "letters", replace(PACKED, batching="tolerant")).settled.together == "line"


def run_with(error: Any) -> Any:
    """Return a computation of passes that adds an error: a function of rows, the item's number in it, and its place."""

    def run(items: Sequence[Item], bucket: Bucket) -> list[NDArray[np.float32]]:
        return [
            np.array([[item.prefix[0] + error(bucket.rows, number, len(items))]], np.float32)
            for number, item in enumerate(items)
        ]

    return run


@pytest.mark.parametrize(
    ("error", "kept", "warning"),
    [
        (lambda rows, number, count: 0, (512, 1024, 2048), ""),
        (lambda rows, number, count: rows == 512, (1024, 2048), "passes of 512 tokens give other scores than those of"),
        (lambda rows, number, count: rows == 2048, (512, 1024), "passes of 2048 tokens give other scores than"),
        (lambda rows, number, count: rows, (2048,), "passes of 1024 tokens give other scores than those of 2048"),
        (lambda rows, number, count: rows == 1024 and number == count - 1 > 0, (512, 2048), "in passes of 1024 tokens"),
        (lambda rows, number, count: rows == 512 and count > 1, (1024, 2048), "in passes of 512 tokens scores depend"),
        (lambda rows, number, count: np.nan if count > 1 else 0, (), "(by up to inf)"),
    ],
)
def test_the_largest_group_of_agreeing_shapes_is_kept(
    error: Any, kept: tuple[int, ...], warning: str, caplog: pytest.LogCaptureFixture
):
    """Shapes that disagree with each other, or with themselves at some place, are dropped; made-up states."""
    sizes = (512, 1024, 2048)
    found = settle_buckets(run_with(error), sizes, WHOLE)
    assert found == (Settled(kept, "prompts") if kept else Settled(sizes, "line"))
    assert warning in caplog.text


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (lambda rows, number, count: (rows > 2048) + 2 * (rows == 512), (1024, 2048)),
        (lambda rows, number, count: rows, (2048,)),
        (lambda rows, number, count: rows <= 2048 and count > 1, (4096, 8192, 16384)),
    ],
)
def test_a_single_prompt_is_not_computed_in_the_largest_pass(error: Any, kept: tuple[int, ...]):
    """Most of these shapes agree with each other, but one prompt would take many times as long in them."""
    assert settle_buckets(run_with(error), BUCKET_ROWS, WHOLE) == Settled(kept, "prompts")


def test_nan_is_equal_to_itself_only_in_its_bits():
    """States that are no numbers have the same bits everywhere: that is the probes' matter, which refuse them."""
    assert settle_buckets(run_with(lambda *_: np.nan), SIZES, WHOLE) == Settled(SIZES, "prompts")


def test_probes_are_checked_whole_and_cut_short():
    """A probe of 60 tokens and the same cut to 24; independent lines become one line of at most 12 tokens after 12."""
    whole, short = probe_items(WHOLE[:1])
    assert (len(whole.prefix), list(whole.places)) == (60, [*WHOLE[0].line_ends, 59])
    assert (len(short.prefix), list(short.places)) == (24, [23])
    whole, short = probe_items(INDEPENDENT[:1])
    assert (whole.lines, len(short.prefix), short.lines) == (LINES[:8], 12, [LINES[0]])


@pytest.fixture
def exported(tiny: Path, tmp_path: Path) -> Any:
    """Return a function that writes the files of a ranker which reads this way, with the scores of transformers."""

    def write(read: str) -> Path:
        (tmp_path / "merged").symlink_to(tiny)
        probes = GIVEN[read]
        verbalizer: Verbalizer = LineVerbalizer(DIRECTION) if probes[0].prefix else LetterVerbalizer(LABELS)
        reference = TorchScorer(tiny, Runtime())
        rows = [
            {
                **prompt._asdict(),
                "logprobs": torch.from_numpy(verbalizer.logits(reference, prompt)).log_softmax(0).tolist(),
            }
            for prompt in probes
        ]
        contents = {"verbalizer": verbalizer.stored(), "fusion": {"weight": 0.0}, "probes": rows}
        for name, content in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        write_runtime(tmp_path, PACKED)
        return tmp_path

    return write


@pytest.mark.parametrize("read", GIVEN)
def test_a_ranker_is_loaded_in_the_packed_forward(exported: Any, read: str):
    """It settles its passes, replays the probes that transformers computed, and gives their order."""
    folder = exported(read)
    prompt = GIVEN[read][0]
    packed, transformers = (Ranker.load(folder, runtime) for runtime in (None, Runtime()))
    count = len(prompt.line_ends)
    given = np.zeros(count, np.float32), np.arange(1, count + 1)
    for found, expected in zip(packed.rank(prompt, *given), transformers.rank(prompt, *given), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert packed.prefix_bytes(GIVEN[read]) == transformers.prefix_bytes(GIVEN[read])


def test_a_ranker_is_loaded_in_fp8(exported: Any):
    """Scores are near those of the probes in fp32, but not equal. Prefixes need transformers' layers."""
    folder, prompt, runtime = exported("letters"), GIVEN["letters"][0], Runtime(dtype="float8")
    exact, rounded = (Ranker.load(folder, each).logits(prompt) for each in (Runtime(), runtime))
    assert 0 < np.abs(rounded - exact).max() < 1
    with pytest.raises(InputError, match="packed forward of PyTorch only, which keeps no prefix"):
        Ranker.load(folder, runtime, prefix_cache=1)


def test_fp8_that_disagrees_with_the_probes_is_not_served(exported: Any, monkeypatch: pytest.MonkeyPatch):
    """No rounding to fp8 is as small as this share of the scores' spread."""
    monkeypatch.setattr(ranker, "FLOAT8_SHARE", 1e-6)
    with pytest.raises(InputError, match=r"prompt 0 moved by .* in float8: run `llamarec export` with --dtype float16"):
        Ranker.load(exported("letters"), Runtime(dtype="float8"))


@pytest.mark.parametrize("read", GIVEN)
def test_prompts_ranked_together_have_the_bits_of_each_alone(exported: Any, read: str):
    """Also beside prompts that are refused, without candidates, or unlike the others; each gets its own result."""
    loaded = Ranker.load(exported(read))
    assert loaded.packs
    known = GIVEN[read]
    rows = [(prompt, np.zeros(len(prompt.line_ends)), np.arange(len(prompt.line_ends)) + 1) for prompt in known]
    alone = [loaded.rank(*row) for row in rows]
    outside = Prompt([5, 49152], [1])
    few = Prompt(known[0].tokens, known[0].line_ends[:3], known[0].prefix)
    others = [(few, np.zeros(3), np.arange(3)), (Prompt([], []), np.empty(0), np.empty(0)), (few, np.zeros(2), [1, 2])]
    for extra in ([], others, [*others, (outside, np.zeros(1), [1])]):
        found = loaded.rank_all([*extra, *rows])
        for (places, probabilities), expected in zip(found[len(extra) :], alone, strict=True):
            assert places.tolist() == expected[0].tolist()
            assert probabilities.tobytes() == expected[1].tobytes()
    ranked, nothing, refused, unknown = found[:4]
    assert [values.tobytes() for values in ranked] == [values.tobytes() for values in loaded.rank(*others[0])]
    assert [values.size for values in nothing] == [0, 0]
    assert "3 line ends for 2 candidates" in str(refused)
    assert "token ids must be 0 to 49151" in str(unknown)


def test_a_ranker_that_keeps_prefixes_runs_in_transformers(exported: Any, caplog: pytest.LogCaptureFixture):
    """The packed forward keeps none, and the log says so; the second request takes the history from the cache."""
    folder = exported("independent lines")
    loaded = Ranker.load(folder, prefix_cache=1)
    assert isinstance(loaded._scorer, TorchScorer)
    assert loaded._scorer.prefixes._limit == 1 << 20
    assert "in transformers' layers: --prefix-cache keeps histories, which the packed forward does not" in caplog.text
    caplog.clear()
    Ranker.load(folder, Runtime(forward="transformers"), prefix_cache=1)
    assert "prefix-cache" not in caplog.text


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (Runtime(), TorchScorer),
        (Runtime(forward="packed"), PackedScorer),
        (Runtime(dtype="float8"), PackedScorer),
        (Runtime(device="cuda", dtype="float16"), PackedScorer),
        (Runtime(device="cuda", dtype="float16", forward="transformers"), TorchScorer),
    ],
)
def test_a_gpu_takes_the_packed_forward(tiny: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime, expected: type):
    """The processor keeps transformers' layers unless the packed forward is named."""
    for kind in (TorchScorer, PackedScorer):
        monkeypatch.setattr(kind, "__init__", lambda self, *args: None)
    assert type(load_scorer(tiny, runtime)) is expected


def test_other_architectures_fall_back_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """On a GPU with a warning that says why; if the packed forward is named, with an error."""
    folder = base_of("GPT-2", tmp_path)
    monkeypatch.setattr(TorchScorer, "__init__", lambda self, *args: None)
    assert isinstance(load_scorer(folder, Runtime(device="cuda", dtype="float16")), TorchScorer)
    assert "the ranker runs one prompt at a time in transformers' layers: the lean forward does not" in caplog.text
    for runtime in (PACKED, Runtime(dtype="float8")):
        with pytest.raises(UnsupportedBaseError, match="does not compute gpt2: its layers are not those of llama"):
            load_scorer(folder, runtime)


def test_prompts_that_the_tables_do_not_hold_are_refused(tmp_path: Path):
    """On a GPU, an index outside a table would end the process."""
    scorer = PackedScorer(tiny_base(tmp_path, max_position_embeddings=64), PACKED, SIZES)
    for token in (-1, 49152):
        with pytest.raises(InputError, match="token ids must be 0 to 49151"):
            scorer.score([[1, token]], LABELS)
    with pytest.raises(InputError, match="a prompt of 65 tokens is longer than the model's context of 64"):
        scorer.score([[1] * 65], LABELS)
    with pytest.raises(InputError, match="65 letters: the packed forward reads at most 64"):
        scorer.score([[1]], range(65))
    assert len(LETTERS) <= 64


def test_a_prompt_longer_than_any_pass_gets_one_of_its_own(tiny: Path):
    """600 tokens in passes of 512; it is computed by itself, whatever it is scored with."""
    scorer = PackedScorer(tiny, PACKED, SIZES[:1])
    scorer.settle(WHOLE)
    long = Prompt(list(range(3, 603)), [])
    found = scores(scorer, [WHOLE[0], long, WHOLE[2]])
    assert found[1] == pytest.approx(one_by_one(TorchScorer(tiny, Runtime()), long), abs=1e-4)
    assert found[1].tobytes() == scores(scorer, [long])[0].tobytes()


def test_passes_that_the_memory_does_not_hold_are_left_out(tiny: Path):
    """The largest pass that fits is kept; if none fits, the error says what the smallest takes."""
    shape = PackedScorer(tiny, PACKED, SIZES).shape
    takes = [pass_bytes(shape, Bucket(rows, lines=True), torch.float16) for rows in SIZES]
    assert takes[0] < takes[1]
    assert sizes_in(shape, SIZES, torch.float16, takes[1]) == SIZES
    assert sizes_in(shape, SIZES, torch.float16, takes[1] - 1) == SIZES[:1]
    with pytest.raises(InputError, match=r"the smallest pass, of 512 tokens, takes \d+ MiB .* free some, use another"):
        sizes_in(shape, SIZES, torch.float16, takes[0] - 1)


@pytest.mark.parametrize(
    "changed", [{"forward": "fast"}, {"batching": "loose"}, {"runtime": "openvino", "forward": "packed"}]
)
def test_unknown_settings_are_refused(changed: Any):
    with pytest.raises(InputError, match="is not a runtime of this version"):
        Runtime(**changed)
