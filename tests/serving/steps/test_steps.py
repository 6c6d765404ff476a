"""The Triton steps without a server: loading, answers and refusals."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarec_client.contract import CANDIDATES, EXCLUDE, HISTORY, ITEM_ID, RETRIEVER_RANK, SCORE, TOP_K
from models.ranker.inference.ranker import Ranker, write_runtime
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import Prompt
from models.retriever.candidates import Candidates
from preprocessing.artifacts import new_artifact
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.catalogue import Catalogue as ItemCatalogue
from preprocessing.errors import InputError
from preprocessing.features import EncodedRequest, save_vocabulary
from serving.contract import (
    CANDIDATE_ID,
    CANDIDATE_ITEM,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    EXCLUDED_ITEM,
    GIVEN_ITEM,
    HISTORY_ITEM,
    LIMIT,
    LINE_END,
    PREFIX,
    QUEUED,
    RETRIEVE,
    STEP_SPECS,
    TOKEN,
)
from serving.layout import KIND, instance_device, loaded_artifact
from serving.steps.features import FeaturesStep
from serving.steps.prompt_builder import PromptBuilderStep
from serving.steps.ranker import JointRankerStep, RankerStep
from serving.steps.retriever import RetrieverStep
from serving.steps.step import JointStep
from serving.steps.worker import Worker
from stores.store import AddedItem, Listing


def texts(*ids: bytes) -> np.ndarray:
    return np.array(ids, dtype=object)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# --- loading


def exported(repository: Path, **releases: str) -> None:
    """Write the artifact folder of each named step, as an export of that release does."""
    for step, release in releases.items():
        with new_artifact(
            repository / step / "1" / "artifact", KIND, options={}, inputs={}, facts={"release": release}
        ) as folder:
            (folder / "file").write_text("content")


def arguments(repository: Path, step: str) -> dict[str, str]:
    """Return the arguments that Triton passes to ``initialize``, as observed with the wheel's server."""
    return {"model_name": step, "model_repository": str(repository / step), "model_version": "1"}


def test_a_step_of_a_complete_export_finds_its_folder(tmp_path):
    exported(tmp_path, features="r1", retriever="r1", prompt_builder="r1", ranker="r1")
    assert loaded_artifact("ranker", arguments(tmp_path, "ranker")) == tmp_path / "ranker" / "1" / "artifact"


def test_a_step_may_stand_alone(tmp_path):
    """A repository that serves retrieval only has no ranker, so the steps that are there load without it."""
    exported(tmp_path, features="r1", retriever="r1")
    assert loaded_artifact("retriever", arguments(tmp_path, "retriever")).is_dir()


def test_a_step_without_export_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="run `llamarec export`"):
        loaded_artifact("features", arguments(tmp_path, "features"))


def test_a_half_finished_export_is_refused(tmp_path):
    """An export that was interrupted after two steps is refused, because old and new files would answer together."""
    exported(tmp_path, features="r2", retriever="r2", prompt_builder="r1", ranker="r1")
    with pytest.raises(InputError, match="features and prompt_builder are from different exports: half exported"):
        loaded_artifact("features", arguments(tmp_path, "features"))


def test_a_changed_file_is_refused(tmp_path):
    exported(tmp_path, features="r1")
    (tmp_path / "features" / "1" / "artifact" / "file").write_text("cut")
    with pytest.raises(InputError, match="missing or was changed"):
        loaded_artifact("features", arguments(tmp_path, "features"))


@pytest.mark.parametrize(
    ("module", "step"),
    [
        ("features", "FeaturesStep"),
        ("retriever", "RetrieverStep"),
        ("prompt_builder", "PromptBuilderStep"),
        ("neighbours", "NeighboursStep"),
    ],
)
def test_torch_is_imported_in_the_ranker_only(module, step):
    """These four steps load without torch, which takes 144 MB of memory in each process that imports it.

    SciPy and scikit-learn, with which the signals are counted and the titles' words are learned, are not installed
    where only the steps run.
    """
    program = f"""
import sys
from pathlib import Path
import serving.steps.worker
from serving.steps.{module} import {step}
nothing = Path("/nothing")
try:
    {step}.load(nothing)
except ImportError:
    raise
except Exception:
    pass
heavy = {{"torch", "transformers", "nvtabular", "scipy", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- the glue


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError:
    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class Response:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self.error = {tensor.name: tensor.array for tensor in output_tensors}, error


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """Replace ``triton_python_backend_utils``, which exists only inside the server, and return the logged lines."""
    lines: list[str] = []
    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError, utils.InferenceResponse = Tensor, TritonError, Response
    utils.Logger = types.SimpleNamespace(log_error=lines.append)
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    return lines


class AskedFor(dict[str, Tensor]):
    """A request's tensors by name; it requests the given outputs, or by default every output."""

    def __init__(self, tensors: dict[str, Tensor], *outputs: str) -> None:
        super().__init__(tensors)
        every = {spec.name for model in STEP_SPECS.values() for spec in model.outputs}
        self.requested_output_names = lambda: outputs or every


def request(*outputs: str, **arrays: np.ndarray) -> AskedFor:
    return AskedFor({name: Tensor(name, array) for name, array in arrays.items()}, *outputs)


def answer_each(name: str, answer: Callable, requests: list[AskedFor]) -> list[Response]:
    """Return the responses of a :class:`Worker` whose step answers with ``answer``."""
    return Worker(name, types.SimpleNamespace(answer=answer)).execute(requests)


def test_each_request_gets_its_own_answer_or_error(logged):
    """Good, bad and failing requests of one batch are answered in order; only the unexpected failure is logged."""

    def answer(tensors):
        (item,) = tensors[HISTORY_ITEM]
        if item == 1:
            raise InputError("HISTORY_ITEM is 1")
        if item == 2:
            raise KeyError("lost")
        return {TOKEN: [int(item)] * 3, LINE_END: [2], PREFIX: [0], QUEUED: [0]}

    numbers = [0, 1, 2, 3]
    requests = [request(HISTORY_ITEM=np.array([[n]]), CANDIDATE_ITEM=np.array([[1]])) for n in numbers]
    good, bad, failing, last = answer_each("prompt_builder", answer, requests)
    assert good.tensors["TOKEN"].tolist() == [[0, 0, 0]]
    assert good.tensors["TOKEN"].dtype == np.int32
    assert (bad.error.code, bad.error.message) == ("INVALID_ARG", "prompt_builder: HISTORY_ITEM is 1")
    assert (failing.error.code, failing.error.message) == ("INTERNAL", "prompt_builder: KeyError: 'lost'")
    assert last.tensors["TOKEN"].tolist() == [[3, 3, 3]]
    assert len(logged) == 1
    assert "KeyError" in logged[0]


def test_only_what_was_asked_for_is_made_a_tensor(logged):
    """Only the requested outputs become tensors, because each one costs a copy between processes.

    The ensemble requests four of the retriever's seven outputs.
    """
    asked = request("TOKEN", HISTORY_ITEM=np.array([[1]]), CANDIDATE_ITEM=np.array([[1]]))
    (response,) = answer_each("prompt_builder", lambda tensors: {TOKEN: [1], LINE_END: [0], QUEUED: [0]}, [asked])
    assert set(response.tensors) == {"TOKEN"}


def test_absent_optional_tensors_are_absent(logged):
    """An absent CANDIDATES (retrieve candidates) is distinguished from one of length 0 (there are none to rank)."""
    seen = []

    def answer(tensors):
        seen.append(set(tensors))
        return {spec: [] for spec in STEP_SPECS["features"].outputs}

    empty = np.empty((1, 0), dtype=object)
    answer_each("features", answer, [request(HISTORY=empty), request(HISTORY=empty, CANDIDATES=empty)])
    assert seen == [{HISTORY}, {HISTORY, CANDIDATES}]


def test_two_users_in_one_request_are_refused(logged):
    """A request for two users is refused, because the contract fixes the leading batch dimension at 1."""
    (response,) = answer_each("features", lambda tensors: {}, [request(HISTORY=np.full((2, 1), b"a", dtype=object))])
    assert response.error.code == "INVALID_ARG"
    assert response.error.message.startswith("features: HISTORY holds 2 users")


# --- the steps, over stand-ins for what they call


class Catalogue:
    def __len__(self) -> int:
        return 9

    def raw(self, item: int) -> bytes:
        return b"raw%d" % item


class Retriever:
    """Returns 7, 5 and 9 for every history, or the caller's items, of which the last has no embedding."""

    def candidates(self, history, excluded) -> Candidates:
        self.asked = (history.tolist(), excluded.tolist())
        return Candidates(ints(7, 5, 9), np.array([2, 1, 0], np.float32), ints(1, 2, 3)).first(3)

    def given(self, history, items) -> Candidates:
        ranks = [*range(1, len(items)), 0][-len(items) :]
        scores = np.array([0.0] * (len(items) - 1) + [-np.inf], np.float32)[-len(items) :]
        return Candidates(items, scores, ints(*ranks))


def retrieval_request(retrieve: int, limit: int, items: tuple[int, ...] = ()) -> dict:
    return {
        HISTORY_ITEM: ints(3, 4),
        EXCLUDED_ITEM: ints(8),
        GIVEN_ITEM: ints(*items),
        RETRIEVE: ints(retrieve),
        LIMIT: ints(limit),
    }


def test_retrieval_answers_with_probabilities_and_passes_their_logarithms_on():
    """The answer has probabilities and is cut at LIMIT; the candidates for the next step keep their scores and number.

    The softmax of (2, 1, 0) is (.66524, .24473, .09003), computed by hand; the scores are its logarithms.
    """
    retriever = Retriever()
    answer = RetrieverStep.of(retriever, Catalogue()).answer(retrieval_request(1, 2))
    assert retriever.asked == ([3, 4], [8])
    assert answer[CANDIDATE_ITEM].tolist() == [7, 5, 9]
    assert answer[CANDIDATE_ID].tolist() == [b"raw7", b"raw5", b"raw9"]
    np.testing.assert_allclose(answer[CANDIDATE_SCORE], np.log([0.66524, 0.24473, 0.09003]), atol=1e-4)
    assert answer[CANDIDATE_RANK].tolist() == [1, 2, 3]
    assert answer[ITEM_ID].tolist() == [b"raw7", b"raw5"]
    np.testing.assert_allclose(answer[SCORE], [0.66524, 0.24473], atol=1e-5)
    assert answer[RETRIEVER_RANK].tolist() == [1, 2]


def test_retrieval_ranks_the_callers_candidates():
    """A candidate that the retriever cannot score has probability 0 and rank 0."""
    answer = RetrieverStep.of(Retriever(), Catalogue()).answer(retrieval_request(0, 0, (6, 2)))
    assert answer[ITEM_ID].tolist() == [b"raw6", b"raw2"]
    assert answer[SCORE].tolist() == [1, 0]
    assert answer[RETRIEVER_RANK].tolist() == [1, 0]


class GrowingStore:
    """Has one item more each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def listing(self, known: int | None = None) -> Listing:
        self.asked += 1
        return Listing(self.asked, tuple(AddedItem(b"new%d" % n, f"New {n}") for n in range(self.asked)), frozenset())


class TitledRetriever(Retriever):
    def with_added(self, titles: list[str | None]) -> "TitledRetriever":
        self.titles = titles
        return self


def test_a_number_that_another_step_knows_already_is_looked_up():
    """The features may know an item that was added a moment ago before the next steps do: 4 and 5 come after three."""
    store = GrowingStore()
    retriever, catalogue = TitledRetriever(), ItemCatalogue([b"a", b"b", b"c"], ["A", "B", "C"], [1, 1, 1])
    step = RetrieverStep.of(retriever, catalogue, store)
    request = retrieval_request(0, 0, (4, 1))
    assert step.answer({**request, HISTORY_ITEM: ints(1), EXCLUDED_ITEM: ints()})[ITEM_ID].tolist() == [b"new0", b"a"]
    assert retriever.titles == ["New 0"]
    step.answer({**request, HISTORY_ITEM: ints(5), EXCLUDED_ITEM: ints()})
    assert (store.asked, retriever.titles) == (2, ["New 0", "New 1"])


class Prompts:
    items = 9

    def build(self, history, candidates) -> Prompt:
        assert candidates, "a prompt has at least one candidate"
        return Prompt([*history, -1, *candidates], [1] * len(candidates))


def test_no_candidates_make_no_prompt():
    """Without candidates the prompt is empty, so that the language model does not run."""
    step = PromptBuilderStep.of(Prompts())
    answer = step.answer({HISTORY_ITEM: ints(3), CANDIDATE_ITEM: ints(7, 5)})
    assert (answer[TOKEN], answer[LINE_END]) == ([3, -1, 7, 5], [1, 1])
    answer = step.answer({HISTORY_ITEM: ints(3), CANDIDATE_ITEM: ints()})
    assert (answer[TOKEN], answer[LINE_END]) == ([], [])


class BackwardsRanker:
    def rank(self, prompt, scores, ranks):
        assert len(prompt.line_ends) == len(scores)
        order = np.arange(len(scores))[::-1]
        return order, np.linspace(0.5, 0.1, len(scores), dtype=np.float32)


@given(count=st.integers(0, 20), limit=st.integers(0, 20))
def test_ranking_keeps_each_candidates_columns_together(count, limit):
    """In any order, the id and the retriever rank of a place belong to the same candidate; LIMIT 0 returns all."""
    items = list(range(count))
    tensors = {
        TOKEN: ints(1, 2),
        LINE_END: ints(*items),
        CANDIDATE_ID: np.array([b"raw%d" % item for item in items], dtype=object),
        CANDIDATE_SCORE: np.zeros(count, np.float32),
        CANDIDATE_RANK: ints(*(item + 1 for item in items)),
        LIMIT: ints(limit),
    }
    answer = RankerStep(BackwardsRanker()).answer(tensors)
    expected = items[::-1][: limit or None]
    assert answer[ITEM_ID].tolist() == [b"raw%d" % item for item in expected]
    assert answer[RETRIEVER_RANK].tolist() == [item + 1 for item in expected]
    assert len(answer[SCORE]) == len(expected)


def test_the_prefix_of_independent_lines_reaches_the_ranker():
    """A repository of an earlier version sends no PREFIX, and its prompts have none."""
    asked = []

    class KeepingRanker(BackwardsRanker):
        def rank(self, prompt, scores, ranks):
            asked.append(prompt)
            return super().rank(prompt, scores, ranks)

    step = RankerStep(KeepingRanker())
    sent = {
        TOKEN: ints(1, 2, 3),
        LINE_END: ints(1, 2),
        CANDIDATE_ID: texts(b"x", b"y"),
        CANDIDATE_SCORE: np.zeros(2, np.float32),
        CANDIDATE_RANK: ints(1, 2),
        LIMIT: ints(0),
    }
    step.answer(sent)
    step.answer({**sent, PREFIX: ints(0)})
    step.answer({**sent, PREFIX: ints(1)})
    assert asked == [Prompt([1, 2, 3], [1, 2]), Prompt([1, 2, 3], [1, 2], 0), Prompt([1, 2, 3], [1, 2], 1)]


def test_a_remembered_prompt_is_ranked_once():
    """The same prompt and scores with another LIMIT are ranked once; another prompt or other scores are ranked anew."""
    asked = []

    class CountingRanker(BackwardsRanker):
        def rank(self, prompt, scores, ranks):
            asked.append(prompt.tokens)
            return super().rank(prompt, scores, ranks)

    step = RankerStep(CountingRanker(), cached=10)

    def answer(token, score, limit):
        return step.answer(
            {
                TOKEN: ints(token),
                LINE_END: ints(0, 0),
                CANDIDATE_ID: texts(b"x", b"y"),
                CANDIDATE_SCORE: np.full(2, score, np.float32),
                CANDIDATE_RANK: ints(1, 2),
                LIMIT: ints(limit),
            }
        )[ITEM_ID].tolist()

    assert answer(1, 0.0, 0) == [b"y", b"x"]
    assert answer(1, 0.0, 1) == [b"y"]
    assert asked == [[1]]
    answer(2, 0.0, 0)
    answer(1, 0.5, 0)
    assert asked == [[1], [2], [1]]


def test_requests_are_ranked_together_and_refused_alone():
    """One pass over what is new; the answers are those of one request by itself, and a refusal is not remembered."""
    asked: list[list[list[int]]] = []

    class TogetherRanker(BackwardsRanker):
        def rank_all(self, given):
            asked.append([prompt.tokens for prompt, _, _ in given])
            return [
                InputError("token 9") if prompt.tokens == [9] else self.rank(prompt, scores, ranks)
                for prompt, scores, ranks in given
            ]

    def sent(token, limit=0):
        return {
            TOKEN: ints(token),
            LINE_END: ints(0, 0),
            CANDIDATE_ID: texts(b"x", b"y"),
            CANDIDATE_SCORE: np.zeros(2, np.float32),
            CANDIDATE_RANK: ints(1, 2),
            LIMIT: ints(limit),
        }

    step = JointRankerStep(TogetherRanker(), cached=2)
    first, refused, again, other = step.answer_all([sent(1), sent(9), sent(1, 1), sent(2)])
    assert str(refused) == "token 9"
    assert [answer[ITEM_ID].tolist() for answer in (first, again, other)] == [[b"y", b"x"], [b"y"], [b"y", b"x"]]
    step.answer_all([sent(1), sent(9), sent(3)])
    step.answer_all([sent(1), sent(2)])
    assert asked == [[[1], [9], [2]], [[9], [3]], [[2]]]
    assert JointRankerStep(TogetherRanker()).answer_all([sent(1)])[0][ITEM_ID].tolist() == [b"y", b"x"]


class Encoder:
    def encode(self, history, exclude, candidates, top_k, history_titles, candidate_titles):
        self.asked = (history, exclude, candidates, top_k, history_titles, candidate_titles)
        return EncodedRequest(
            history=ints(1), excluded=ints(), given=ints(), retrieve=candidates is None, limit=top_k or 0, unknown=2
        )


def test_features_tell_absent_from_empty():
    """Absent and empty inputs are distinguished, and every output is always present, as later steps require."""
    encoder = Encoder()
    step = FeaturesStep.of(encoder)
    answer = step.answer({HISTORY: texts(b"a", b"b")})
    assert encoder.asked == ([b"a", b"b"], [], None, None, None, None)
    assert (answer[RETRIEVE], answer[LIMIT]) == ([True], [0])
    step.answer({HISTORY: texts(), EXCLUDE: texts(b"c"), CANDIDATES: texts(), TOP_K: ints(3)})
    assert encoder.asked == ([], [b"c"], [], 3, None, None)
    assert set(answer) == {HISTORY, *STEP_SPECS["features"].outputs}


def test_features_read_the_retrievers_vocabulary(tmp_path):
    """A retriever whose vocabulary has two items knows both, although only one of them was trained.

    The step opens the files of its folder; without the vocabulary of an export, only the trained item is known.
    """
    ItemCatalogue([b"a", b"new"], ["A", "New"], [1]).write(tmp_path / ITEMS_FILE)
    asked = {HISTORY: texts(b"new", b"a")}
    assert FeaturesStep.load(tmp_path).answer(asked)[HISTORY_ITEM].tolist() == [1]
    save_vocabulary(tmp_path, 2)
    assert FeaturesStep.load(tmp_path).answer(asked)[HISTORY_ITEM].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({"model_instance_kind": "CPU", "model_instance_device_id": "0"}, None),
        ({"model_instance_kind": "GPU", "model_instance_device_id": "1"}, "cuda:1"),
        ({}, None),
    ],
)
def test_an_instance_runs_on_the_gpu_that_triton_gave_it(given, device):
    """With several GPUs each instance runs on the GPU named in the arguments of Triton's ``initialize``."""
    assert instance_device(given) == device


class Packing(NamedTuple):
    """A ranker that packs prompts or does not."""

    packs: bool


@pytest.mark.parametrize(("packs", "kind"), [(True, JointRankerStep), (False, RankerStep)])
def test_a_ranker_that_packs_answers_requests_together(tmp_path, monkeypatch, packs, kind):
    monkeypatch.setattr(Ranker, "load", lambda *given: Packing(packs))
    write_runtime(tmp_path, Runtime())
    step = RankerStep.load(tmp_path)
    assert type(step) is kind
    assert isinstance(step, JointStep) == packs


def test_the_rankers_device_replaces_that_of_the_export(tmp_path, monkeypatch):
    """The device of an instance, here ``cuda:1``, replaces the exported runtime's ``cuda``."""
    loaded = []
    monkeypatch.setattr(
        Ranker, "load", lambda folder, runtime, prefix_cache: loaded.append(runtime.device) or Packing(False)
    )
    write_runtime(tmp_path, Runtime(dtype="float16", device="cuda"))
    RankerStep.load(tmp_path, device="cuda:1")
    RankerStep.load(tmp_path)
    assert loaded == ["cuda:1", "cuda"]
