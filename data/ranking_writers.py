"""How a ranking prompt is written: in the tokens of codes and words, or as the text of a language model.

Of codes it is `<bos>`, the history, the need, `<candidates>`, the candidates, and `<list>` to begin; where free text
comes before the list, the prompt ends with the candidates and the model says `<list>` itself. Of a language model it
is what the template makes of instruction, history, need and candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError
from data.needs import Need
from data.records import IntArray
from data.text_prompts import VARIABLES, PromptTemplate, TextPromptBuilder, item_signs
from data.text_settings import INSTRUCTION, ItemForm, TextSettings
from data.vocabulary import CANDIDATES_WORD, LIST_WORD, need_word

LIST_INSTRUCTION: Final = (
    "A customer chose the items below, oldest first. Rank the candidates for the customer, the best one first."
)
"""What the built-in template begins with, unless `text.instruction` says something else than its default."""
PHRASES: Final = {
    "interest": "what they usually like",
    "explore": "something of a kind that is new to them",
    "trend": "what many choose at the moment",
    "niche": "something good that few know",
    "discover": "something of a kind that is new to them, which many choose at the moment",
}
"""The built-in needs in words; those of an instruction are joined by "and"."""
_NEED: Final = "windlass-need"


class RankingWriter(Protocol):
    """Writes prompts that have candidates."""

    def write(self, history: IntArray, candidates: IntArray, need: int) -> tuple[IntArray, IntArray]:
        """The latest items of a history that a prompt has room for, and its tokens.

        Args:
            history: oldest first.
            candidates: in the order of the prompt.
            need: number of the need.

        Raises:
            RequestError: the candidates leave no room.
        """
        ...


class CodeWriter:
    """Prompts in the tokens of codes and words."""

    def __init__(
        self, catalogue: Catalogue, needs: Sequence[Need], *, candidates: int, max_prompt_tokens: int, free_text: bool
    ) -> None:
        """
        Args:
            candidates: most candidates of a prompt.
            max_prompt_tokens: longest prompt.
            free_text: the model writes before the list.

        Raises:
            RequestError: a prompt would not fit, or the catalogue lacks words for lists.
        """
        vocabulary = catalogue.vocabulary
        self._catalogue = catalogue
        self._max_prompt_tokens = max_prompt_tokens
        self._need_tokens = [[vocabulary.word_token(need_word(word)) for word in need.words] for need in needs]
        self._before = [vocabulary.word_token(CANDIDATES_WORD)]
        begin = vocabulary.word_token(LIST_WORD)
        self._behind = [] if free_text else [begin]
        longest = int(np.diff(catalogue.path_start).max())
        least = 2 + len(self._behind) + max(map(len, self._need_tokens)) + (candidates + 1) * longest
        if max_prompt_tokens < least:
            raise RequestError("max_prompt_tokens", max_prompt_tokens, f"at least {least}, for all candidates")

    def write(self, history: IntArray, candidates: IntArray, need: int) -> tuple[IntArray, IntArray]:
        """See `RankingWriter.write`."""
        listed, _ = self._catalogue.tokens_of(candidates)
        behind = [*self._need_tokens[need], *self._before, *listed.tolist(), *self._behind]
        room = self._max_prompt_tokens - 1 - len(behind)
        tokens, length = self._catalogue.tokens_of(history)
        if len(tokens) > room:
            history = history[np.cumsum(length[::-1])[::-1] <= room]
            tokens, _ = self._catalogue.tokens_of(history)
        return history, np.concatenate([[self._catalogue.vocabulary.bos], tokens, behind]).astype(np.int32)


class TextWriter:
    """Prompts of a language model; candidates are written as the items of its answers are, codes or titles."""

    def __init__(self, prompts: TextPromptBuilder, needs: Sequence[Need], *, candidates: int) -> None:
        """
        Args:
            prompts: of single items, whose template and limit are used.
            needs: what lists are for.
            candidates: most candidates of a prompt.

        Raises:
            RequestError: a template that drops candidates, the history beside them, or the need among several.
        """
        settings = prompts.settings
        if settings.instruction == INSTRUCTION:
            settings = settings.model_copy(update={"instruction": LIST_INSTRUCTION})
        self._prompts = prompts
        self._template = PromptTemplate(settings, prompts.tokenizer)
        self._needs = [need_text(need, settings) for need in needs]
        self._form = settings.items or ItemForm.CODES
        signs = item_signs(prompts.history + candidates)
        history, listed = signs[: prompts.history], signs[prompts.history :]
        shown = self._template.content(history, need=_NEED, candidates=listed)
        if any(sign not in shown for sign in listed):
            raise RequestError("text.template", "does not show all candidates", f"{VARIABLES}: loop over candidates")
        if any(sign not in shown for sign in history):
            found = "does not show the whole history beside candidates"
            raise RequestError("text.template", found, f"{VARIABLES}: loop over history")
        if len(needs) > 1 and _NEED not in shown:
            raise RequestError("text.template", "does not show the need", f"{VARIABLES}: write {{{{ need }}}}")

    def write(self, history: IntArray, candidates: IntArray, need: int) -> tuple[IntArray, IntArray]:
        """See `RankingWriter.write`."""
        prompts = self._prompts
        listed = prompts.texts.of(candidates, self._form)

        def text(items: IntArray) -> str:
            told = prompts.texts.of(items, prompts.settings.history)
            return self._template.text(told, need=self._needs[need], candidates=listed)

        shown, tokens = prompts.fitted(history, text)
        least = len(tokens) if len(shown) or not len(history) else len(prompts.encode(text(history[-1:])))
        if least > prompts.max_prompt_tokens:
            legal = f"at least {least}, for {len(candidates)} candidates and an item of the history, or fewer of them"
            raise RequestError("data.max_prompt_tokens", prompts.max_prompt_tokens, legal)
        return shown, tokens


def need_text(need: Need, settings: TextSettings) -> str:
    """How a prompt says a need."""
    phrases = (PHRASES.get(word, word.replace("_", " ")) for word in need.words)
    return settings.needs.get(need.name) or " and ".join(phrases)
