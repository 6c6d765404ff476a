"""Builds the ranker's prompt: history and candidates as text and as token ids (paper, section 3.2.2).

Training, evaluation and serving all build their prompts here. In Triton this module runs in the ``prompt_builder``
step, so it does not import torch.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamarec_client.contract import MAX_CANDIDATES
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "prompt.json"

Lines = Sequence[int | str] | Sequence[int] | NDArray[np.int32]
"""What a prompt lists: item numbers, whose titles are the catalogue's, or titles that stand for themselves."""
LETTERS = ascii_uppercase + ascii_lowercase
"""Index letters in the order of the candidates: A to Z, then a to z, which are single tokens too."""

INSTRUCTION = "Given user history in chronological order, recommend an item from the candidate pool"
INPUT = ".\n\n### Input:\nUser history: "
HEAD = f"### Instruction:\n{INSTRUCTION} with its index letter{INPUT}"
INDEPENDENT_HEAD = f"### Instruction:\n{INSTRUCTION}{INPUT}"
"""Beginning of prompts with independent lines, which have no letters."""
POOL = "; \n Candidate pool: "
RESPONSE = "\n\n### Response:\n"
"""End of every prompt; the index letter follows it."""
SEPARATOR = " \n "
MOST_CANDIDATES = 200
"""Maximum number of candidates with independent lines."""
LINE_ENDS = (SEPARATOR[:-1], POOL[:-1], RESPONSE)
"""Text after a title: before the next title, at the end of the history, at the end of the candidates."""
KEPT = 1 << 17
"""Maximum number of titles of the catalogue whose tokens are cached; the least recently used are dropped."""
KEPT_TEXTS = 1 << 12
"""Maximum number of other titles whose tokens are cached: callers may send a new one with every request."""
TOKENS_FILE, ENDS_FILE = "title-tokens.npy", "title-ends.npy"
"""The tokens of all titles, each followed by each of the three line ends, and the offsets [3 * items + 1] between them,
the first of which is 0."""
TITLES_AT_ONCE = 4096
"""Number of titles that are encoded in one batch."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Limits of a prompt (paper, section 4.0.4), stored with the ranker so that serving applies the same limits."""

    max_history: int = 20
    """Maximum number of history items; the most recent ones are kept."""
    title_tokens: int = 32
    """Maximum number of tokens in a title; the rest of it is cut off."""
    max_tokens: int = 1536
    """Maximum number of tokens in a prompt; the oldest history items are dropped first."""
    candidates: int = MAX_CANDIDATES
    """Maximum number of candidates."""
    independent: bool = False
    """Whether each candidate's line continues the history by itself, without a letter, instead of following the lines
    of the candidates before it."""

    def __post_init__(self) -> None:
        for name in ("max_history", "title_tokens", "max_tokens", "candidates"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
        if self.independent and self.candidates > MOST_CANDIDATES:
            raise InputError(f"{self.candidates} candidates: with independent lines use at most {MOST_CANDIDATES}")
        if not self.independent and self.candidates > len(LETTERS):
            raise InputError(
                f"{self.candidates} candidates: there are {len(LETTERS)} index letters, so use at most {len(LETTERS)}"
            )


class Prompt(NamedTuple):
    """A tokenised prompt."""

    tokens: list[int]
    line_ends: list[int]
    """Position in ``tokens``, for each candidate, of the first token after its title. Its hidden state depends on the
    candidate's whole line and on nothing below it."""
    prefix: int = 0
    """Number of tokens before the first candidate's line if the lines are independent of each other: each continues
    the prefix by itself and ends at its line end. 0 if each line follows the one before."""

    @classmethod
    def of_lines(cls, prefix: Sequence[int], lines: Iterable[Sequence[int]]) -> "Prompt":
        """Return the prompt of independent lines that continue a prefix."""
        tokens, line_ends = list(prefix), []
        for line in lines:
            tokens.extend(line)
            line_ends.append(len(tokens) - 1)
        return cls(tokens, line_ends, len(prefix))

    def lines(self) -> list[list[int]]:
        """Return the tokens of each candidate's independent line."""
        starts = [self.prefix, *(end + 1 for end in self.line_ends[:-1])]
        return [self.tokens[start : end + 1] for start, end in zip(starts, self.line_ends, strict=True)]


class PromptBuilder:
    """A builder of prompts for one catalogue and one language model's tokenizer.

    Args:
        catalogue: source of the titles.
        tokenizer: the language model's tokenizer; a start token comes from its own post-processor.
        settings: limits of a prompt.
        titles: folder in which :meth:`save_titles` stored the titles' tokens; without it, a title is encoded when it
            first occurs in a prompt.
    """

    def __init__(
        self, catalogue: Catalogue, tokenizer: Tokenizer, settings: PromptSettings, titles: Path | None = None
    ) -> None:
        # A title may contain "</s>" or "<|im_end|>", which must be encoded as text, not as a control token.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.settings = settings
        self._tokenizer = tokenizer
        self._lines = None if titles is None else (_mapped(titles / TOKENS_FILE), _mapped(titles / ENDS_FILE))
        self._read(catalogue)
        self._head = INDEPENDENT_HEAD if settings.independent else HEAD
        self._head_tokens = tokenizer.encode(self._head[:-1]).ids
        self._end_lengths = [self._count_tokens(f"A{end}") - self._count_tokens("A") for end in LINE_ENDS]
        self._in_pieces = self._pieces_make_the_whole()

    def _read(self, catalogue: Catalogue) -> None:
        """Take the titles from a catalogue."""
        self._catalogue = catalogue
        self._item_title = lru_cache(maxsize=KEPT)(self._cut_title)
        self._item_tokens = lru_cache(maxsize=KEPT)(self._encode_title)
        self._text_title = lru_cache(maxsize=KEPT_TEXTS)(self._cut_title)
        self._text_tokens = lru_cache(maxsize=len(LINE_ENDS) * KEPT_TEXTS)(self._encode_title)
        self._mark_tokens = lru_cache(maxsize=KEPT)(self._encode_mark)
        self._length_of = lru_cache(maxsize=2)(self._count_tokens)

    @property
    def items(self) -> int:
        """Number of items in the catalogue."""
        return len(self._catalogue)

    def with_added(self, added: Sequence[tuple[bytes, str]]) -> "PromptBuilder":
        """Return a builder that knows further items, by raw id and title.

        See :meth:`preprocessing.catalogue.Catalogue.with_added`.
        """
        if not added:
            return self
        other = copy(self)
        other._read(self._catalogue.with_added(added))
        return other

    @classmethod
    def load(cls, folder: Path) -> "PromptBuilder":
        """Return the builder of an artifact.

        Args:
            folder: holds ``items.parquet``, ``tokenizer.json``, ``prompt.json`` and optionally the files of
                :meth:`save_titles`.

        Raises:
            InputError: the ranker was trained on prompts with another template or other start tokens.
        """
        stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        learned = {name: stored.pop(name, None) for name in ("template", "start_tokens")}
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        titles = folder if (folder / ENDS_FILE).exists() else None
        prompts = cls(Catalogue.load(folder / ITEMS_FILE), tokenizer, PromptSettings(**stored), titles)
        if learned != (now := prompts._learned_from()):
            changed = [name for name, value in now.items() if learned[name] != value]
            raise InputError(
                f"{folder / SETTINGS_FILE}: the ranker was trained on prompts with another {' and '.join(changed)} than"
                " this version builds: run `llamarec train-ranker` and `llamarec export` again"
            )
        return prompts

    def save_settings(self, folder: Path) -> None:
        """Write ``prompt.json`` for :meth:`load`: the limits, the template's hash and the tokenizer's start tokens."""
        limits = asdict(self.settings)
        if not limits["independent"]:
            del limits["independent"]  # unknown to the versions before it, which read these rankers too
        stored = {**limits, **self._learned_from()}
        (folder / SETTINGS_FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    def save_titles(self, folder: Path) -> None:
        """Write the tokens of every title in the catalogue, so that a server need not encode them."""
        tokens, ends = array("i"), array("q", [0])
        for start in range(1, len(self._catalogue) + 1, TITLES_AT_ONCE):
            titles = map(self._short_title, range(start, min(start + TITLES_AT_ONCE, len(self._catalogue) + 1)))
            lines = [f"(A) {title}{end}" for title in titles for end in LINE_ENDS]
            for encoding in self._tokenizer.encode_batch(lines, add_special_tokens=False):
                tokens.extend(encoding.ids[self._length_of("(A)") :])
                ends.append(len(tokens))
        np.save(folder / TOKENS_FILE, np.asarray(tokens, np.int32))
        np.save(folder / ENDS_FILE, np.asarray(ends, np.int64))

    def _learned_from(self) -> dict[str, Any]:
        return {
            "template": template_hash(independent=self.settings.independent),
            "start_tokens": self._tokenizer.encode("").ids,
        }

    def text(self, history_items: Lines, candidate_items: Lines) -> str:
        """Return the prompt as text, up to and including the line break that precedes the index letter.

        Independent lines are listed one below the other, although no line is seen by another one.

        Args:
            history_items: item numbers or titles, oldest first; may be empty. The last ``max_history`` of them are
                used.
            candidate_items: item numbers or titles in the order of their letters.

        Raises:
            InputError: the number of candidates is 0 or above the settings' ``candidates``.
        """
        self._check(candidate_items)
        prefix = self._prefix_text(history_items[max(len(history_items) - self.settings.max_history, 0) :])
        if self.settings.independent:
            return prefix + "".join(f" {self._short_title(item)}{LINE_ENDS[0]}" for item in candidate_items)
        candidates = SEPARATOR.join(
            f"({letter}) {self._short_title(item)}" for letter, item in zip(LETTERS, candidate_items, strict=False)
        )
        return f"{prefix} {candidates}{RESPONSE}"

    def _prefix_text(self, history: Lines) -> str:
        """Return the text before the space that begins the first candidate's line."""
        items = SEPARATOR.join(f"({place}) {self._short_title(item)}" for place, item in enumerate(history, 1))
        return f"{self._head}{items}{POOL[:-1]}"

    def build(self, history_items: Lines, candidate_items: Lines) -> Prompt:
        """Return the tokenised prompt. Above ``max_tokens`` the oldest history items are dropped, but no candidate.

        See :meth:`text` for the arguments.

        Raises:
            InputError: see :meth:`text`; or the candidates alone do not fit.
        """
        return self._fit(history_items, candidate_items)[1]

    def fit(self, history_items: Lines, candidate_items: Lines) -> tuple[str, Prompt]:
        """Return the text of the prompt that :meth:`build` returns, and that prompt.

        Raises:
            InputError: see :meth:`build`.
        """
        history, prompt = self._fit(history_items, candidate_items)
        return self.text(history, candidate_items), prompt

    def _fit(self, history_items: Lines, candidate_items: Lines) -> tuple[list[int | str], Prompt]:
        """Return the history items that fit, and the prompt with them."""
        self._check(candidate_items)
        history: list[int | str] = list(history_items[max(len(history_items) - self.settings.max_history, 0) :])
        if self.settings.independent:
            return self._fit_independent(history, candidate_items)
        while True:
            whole = not (self._in_pieces and history)
            prompt = (self._whole if whole else self._of_pieces)(history, candidate_items)
            if len(prompt.tokens) <= self.settings.max_tokens:
                return history, prompt
            if not history:
                raise InputError(
                    f"{len(candidate_items)} candidates take {len(prompt.tokens)} tokens without any history, more than"
                    f" max_tokens {self.settings.max_tokens}: allow more tokens, or shorter titles"
                )
            history.pop(0)

    def _fit_independent(self, history: list[int | str], candidates: Lines) -> tuple[list[int | str], Prompt]:
        """Return the history items that fit beside any line, whichever the candidates are, and the prompt with them."""
        # A title of this many tokens may take more after a space, but never twice as many.
        line = 2 * self.settings.title_tokens + self._end_lengths[0]
        while len(tokens := self._prefix(history)) + line > self.settings.max_tokens:
            if not history:
                raise InputError(
                    f"the instruction takes {len(tokens)} tokens and a line up to {line}, more than max_tokens"
                    f" {self.settings.max_tokens}: allow more tokens, or shorter titles"
                )
            history.pop(0)
        titles = (self._title_tokens(item, 0) for item in candidates)
        return history, Prompt.of_lines(tokens, (ids[: len(ids) - self._end_lengths[0] + 1] for ids in titles))

    def _prefix(self, history: Lines) -> list[int]:
        """Return the tokens before the candidates' independent lines."""
        if self._in_pieces and len(history):
            return self._prefix_of_pieces(history)
        return list(self._tokenizer.encode(self._prefix_text(history)).ids)

    def _prefix_of_pieces(self, history: Lines) -> list[int]:
        """Return the same tokens, see :meth:`_of_pieces`; the history must not be empty."""
        ids = list(self._head_tokens)
        self._add_lines(ids, [str(place) for place in range(1, len(history) + 1)], history, last=1)
        return ids

    def _add_lines(self, ids: list[int], marks: Sequence[str], items: Lines, *, last: int) -> list[int]:
        """Add the tokens of marked titles to ``ids``; return the position of the first token after each title.

        Args:
            ids: the tokens so far.
            marks: the number or letter of each item.
            items: item numbers.
            last: index of the line end that follows the last title.
        """
        line_ends = []
        for place, (mark, item) in enumerate(zip(marks, items, strict=True), 1):
            end = last if place == len(items) else 0
            ids.extend(self._mark_tokens(mark))
            ids.extend(self._title_tokens(item, end))
            line_ends.append(len(ids) - self._end_lengths[end])
        return line_ends

    def _check(self, candidate_items: Lines) -> None:
        if not 1 <= len(candidate_items) <= self.settings.candidates:
            raise InputError(f"a prompt takes 1 to {self.settings.candidates} candidates, not {len(candidate_items)}")

    def _whole(self, history: Lines, candidates: Lines) -> Prompt:
        text = self.text(history, candidates)
        encoding = self._tokenizer.encode(text)
        # Character offsets of the candidates' marks and titles.
        lengths = [
            len(f"({letter}) {self._short_title(item)}") for letter, item in zip(LETTERS, candidates, strict=False)
        ]
        first = len(text) - len(RESPONSE) - sum(lengths) - len(SEPARATOR) * (len(lengths) - 1)
        title_ends = first + np.cumsum(lengths) + len(SEPARATOR) * np.arange(len(lengths))
        line_ends = np.searchsorted([end for _, end in encoding.offsets], title_ends, side="right")
        return Prompt(list(encoding.ids), line_ends.tolist())

    def _of_pieces(self, history: Lines, candidates: Lines) -> Prompt:
        """Return the same prompt, assembled from the tokens of marks and titles, which are encoded once and cached.

        No token crosses the end of a mark or a line: tokenizers that pre-split into words split there, and Llama 2's,
        which does not pre-split, has no token with a line break or with a space after another character.
        """
        ids = self._prefix_of_pieces(history)
        return Prompt(ids, self._add_lines(ids, LETTERS[: len(candidates)], candidates, last=2))

    def _pieces_make_the_whole(self) -> bool:
        """Return whether pieces encode to the same tokens as whole prompts, tried on a sample of the catalogue."""
        history, candidates = self.settings.max_history, min(self.settings.candidates, len(LETTERS))
        items = [*range(1, len(self._catalogue) + 1, 1 + len(self._catalogue) // (8 * (history + candidates)))]
        prompts = [
            (items[start : start + history], items[start + history : start + history + candidates] or items[:1])
            for start in range(0, len(items), history + candidates)
        ]
        if self.settings.independent:
            texts = ((past, self._prefix_text(past)) for past, _ in prompts)
            return all(self._prefix_of_pieces(past) == self._tokenizer.encode(text).ids for past, text in texts)
        return all(self._of_pieces(*prompt) == self._whole(*prompt) for prompt in prompts)

    def _encode_mark(self, mark: str) -> "array[int]":
        return self._tokens_after("\n", f" ({mark})")

    def _short_title(self, item: int | str) -> str:
        """Return a title as it stands in a prompt, see :meth:`_cut_title`."""
        return self._text_title(item) if isinstance(item, str) else self._item_title(item)

    def _title_tokens(self, item: int | str, end: int) -> "array[int]":
        """Return the tokens of a title and of the line end that follows it, see :meth:`_encode_title`."""
        return self._text_tokens(item, end) if isinstance(item, str) else self._item_tokens(item, end)

    def _encode_title(self, item: int | str, end: int) -> "array[int]":
        if self._lines is not None and not isinstance(item, str):
            tokens, ends = self._lines
            line = len(LINE_ENDS) * (item - 1) + end
            if line + 1 < len(ends):  # an added item has no stored tokens
                return array("i", tokens[ends[line] : ends[line + 1]].tolist())
        return self._tokens_after("(A)", f" {self._short_title(item)}{LINE_ENDS[end]}")

    def _tokens_after(self, before: str, piece: str) -> "array[int]":
        """Return the tokens of a piece of text after other text; a tokenizer may put a space before text on its own."""
        encoding = self._tokenizer.encode(before + piece, add_special_tokens=False)
        return array("i", encoding.ids[self._length_of(before) :])

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut_title(self, item: int | str) -> str:
        """Return the title, cut at ``title_tokens`` tokens and on one line, so that it cannot end a prompt's line."""
        title = " ".join((item if isinstance(item, str) else self._catalogue.title(item)).split())
        while (
            len(offsets := self._tokenizer.encode(title, add_special_tokens=False).offsets) > self.settings.title_tokens
        ):
            # Cut where the first surplus token begins; if it begins within a character, before that character.
            title = title[: offsets[self.settings.title_tokens][0]].rstrip()
        return title


def listed(items: Sequence[int], texts: Sequence[str]) -> Sequence[int | str]:
    """Return what a prompt lists for some items: the text of each [k], or its number where the text is empty.

    Args:
        items: item numbers [k].
        texts: titles [k] from a caller; or none, if all are the catalogue's.
    """
    return [text or item for item, text in zip(items, texts, strict=True)] if len(texts) else items


def _mapped(path: Path) -> NDArray[Any]:
    """Return a memory-mapped file as a plain array: a slice of ``np.memmap`` itself costs ten times as much."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def template_hash(*, independent: bool) -> str:
    """Return the hash of a template, which is stored with a ranker: a version with another one refuses to serve it."""
    parts = (INDEPENDENT_HEAD, SEPARATOR, POOL) if independent else (HEAD, SEPARATOR, POOL, RESPONSE, LETTERS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def letter_ids(tokenizer: Tokenizer, prompt: str, count: int = MAX_CANDIDATES) -> list[int]:
    """Return the token id of each of the first ``count`` index letters where it follows ``prompt``.

    A letter's id depends on the text before it: in Llama 2 the "A" after a line break is 29909, while "A" alone is 319.
    Therefore each id is taken after the text that ends every prompt.

    Args:
        tokenizer: the language model's tokenizer.
        prompt: text that ends as every prompt ends.
        count: number of letters, at most 52; the paper's 20 are A to T.

    Raises:
        InputError: a letter is not a single token there, or two letters share one.
    """
    before = tokenizer.encode(prompt).ids
    ids: dict[int, str] = {}
    for letter in LETTERS[:count]:
        after = tokenizer.encode(prompt + letter).ids
        if after[:-1] != before or after[-1] in ids:
            raise InputError(
                f"the tokenizer does not make index letter {letter!r} one token of its own after {prompt[-16:]!r}"
                f" ({len(before)} tokens become {len(after)}): choose a base whose tokenizer does, such as Llama 2"
            )
        ids[after[-1]] = letter
    return list(ids)
