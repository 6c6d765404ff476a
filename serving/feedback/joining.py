"""Finds out what was taken from which answer."""

from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llamarec_client.contract import ENSEMBLE
from models.metrics import gains
from preprocessing.errors import InputError
from serving.feedback.reading import Answers, Events

FEW_ITEMS = 20
"""Number of different items up to which it may be chance that none of them was shown."""


@dataclass(frozen=True)
class Joined:
    """Answers with what was taken from them, and the taken items."""

    user: NDArray[np.int64]
    """Number of each answer's user [answers]."""
    group: NDArray[np.int64]
    """Number of its release in ``groups`` [answers]."""
    groups: list[str]
    day: NDArray[np.int64]
    """Its day since 1970, UTC [answers]."""
    ranked: NDArray[np.bool_]
    """Whether the ranker ordered it [answers]."""
    fallback: NDArray[np.bool_]
    """Whether it is a fallback [answers]."""
    events: NDArray[np.int64]
    """Number of different items that its user took afterwards, whether it showed them or not [answers]."""
    values: NDArray[np.float64]
    """Hit, reciprocal rank and NDCG [answers, 3]; see :func:`answer_values`."""
    taken: NDArray[np.int64]
    """The answer of each taken item [taken]."""
    place: NDArray[np.int64]
    """The place at which it was shown, from 1 [taken]."""
    retriever_rank: NDArray[np.int64]
    """The place that the retriever gave it, from 1; 0 for none [taken]."""


def join(answers: Answers, events: Events, window: float) -> Joined:
    """Return what each user took from each answer.

    An event counts for the last answer to its user before it, if that is at most ``window`` seconds ago: what the user
    saw last. So no event counts twice. The same item counts once for an answer.

    Raises:
        InputError: no event counts for any answer, or the events' items are not the answers'.
    """
    rows = answers.rows.combine_chunks()
    users = rows["user"].dictionary_encode().combine_chunks()
    user = users.indices.to_numpy().astype(np.int64)  # [answers]
    time = rows["time"].cast(pa.int64()).to_numpy()
    event_user = pc.index_in(events.users, users.dictionary).to_numpy().astype(np.int64)  # [events]
    owner = last_answers(user, time, event_user, events.times)
    delay = events.times - time[owner]
    counted = (owner >= 0) & (delay <= window * 1000)
    lists = rows["items"].combine_chunks()
    _check(answers, events, owner, time, delay, counted, lists.flatten(), window)
    length = pc.list_value_length(lists).to_numpy().astype(np.int64)
    answer = np.repeat(np.arange(len(user)), length)  # [shown]
    place = np.arange(len(answer)) - (np.cumsum(length) - length)[answer] + 1
    found, count = _taken(len(user), answer, lists.flatten(), owner[counted], events.items.filter(pa.array(counted)))
    group = rows["group"].dictionary_encode().combine_chunks()
    return Joined(
        user,
        group.indices.to_numpy().astype(np.int64),
        group.dictionary.to_pylist(),
        time // 86_400_000,
        pc.equal(rows["ensemble"], ENSEMBLE).to_numpy(),
        rows["degraded"].is_valid().to_numpy(),
        count,
        answer_values(answer[found], place[found], count, length),
        answer[found],
        place[found],
        rows["retriever_ranks"].combine_chunks().flatten().to_numpy()[found].astype(np.int64),
    )


def _taken(
    answers: int, answer: NDArray[np.int64], shown: pa.Array, owner: NDArray[np.int64], items: pa.Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which of the shown items were taken, and the number of different items taken after each answer.

    Args:
        answers: number of answers.
        answer: answer that showed each item [shown].
        shown: ids of the shown items [shown].
        owner: answer that each event counts for [events].
        items: ids of the events' items [events].
    """
    codes = pa.chunked_array([shown, items]).dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)
    size = len(codes) + 1  # more than any code
    keys = answer * size + codes[: len(shown)]
    wanted = np.unique(owner * size + codes[len(shown) :])
    order = np.argsort(keys)
    ordered = np.append(keys[order], -1)
    at = np.searchsorted(ordered[:-1], wanted)
    return order[at[ordered[at] == wanted]], np.bincount(wanted // size, minlength=answers)


def last_answers(
    user: NDArray[np.int64], time: NDArray[np.int64], event_user: NDArray[np.int64], event_time: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return for each event the last answer to the same user before it, or -1.

    An event in the same millisecond as an answer is before it: nobody takes so quickly what he was shown.
    """
    count = len(user)
    users, times = np.concatenate([user, event_user]), np.concatenate([time, event_time])
    is_answer = np.arange(len(users)) < count
    order = np.lexsort((is_answer, times, users))
    last = np.maximum.accumulate(np.where(is_answer[order], np.arange(len(order)), -1))  # places in the order
    owner = np.where(last >= 0, order[last], -1)
    owner[(owner >= 0) & (users[owner] != users[order])] = -1
    found = np.empty(len(order), np.int64)
    found[order] = owner
    return found[count:]


def answer_values(
    answer: NDArray[np.int64], place: NDArray[np.int64], count: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return hit, reciprocal rank and NDCG of each answer, [answers, 3].

    Hit is 1 if anything that the answer showed was taken; the reciprocal rank is that of the first such item. NDCG
    compares with the list that has all that the user took at its top, whether it was shown or not; each item that was
    taken is worth the same (Jarvelin and Kekalainen 2002).

    Args:
        answer: answer of each item that was shown and taken [taken].
        place: its place, from 1 [taken].
        count: number of items that the user took after each answer [answers].
        length: number of items that each answer showed [answers].
    """
    answers = len(count)
    longest = max(int(length.max(initial=1)), 1)
    reciprocal = np.zeros(answers)
    np.maximum.at(reciprocal, answer, 1.0 / place)
    gain = np.bincount(answer, gains(place, longest), minlength=answers) if len(answer) else np.zeros(answers)
    ideal = np.concatenate([[0.0], np.cumsum(gains(np.arange(1, longest + 1), longest))])[np.minimum(count, length)]
    ndcg = np.divide(gain, ideal, out=np.zeros(answers), where=ideal > 0)
    return np.stack([reciprocal > 0, reciprocal, ndcg], axis=1)


def _check(
    answers: Answers,
    events: Events,
    owner: NDArray[np.int64],
    time: NDArray[np.int64],
    delay: NDArray[np.int64],
    counted: NDArray[np.bool_],
    shown: pa.Array,
    window: float,
) -> None:
    """Refuse events that cannot be what users did after these answers."""
    if (owner < 0).all():
        raise InputError(
            f"all {len(owner):,} events of these users are before the answers to them: the last event is of"
            f" {_moment(events.times.max())}, the first answer of {_moment(time.min())}; give later events, or, if they"
            " are not earlier, set the clocks and the unit of the times right"
        )
    if not counted.any():
        raise InputError(
            f"no event followed an answer within {window:,g} s; the soonest came after"
            f" {delay[owner >= 0].min() / 1000:,.0f} s: give a longer --window, or, if it came sooner, set the clocks"
            " right"
        )
    different = len(pc.unique(events.items))
    if different > FEW_ITEMS and not pc.any(pc.is_in(events.items, shown)).as_py():
        raise InputError(
            f"none of the {different:,} items of the events was ever shown: give the events of data set"
            f" {answers.dataset!r}; item ids are compared as strings"
        )


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")
