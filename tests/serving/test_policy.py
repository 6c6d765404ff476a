"""Policies: what is refused, and how a request's and the release's become rules, step by step without a server."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarec_client.contract import (
    CANDIDATE_TITLE,
    CANDIDATES,
    HISTORY,
    ITEM_ID,
    POLICY,
    RETRIEVER_RANK,
    SCORE,
)
from models.ranker.inference.ranker import Ranker
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import Prompt
from models.retriever.inference.onnx_retriever import Graph, OnnxRetriever
from models.retriever.rules import Rules
from models.retriever.stage import RetrievalStage
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from serving.contract import (
    CANDIDATE_BOOST,
    CANDIDATE_SCORE,
    LIMIT,
    LINE_END,
    PREFIX,
    RULES,
    STEP_SPECS,
    TOKEN,
)
from serving.offline import ExportedSteps
from serving.policy import (
    NO_POLICY,
    Policy,
    check_groups,
    decode_rules,
    encode_rules,
    load_policy,
    read_policy,
    rules_for_known,
    save_policy,
)
from serving.steps.features import FeaturesStep
from serving.steps.ranker import RankerStep
from serving.steps.retriever import RetrieverStep
from serving.steps.worker import DTYPES

IDS = [b"a", b"b", b"c", b"d", b"e", b"new"]
GROUPS = ["Film", "Film", "Film", "Book", None, "Book"]
CATALOGUE = Catalogue(IDS, ["A", "B", "C", "D", "E", "New"], [1, 1, 1, 1, 1], GROUPS)
PLAIN = Catalogue(IDS, ["A", "B", "C", "D", "E", "New"], [1, 1, 1, 1, 1])
ENCODER = FeatureEncoder(CATALOGUE)


class Session:
    """Scores a, b, c, d and e with 5, 4, 3, 2 and 1."""

    def run(self, outputs, feeds):
        return [np.array([[9, 5, 4, 3, 2, 1]], np.float32)]


class Verbalizer:
    """All candidates are equally likely to the language model."""

    def logits(self, scorer, prompt):
        return np.zeros(len(prompt.line_ends), np.float32)


class Prompts:
    def build(self, history, candidates):
        return Prompt([0] * (len(candidates) + 1), list(range(len(candidates))))


RETRIEVER = OnnxRetriever([Graph(Session(), 10)], RetrievalStage())
RANKER = Ranker(None, Verbalizer(), weight=1.0, runtime=Runtime(), temperature=2.0)


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype=object)


def asked(policy: Any = None, *history: str, **more: Any) -> dict:
    """Return a request of this policy, which is sent as JSON unless it is text."""
    request = {HISTORY: texts(*history), **more}
    if policy is not None:
        request[POLICY] = texts(policy if isinstance(policy, str) else json.dumps(policy))
    return request


def rules_in(answer: dict) -> Rules | None:
    return decode_rules(answer[RULES])


def through_steps(request: dict, default: Policy = NO_POLICY) -> tuple[list, list]:
    """Return the answers of both ensembles: raw ids, scores and ranks."""
    features = FeaturesStep.of(ENCODER, policy=default)
    answer = RetrieverStep.of(RETRIEVER, CATALOGUE).answer(passed_on("retriever", features.answer(request)))
    prompt = Prompts().build([], answer[ITEM_ID])
    more = {TOKEN: prompt.tokens, LINE_END: prompt.line_ends, PREFIX: [0], LIMIT: [0]}
    ranked = RankerStep(RANKER).answer(passed_on("ranker", {**answer, **more}))
    return rows(answer), rows(ranked)


def passed_on(name: str, answer: dict) -> dict:
    """Return an answer as the inputs of the next step."""
    known = {spec: np.asarray(values, DTYPES[spec.data_type]) for spec, values in answer.items()}
    return {spec: known[spec] for spec in STEP_SPECS[name].inputs if spec in known}


def rows(answer: dict) -> list[tuple[str, float, int]]:
    columns = (np.asarray(answer[spec]).tolist() for spec in (ITEM_ID, SCORE, RETRIEVER_RANK))
    return [(item.decode(), score, rank) for item, score, rank in zip(*columns, strict=True)]


def items(answer: list) -> str:
    return "".join(item for item, _, _ in answer)


# --- what is refused


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{", r"POLICY is not JSON \(.*\): give one object, such as"),
        ("[]", r"POLICY is \[\]: give one JSON object"),
        ("[" * 60_000, "POLICY is not JSON"),
        ('{"repeats": "all", "repeats": "none"}', "'repeats' occurs more than once"),
        ("{" + " " * 70_000 + "}", "POLICY has 70,002 bytes: give at most 65,536"),
        (
            {"max_per_grup": 1},
            "unknown field 'max_per_grup': it takes max_per_group, only_groups, never_groups, boosts",
        ),
        ({"max_per_group": 0}, "POLICY: max_per_group is 0: give a whole number from 1 to 10,000, or null"),
        ({"max_per_group": True}, "max_per_group is True"),
        ({"max_per_group": 2.0}, "max_per_group is 2.0"),
        ({"max_per_group": "2"}, "max_per_group is '2'"),
        ({"only_groups": "Film"}, "POLICY: only_groups is 'Film': give a list of names"),
        ({"only_groups": []}, "POLICY: only_groups is empty, so no item could be recommended"),
        (
            {"only_groups": ["Film", "Radio"]},
            "only_groups holds 'Radio', which is none of the 2 groups: 'Book', 'Film'",
        ),
        ({"never_groups": ["Radio"]}, "never_groups holds 'Radio'"),
        ({"never_groups": [3]}, "never_groups is"),
        ({"never_groups": ["Film"] * 1001}, "never_groups holds 1,001 groups: give at most 1,000"),
        ({"boosts": ["a"]}, "POLICY: boosts is .*: give an object with a factor for each item id"),
        ({"boosts": {"a": 0}}, r"boosts\['a'\] is 0: give a factor above 0, where 1 changes nothing"),
        ({"boosts": {"a": -1.5}}, r"boosts\['a'\] is -1.5"),
        ('{"boosts": {"a": NaN}}', r"boosts\['a'\] is nan"),
        ('{"boosts": {"a": 1e999}}', r"boosts\['a'\] is inf"),
        ({"boosts": {"a": 10**400}}, r"boosts\['a'\] is 1000"),
        ({"boosts": {"a": True}}, r"boosts\['a'\] is True"),
        ({"boosts": {str(item): 2 for item in range(1001)}}, "boosts holds 1,001 items: give at most 1,000"),
        ({"repeats": 0}, 'repeats is 0: give a whole number from 1 to 10,000, or "none" or "all"'),
        ({"repeats": "some"}, "repeats is 'some'"),
        ({"repeats": ["all"]}, "repeats is"),
    ],
)
def test_an_invalid_policy_is_refused_by_field(policy, message):
    """One sentence that names the field and the remedy."""
    with pytest.raises(InputError, match=message):
        FeaturesStep.of(ENCODER).answer(asked(policy))


def test_bytes_that_are_no_text_are_refused():
    """The message stays text that Triton can send."""
    with pytest.raises(InputError, match="POLICY is not JSON"):
        FeaturesStep.of(ENCODER).answer({**asked(), POLICY: np.array([b"\xff\xfe{}"], dtype=object)})
    with pytest.raises(InputError, match="only_groups holds") as refused:
        FeaturesStep.of(ENCODER).answer(asked('{"only_groups": ["\\ud800"]}'))
    str(refused.value).encode()


@pytest.mark.parametrize("field", ["max_per_group", "only_groups", "never_groups"])
def test_rules_about_groups_need_groups(field):
    """Items without groups would make a rule that does nothing; the remedy is named."""
    policy = {field: 1 if field == "max_per_group" else ["Film"]}
    with pytest.raises(InputError, match=f"POLICY: {field} needs groups, and the items have none: .* --group-column"):
        FeaturesStep.of(FeatureEncoder(PLAIN)).answer(asked(policy))
    assert rules_in(FeaturesStep.of(FeatureEncoder(PLAIN)).answer(asked({field: None}))) == Rules()


@pytest.mark.parametrize(
    "policy", [{"max_per_group": 1}, {"only_groups": ["Film"]}, {"never_groups": ["Film"]}, {"repeats": "all"}]
)
def test_rules_for_chosen_candidates_are_refused(policy):
    """The caller chose the candidates. Null and empty values ask for nothing, and boosts apply."""
    field = next(iter(policy))
    for chosen in ({CANDIDATES: texts("a")}, {CANDIDATE_TITLE: texts("A")}):
        with pytest.raises(InputError, match=f"POLICY: {field} does not apply to CANDIDATES, which the caller chose"):
            FeaturesStep.of(ENCODER).answer(asked(policy) | chosen)
    allowed = {field: None, "boosts": {"a": 1}}
    assert rules_in(FeaturesStep.of(ENCODER).answer(asked(allowed) | {CANDIDATES: texts("a")})) == Rules()


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters(exclude_categories=[]), max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.text(max_size=3) | st.sampled_from(["boosts", "repeats", "only_groups"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_json_is_read_or_refused(value):
    """No other exception, and the message is text."""
    try:
        read_policy(json.dumps(value).encode(), "POLICY")
    except InputError as error:
        str(error).encode()


# --- what a policy becomes


def test_without_a_policy_there_are_no_rules():
    """The tensor is empty, and the next steps take their usual way."""
    answer = FeaturesStep.of(ENCODER).answer(asked(None, "a"))
    assert answer[RULES] == []
    assert rules_in(answer) is None
    assert "CANDIDATE_BOOST" in {spec.name for spec in STEP_SPECS["ranker"].inputs if spec.optional}


@pytest.mark.parametrize(
    ("repeats", "masked"), [(None, None), ("none", None), ("all", 0), (1, 0), (2, 1), (3, 2), (9, 3)]
)
def test_the_last_items_are_counted_in_the_history_as_it_was_sent(repeats, masked):
    """The last entry is unknown, so that the last N entries hold one known item fewer; unknown ones are not masked."""
    answer = FeaturesStep.of(ENCODER).answer(asked({"repeats": repeats}, "a", "b", "a", "unknown"))
    assert rules_in(answer) == Rules(masked=masked)


def test_boosts_become_logarithms_by_item():
    """By hand: log 2 and log 1/2; a factor of 1 and an unknown item are left out."""
    policy = {"boosts": {"a": 2, "b": 0.5, "c": 1, "unknown": 3}}
    rules = rules_in(FeaturesStep.of(ENCODER).answer(asked(policy)))
    assert rules.boosts == {1: pytest.approx(0.6931472), 2: pytest.approx(-0.6931472)}


def test_boosts_of_candidates_that_are_texts():
    """An unknown id has the number that the request gave it, and a text without an id is known by its place."""
    titled = asked({"boosts": {"x": 2, "a": 3}}) | {CANDIDATES: texts("x", "a"), CANDIDATE_TITLE: texts("Ex", "")}
    assert set(rules_in(FeaturesStep.of(ENCODER).answer(titled)).boosts) == {-1, 1}
    alone = asked({"boosts": {"1": 2}}) | {CANDIDATE_TITLE: texts("One", "Two")}
    assert set(rules_in(FeaturesStep.of(ENCODER).answer(alone)).boosts) == {-2}


@given(
    st.builds(
        Rules,
        max_per_group=st.none() | st.integers(1, 9),
        only_groups=st.none() | st.lists(st.text(), max_size=2).map(tuple),
        never_groups=st.lists(st.text(), max_size=2).map(tuple),
        masked=st.none() | st.integers(0, 9),
        boosts=st.dictionaries(st.integers(-3, 9), st.floats(-9, 9)),
    )
)
@settings(max_examples=50, deadline=None)
def test_rules_pass_between_the_steps_unchanged(rules):
    """Every field, and every bit of a boost."""
    assert decode_rules(np.array(encode_rules(rules), dtype=object)) == rules


def test_a_request_replaces_the_release_s_policy_field_by_field():
    """What it does not name stays, and null ends it. Candidates of the caller are not ruled by the release's groups."""
    default = Policy(max_per_group=1, never_groups=("Book",), boosts={"a": 2.0}, repeats="all")
    step = FeaturesStep.of(ENCODER, policy=default)
    own = rules_in(step.answer(asked()))
    assert (own.max_per_group, own.never_groups, own.masked, set(own.boosts)) == (1, ("Book",), 0, {1})
    assert own == rules_for_known(default, CATALOGUE)
    changed = rules_in(step.answer(asked({"max_per_group": None, "boosts": {}, "repeats": "none"})))
    assert changed == Rules(never_groups=("Book",))
    given = rules_in(step.answer(asked() | {CANDIDATES: texts("d", "a")}))
    assert given == Rules(boosts=own.boosts)


def test_a_release_keeps_its_policy_as_json(tmp_path):
    """Written and read again; a folder without the file has no policy; groups are checked at the export."""
    policy = Policy(only_groups=("Film",), boosts={"a": 0.5})
    save_policy(tmp_path, policy)
    assert load_policy(tmp_path) == policy
    assert load_policy(tmp_path / "other") is NO_POLICY
    assert Policy.of(policy.given()) == policy
    with pytest.raises(InputError, match="the policy: only_groups needs groups"):
        check_groups(policy.given(), PLAIN.groups, "the policy")


# --- answers, by hand: a to e have scores 5 to 1; a, b and c are films, d is a book, e has no group


@pytest.mark.parametrize(
    ("policy", "history", "expected"),
    [
        (None, "", "abcde"),
        (None, "a", "bcde"),
        ({"max_per_group": 1}, "", "ade"),
        ({"max_per_group": 2}, "", "abde"),
        ({"only_groups": ["Film"]}, "b", "ac"),
        ({"only_groups": ["Book"]}, "d", ""),
        ({"never_groups": ["Film"]}, "", "de"),
        ({"only_groups": ["Film"], "never_groups": ["Film"]}, "", ""),
        ({"repeats": "all"}, "ab", "abcde"),
        ({"repeats": 1}, "abc", "abde"),
        ({"boosts": {"e": 100}}, "", "eabcd"),
        ({"boosts": {"a": 0.01}}, "", "bcdea"),
        ({"boosts": {"c": 100}, "max_per_group": 1}, "", "cde"),
    ],
)
def test_answers_of_the_steps(policy, history, expected):
    """Both ensembles, as the ranker has the retriever's weight alone; the offline functions give the same bits."""
    retrieval, ranking = through_steps(asked(policy, *history))
    assert items(retrieval) == items(ranking) == expected
    assert [rank for _, _, rank in retrieval] == list(range(1, len(expected) + 1))
    steps = ExportedSteps(CATALOGUE, ENCODER, RETRIEVER, Prompts(), RANKER)
    assert steps.recommend([*history], policy=policy) == ranking


def test_a_boost_multiplies_the_odds_in_both_answers():
    """Factor 3 for e: its score divided by that of a is three times what it was, whatever the ranker's temperature."""
    for plain, boosted in zip(through_steps(asked()), through_steps(asked({"boosts": {"e": 3}})), strict=True):
        before, after = ({item: score for item, score, _ in answer} for answer in (plain, boosted))
        assert after["e"] / after["a"] == pytest.approx(3 * before["e"] / before["a"], rel=1e-5)
        assert sum(after.values()) == pytest.approx(1)


def test_the_ranker_gets_scores_without_boosts():
    """They count once, in the answer; the candidates come in the order after boosts."""
    request = passed_on("retriever", FeaturesStep.of(ENCODER).answer(asked({"boosts": {"e": 100}})))
    answer = RetrieverStep.of(RETRIEVER, CATALOGUE).answer(request)
    plain = RetrieverStep.of(RETRIEVER, CATALOGUE).answer(
        passed_on("retriever", FeaturesStep.of(ENCODER).answer(asked()))
    )
    assert answer[CANDIDATE_SCORE].tolist() == plain[CANDIDATE_SCORE][[4, 0, 1, 2, 3]].tolist()
    assert answer[CANDIDATE_BOOST].tolist() == pytest.approx([np.log(100), 0, 0, 0, 0])
    assert plain[CANDIDATE_BOOST] == []


def test_boosts_tell_cached_answers_apart():
    """The same prompt with and without a boost, and again, from a cache of answers."""
    step = RankerStep(RANKER, cached=10)
    prompt = Prompts().build([], "ab")
    answers = []
    for boosts in ([], [0, 5], []):
        request = {
            TOKEN: prompt.tokens,
            LINE_END: prompt.line_ends,
            PREFIX: [0],
            LIMIT: [0],
            **{spec: [0, 0] for spec in STEP_SPECS["ranker"].inputs if spec.name in ("CANDIDATE_SCORE",)},
            **{spec: [1, 2] for spec in STEP_SPECS["ranker"].inputs if spec.name == "CANDIDATE_RANK"},
            **{spec: [b"a", b"b"] for spec in STEP_SPECS["ranker"].inputs if spec.name == "CANDIDATE_ID"},
            CANDIDATE_BOOST: boosts,
        }
        answers.append(items(rows(step.answer(passed_on("ranker", request)))))
    assert answers == ["ab", "ba", "ab"]
