"""Section `text` of the configuration: how users and items are written for a pretrained language model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from data.settings import Settings


class ItemForm(StrEnum):
    """How an item is written."""

    CODES = "codes"
    """Its semantic ID: tokens that the language model gets beside its own."""
    TITLES = "titles"
    """Its title, in the language model's own tokens."""


class PromptForm(StrEnum):
    """What stands around the content of a prompt."""

    CHAT = "chat"
    """The chat template of the model's tokenizer: the content is a user's turn, the answer the assistant's."""
    PLAIN = "plain"
    """Nothing: the model continues the content."""


class CodeInit(StrEnum):
    """Where the rows of new tokens in embedding and head start."""

    MEAN = "mean"
    """At the mean of the rows of the tokenizer's tokens, with a little noise."""
    CONTENT = "content"
    """At the mean of the rows of the titles of the items that have the code, with a little noise."""


class TaskWeights(Settings):
    """What supervised training shows: shares of the rows, relative to each other."""

    next_item: float = Field(1.0, ge=0)
    """A user's history to the next item, both as `text.history` and `text.items` say."""
    next_title: float = Field(0.0, ge=0)
    """A history of titles to the next item's title. For items that are codes."""
    next_code: float = Field(0.0, ge=0)
    """A history of codes to the next item's codes. For items that are codes."""
    title_to_code: float = Field(0.0, ge=0)
    """An item's title to its codes."""
    code_to_title: float = Field(0.0, ge=0)
    """An item's codes to its title."""

    @property
    def align(self) -> bool:
        """Whether any task relates codes and titles."""
        return any((self.next_title, self.next_code, self.title_to_code, self.code_to_title))


INSTRUCTION = "A customer chose the items below, oldest first. Answer with the item that the customer chooses next."


class TextSettings(Settings):
    """A pretrained language model as the recommender; `items` turns it on."""

    items: ItemForm | None = None
    """How items are generated: codes, or titles. None is a model that knows nothing but codes (init: a preset)."""
    history: ItemForm = ItemForm.TITLES
    """How a prompt writes the items of the history: codes or titles."""
    form: PromptForm = PromptForm.CHAT
    """chat (the tokenizer's own chat template) or plain."""
    template: str | None = None
    """Jinja2 source of a prompt's content, which may use instruction, history (a list of texts, oldest first), need and
    candidates (a list of texts); none takes the built-in one."""
    instruction: str = Field(INSTRUCTION, min_length=1)
    """What the built-in template begins with. The default is for single items; ranked lists have one of their own."""
    needs: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """How prompts say the needs of `lists.needs`, by name. Others are said by the words of their instruction, for which
    interest, explore, trend, niche and discover have phrases."""
    begin_with_bos: bool = False
    """Put the tokenizer's beginning token first where it does not do so itself (Gemma from a GGUF file)."""
    pad_token: str | None = None
    """Padding token, one of the tokenizer's, where the tokenizer names none."""
    title_tokens: int = Field(48, ge=1)
    """Longest title that may be generated, in tokens; a longer one is refused."""
    code_init: CodeInit = CodeInit.MEAN
    """Where the rows of the code tokens start: mean or content."""
    init_noise: float = Field(0.1, ge=0)
    """Deviation of a new row around its start, in deviations of the tokenizer's rows."""
    tasks: TaskWeights = TaskWeights()
    """What supervised training shows."""

    @property
    def on(self) -> bool:
        """Whether the recommender is a language model."""
        return self.items is not None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.items is ItemForm.TITLES:
            if self.history is ItemForm.CODES:
                raise ValueError("history: codes; legal: titles where items are titles, which has no codes")
            if self.tasks.align:
                raise ValueError("tasks: a task with codes; legal: next_item alone where items are titles")
        if not sum(self.tasks.model_dump().values()):
            raise ValueError("tasks: no task has a weight; legal: at least one above 0")
        return self
