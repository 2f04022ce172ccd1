"""Prompts of a language model: a Jinja2 template around a history of titles or codes, tokenised as one text.

A prompt is the text before the answer. The answer's tokens are the item's path and never come from joining texts, so
no merge of the tokenizer reaches over the border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from data import ragged
from data.catalogue import Catalogue
from data.errors import RequestError
from data.parquet import first_line
from data.prompts import PromptBuilder
from data.records import IntArray, LongArray
from data.text_settings import ItemForm, PromptForm, TextSettings
from data.text_tokenizer import TextTokenizer
from data.vocabulary import LEVEL_NAMES

TEMPLATE: Final = """\
{{ instruction }}
{% if need %}The customer wants: {{ need }}
{% endif %}{% for item in history %}- {{ item }}
{% endfor %}{% if candidates %}Candidates:
{% for item in candidates %}- {{ item }}
{% endfor %}{% endif %}"""
"""The built-in template of a prompt's content."""
VARIABLES: Final = "Jinja2 with the variables instruction, history, need and candidates"
_SIGN: Final = "windlass-{}-item"
_SPLIT: Final = "windlass-content"


class PromptTemplate:
    """Writes the text of a prompt."""

    def __init__(self, settings: TextSettings, tokenizer: TextTokenizer, *, history: int = 2) -> None:
        """
        Args:
            settings: form, template and instruction.
            tokenizer: has the chat template.
            history: most items that it will be asked to show.

        Raises:
            RequestError: a template that cannot be read or that drops the history, or a chat form without a template.
        """
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._settings = settings
        # Templates lie in checkpoints too (`prompt.json`), whose reader need not trust their writer.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
        )
        # A run that goes on, and whoever serves its model, must write the prompts that it was trained on.
        for names, drawn in ((environment.globals, "lipsum"), (environment.filters, "random")):
            names.pop(drawn, None)
        try:
            self._template = environment.from_string(settings.template or TEMPLATE)
        except TemplateError as error:
            raise RequestError("text.template", first_line(error), VARIABLES) from error
        signs = item_signs(history)
        shown = self.content(signs)
        if any(sign not in shown for sign in signs):
            raise RequestError("text.template", "does not show the whole history", f"{VARIABLES}: loop over history")
        self._around = ("", "")
        if settings.form is PromptForm.CHAT:
            head, found, tail = tokenizer.chat(_SPLIT).partition(_SPLIT)
            if not found:
                raise RequestError("text.form", "chat, and the chat template drops the user's turn", "plain")
            self._around = (head, tail)

    def content(self, history: Sequence[str], *, need: str = "", candidates: Sequence[str] = ()) -> str:
        """What the template writes.

        Raises:
            RequestError: the template's own code fails.
        """
        try:
            text: str = self._template.render(
                instruction=self._settings.instruction, history=list(history), need=need, candidates=list(candidates)
            )
        except Exception as error:  # whatever the template's own code raises
            raise RequestError("text.template", first_line(error), VARIABLES) from error
        return text

    def text(self, history: Sequence[str], *, need: str = "", candidates: Sequence[str] = ()) -> str:
        """The whole prompt."""
        return self.around(self.content(history, need=need, candidates=candidates))

    def around(self, content: str) -> str:
        """A prompt of any content."""
        head, tail = self._around
        # Chat templates strip a turn's content; a plain one keeps its last line break, which the answer follows.
        return head + (content.strip() if self._settings.form is PromptForm.CHAT else content) + tail


def item_signs(count: int) -> list[str]:
    """Texts of so many items that occur in no template and in none of each other, to see which ones it shows."""
    return [_SIGN.format(number) for number in range(count)]


class ItemTexts:
    """The items of a catalogue in both forms."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def of(self, items: IntArray, form: ItemForm) -> list[str]:
        """The texts of items; codes are written as the words of the vocabulary."""
        if form is ItemForm.TITLES:
            return [self._catalogue.titles[item] for item in items.tolist()]
        return [self._codes(item) for item in items.tolist()]

    def _codes(self, item: int) -> str:
        vocabulary = self._catalogue.vocabulary
        path = self._catalogue.tokens(item)
        offsets = vocabulary.level_offsets
        return "".join(
            f"<{LEVEL_NAMES[level]}_{int(token) - int(offsets[level])}>"
            for level, token in enumerate(path)
            if token != vocabulary.eos
        )


class TextPromptBuilder(PromptBuilder):
    """`PromptBuilder` for a language model."""

    def __init__(
        self,
        catalogue: Catalogue,
        history: int,
        exclude_seen: bool,
        max_prompt_tokens: int,
        *,
        settings: TextSettings,
        tokenizer: TextTokenizer,
    ) -> None:
        """
        Args:
            catalogue: of `data.text_items`.
            history: most items a prompt shows, the latest ones.
            exclude_seen: exclude every item of the whole history.
            max_prompt_tokens: longest prompt.
            settings: how prompts are written.
            tokenizer: with the tokens of the catalogue's codes.

        Raises:
            RequestError: as `PromptTemplate`, or a prompt has no room for the longest item.
        """
        self.settings = settings
        self.tokenizer = tokenizer
        self.template = PromptTemplate(settings, tokenizer, history=history)
        self.texts = ItemTexts(catalogue)
        leads = tokenizer.leading()
        if settings.begin_with_bos and not leads:
            if tokenizer.bos is None:
                raise RequestError("text.begin_with_bos", True, f"false: the tokenizer of {tokenizer.where} has none")
            leads = [tokenizer.bos]
        self._leads = leads if settings.form is PromptForm.PLAIN or settings.begin_with_bos else []
        super().__init__(catalogue, history, exclude_seen, max_prompt_tokens)

    def _check_room(self) -> None:
        least = len(self.encode(self.template.text([])))
        longest = max(range(self.catalogue.n_items), key=lambda item: len(self.catalogue.titles[item]))
        one = len(self.encode(self._text(np.array([longest], dtype=np.int32))))
        if self.max_prompt_tokens < max(least, one):
            raise RequestError(
                "data.max_prompt_tokens",
                self.max_prompt_tokens,
                f"at least {max(least, one)} (the template with one item), or a shorter text.instruction",
            )

    def written(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """See `PromptBuilder.written`."""
        return self.written_in(items, self.settings.history)

    def written_all(self, items_E: IntArray, length_N: LongArray) -> Sequence[tuple[IntArray, IntArray]]:
        """See `PromptBuilder.written_all`."""
        return [self.written(items) for items in ragged.split(items_E, length_N)]

    def written_in(self, items: IntArray, form: ItemForm) -> tuple[IntArray, IntArray]:
        """`written` with the history in a form of its own."""
        return self.fitted(items, lambda shown: self._text(shown, form))

    def fitted(self, items: IntArray, text: Callable[[IntArray], str]) -> tuple[IntArray, IntArray]:
        """The latest items of a history with which a text is no longer than a prompt may be, and its tokens.

        A text that is too long with no item at all stays too long.
        """
        tokens = self.encode(text(items))
        while len(tokens) > self.max_prompt_tokens and len(items):
            # What is too much, in items of mean length, at least one.
            share = (len(tokens) - self.max_prompt_tokens) * len(items) // len(tokens)
            items = items[max(1, share) :]
            tokens = self.encode(text(items))
        return items, np.asarray(tokens, dtype=np.int32)

    def _text(self, items: IntArray, form: ItemForm | None = None) -> str:
        return self.template.text(self.texts.of(items, form or self.settings.history))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt's text."""
        tokens = self.tokenizer.encode(text)
        # Some chat templates write the beginning token themselves.
        return tokens if tokens[: len(self._leads)] == self._leads else [*self._leads, *tokens]
