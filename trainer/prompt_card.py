"""How prompts of a model are written: a small file beside its weights, so that others ask as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationError

from data.catalogue import Catalogue
from data.errors import RequestError
from data.prompts import PromptBuilder
from data.settings import Settings
from data.settings_data import PromptSettings
from data.text_prompts import TextPromptBuilder
from data.text_settings import TextSettings
from data.text_tokenizer import TextTokenizer
from trainer.list_settings import ListSettings

FILE: Final = "prompt.json"
FORMAT: Final = 1


class PromptCard(Settings):
    """What a prompt shows."""

    format: int = FORMAT
    """Version of this file."""
    history: int = Field(ge=1)
    """Latest items of the history a prompt shows."""
    exclude_seen: bool
    """Whether items of the whole history were excluded from recommendation."""
    max_prompt_tokens: int = Field(ge=2)
    """Longest prompt."""
    lists: ListSettings = ListSettings()
    """What lists are ranked for; no needs where the model recommends single items."""
    text: TextSettings = TextSettings()
    """How a language model's prompts are written; no items where the model knows nothing but codes."""

    @classmethod
    def of(cls, settings: PromptSettings, lists: ListSettings | None = None, text: TextSettings | None = None) -> Self:
        """The card of a job's sections `data`, `lists` and `text`."""
        return cls(
            history=settings.history,
            exclude_seen=settings.exclude_seen,
            max_prompt_tokens=settings.max_prompt_tokens,
            lists=lists or ListSettings(),
            text=text or TextSettings(),
        )

    def write(self, hf_dir: Path) -> None:
        """Write the file into an `hf` folder."""
        (hf_dir / FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, hf_dir: Path) -> Self:
        """Read the file of an `hf` folder.

        Raises:
            RequestError: absent, damaged, or of another format version.
        """
        path = hf_dir / FILE
        legal = f"an hf folder of a windlass checkpoint, format {FORMAT}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(str(path), f"cannot be read ({error})", legal) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RequestError(str(path), "another format", legal)
        try:
            return cls(**content)
        except ValidationError as error:
            raise RequestError(str(path), f"is damaged ({error.errors()[0]['msg']})", legal) from error

    def builder(self, catalogue: Catalogue, hf_dir: Path) -> PromptBuilder:
        """Writes prompts as the model was trained on them.

        Args:
            catalogue: of the model.
            hf_dir: the model's folder, which has a language model's tokenizer.

        Raises:
            RequestError: a language model without its tokenizer.
        """
        shape = (catalogue, self.history, self.exclude_seen, self.max_prompt_tokens)
        if not self.text.on:
            return PromptBuilder(*shape)
        tokenizer = TextTokenizer.open(hf_dir, self.text.pad_token)
        return TextPromptBuilder(*shape, settings=self.text, tokenizer=tokenizer)
