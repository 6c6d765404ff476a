"""The ranker's prompt: history and candidates as text, then as token ids (paper, section 3.2.2).

Training, evaluation and serving build their prompts here and nowhere else. Inside Triton this runs in the
``prompt_builder`` step, so it needs no torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from client.contract import MAX_CANDIDATES
from models.ranker.verbalizer import LETTERS
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "prompt.json"

Items = Sequence[int] | NDArray[np.int32]

INSTRUCTION = (
    "Given user history in chronological order, recommend an item from the candidate pool with its index letter."
)
HEAD = f"### Instruction:\n{INSTRUCTION}\n\n### Input:\nUser history: "
POOL = "; \n Candidate pool: "
RESPONSE = "\n\n### Response:\n"
"""How every prompt ends; the index letter follows."""
SEPARATOR = " \n "
TEMPLATE_HASH = hashlib.sha256("\0".join((HEAD, SEPARATOR, POOL, RESPONSE, LETTERS)).encode()).hexdigest()
"""Stored with a ranker: a later version with another template must not serve it."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What a prompt may hold (paper, section 4.0.4); stored with the ranker, so that serving builds what it learned."""

    max_history: int = 20
    """Most history items; the most recent ones are kept."""
    title_tokens: int = 32
    """Tokens after which a title is cut."""
    max_tokens: int = 1536
    """Most tokens in all; the oldest history goes first."""
    candidates: int = MAX_CANDIDATES
    """Most candidates."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}: a prompt needs at least 1")
        if self.candidates > len(LETTERS):
            raise InputError(f"{self.candidates} candidates: there are {len(LETTERS)} index letters, ask for no more")


class PromptBuilder:
    """Builds prompts for one catalogue and one language model's tokenizer."""

    def __init__(self, catalogue: Catalogue, tokenizer: Tokenizer, settings: PromptSettings) -> None:
        """Args:
        catalogue: gives the titles.
        tokenizer: of the language model, used as it stands: a start token comes from its own post-processor.
        settings: limits of a prompt.
        """
        # A title may hold "</s>" or "<|im_end|>": it is a title, not a control token.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.settings = settings
        self._catalogue = catalogue
        self._tokenizer = tokenizer
        self._short_title = lru_cache(maxsize=1 << 17)(self._cut_title)

    @classmethod
    def load(cls, folder: Path) -> "PromptBuilder":
        """The builder of an artifact that holds ``items.parquet``, ``tokenizer.json`` and ``prompt.json``.

        Raises:
            InputError: the ranker learned from prompts of another template, or with other start tokens.
        """
        stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        learned = {name: stored.pop(name, None) for name in ("template", "start_tokens")}
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        prompts = cls(Catalogue.load(folder / ITEMS_FILE), tokenizer, PromptSettings(**stored))
        if learned != (now := prompts._learned_from()):
            changed = [name for name, value in now.items() if learned[name] != value]
            raise InputError(
                f"{folder / SETTINGS_FILE}: the ranker learned from prompts with another {' and '.join(changed)} than"
                " this version builds: run `llamarec train-ranker` and `llamarec export` again"
            )
        return prompts

    def save_settings(self, folder: Path) -> None:
        """Writes ``prompt.json`` for :meth:`load`: the limits, the template's hash, the tokenizer's start tokens."""
        stored = {**asdict(self.settings), **self._learned_from()}
        (folder / SETTINGS_FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    def _learned_from(self) -> dict[str, Any]:
        return {"template": TEMPLATE_HASH, "start_tokens": self._tokenizer.encode("").ids}

    def text(self, history_items: Items, candidate_items: Items) -> str:
        """The prompt up to and with the line break behind which the index letter is to stand.

        Args:
            history_items: item numbers, oldest first; the last ``max_history`` are used. May be empty.
            candidate_items: item numbers in the order of their letters, 1 to the settings' ``candidates``.

        Raises:
            InputError: no candidate, or more than that.
        """
        if not 1 <= len(candidate_items) <= self.settings.candidates:
            raise InputError(f"a prompt takes 1 to {self.settings.candidates} candidates, not {len(candidate_items)}")
        recent = history_items[max(len(history_items) - self.settings.max_history, 0) :]
        history = SEPARATOR.join(f"({place}) {self._short_title(item)}" for place, item in enumerate(recent, 1))
        candidates = SEPARATOR.join(
            f"({letter}) {self._short_title(item)}" for letter, item in zip(LETTERS, candidate_items, strict=False)
        )
        return f"{HEAD}{history}{POOL}{candidates}{RESPONSE}"

    def build(self, history_items: Items, candidate_items: Items) -> list[int]:
        """Token ids of the prompt, at most ``max_tokens``: the oldest history goes first, a candidate never.

        Raises:
            InputError: as :meth:`text`; or the candidates alone do not fit.
        """
        return self.fit(history_items, candidate_items)[1]

    def fit(self, history_items: Items, candidate_items: Items) -> tuple[str, list[int]]:
        """The prompt that :meth:`build` gives, as text and as token ids.

        Raises:
            InputError: as :meth:`build`.
        """
        history = list(history_items[max(len(history_items) - self.settings.max_history, 0) :])
        while True:
            text = self.text(history, candidate_items)
            ids = list(self._tokenizer.encode(text).ids)
            if len(ids) <= self.settings.max_tokens:
                return text, ids
            if not history:
                raise InputError(
                    f"{len(candidate_items)} candidates take {len(ids)} tokens without any history, more than the"
                    f" {self.settings.max_tokens} of the prompt: allow more tokens, or cut titles shorter"
                )
            history.pop(0)

    def _cut_title(self, item: int) -> str:
        """The title on one line, so that it can't end the prompt's own lines, cut at ``title_tokens`` tokens."""
        title = " ".join(self._catalogue.title(item).split())
        while (
            len(offsets := self._tokenizer.encode(title, add_special_tokens=False).offsets) > self.settings.title_tokens
        ):
            # Where the first token too many begins: before a character that a byte-level tokenizer would cut in two.
            title = title[: offsets[self.settings.title_tokens][0]].rstrip()
        return title
