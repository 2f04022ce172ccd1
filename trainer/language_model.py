"""The first weights of a recommender that is a pretrained language model: loaded, extended by code tokens, written.

Rows of embedding and head for new tokens start at the mean of the tokenizer's rows, or at the mean of the titles of
the items that have the code; rows that only pad the matrices start at the mean, which makes them as unlikely as an
average token. The tokenizer's own rows stay bit for bit.

Suffixes: `_VH` token of the vocabulary, hidden dimension; `_NH` new token.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.parquet import first_line
from data.text_items import code_catalogue, title_catalogue
from data.text_settings import CodeInit, ItemForm, TextSettings
from data.text_tokenizer import GGUF, PACKAGED, TextTokenizer, gguf_arguments, model_rows, packaged_language_model
from trainer.checkpoints import open_model

_CATALOGUE = "catalogue"


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language model before its weights are read: where it lies, its tokenizer, and the items in its tokens."""

    source: Path
    """A folder, or a GGUF file."""
    extended: bool
    """Whether it is a checkpoint of a run, which has the code tokens already."""
    tokenizer: TextTokenizer
    catalogue: Catalogue

    @classmethod
    def open(
        cls, init: str, settings: TextSettings, dataset: Dataset, codes: str, words: Sequence[str] = ()
    ) -> Language:
        """What `init` names, and the items of a dataset in its tokens; `words` join the vocabulary behind the codes.

        Raises:
            RequestError: no language model there, a tokenizer that cannot be used, or items that cannot be written.
        """
        path = language_path(init)
        extended = not is_pretrained(path)
        source = open_model(path) if extended else path
        tokenizer = TextTokenizer.open(source, settings.pad_token)
        if extended:
            own = Catalogue.load(source / _CATALOGUE).vocabulary
            if own.text is None:
                raise RequestError("init", f"{init} is no language model", "text.items: null, or another init")
            text, words = own.text, (*own.further_words, *words)
        else:
            text = tokenizer.base(model_rows(source))
        if settings.items is ItemForm.TITLES:
            catalogue = title_catalogue(dataset, tokenizer, text, settings.title_tokens)
        else:
            catalogue = code_catalogue(Catalogue.build(dataset, codes), text)
        catalogue = catalogue.with_words(words)
        tokenizer.extend(catalogue.vocabulary)
        return cls(source=source, extended=extended, tokenizer=tokenizer, catalogue=catalogue)


def language_path(init: str) -> Path:
    """What `init` names: a path, or the file of a packaged model.

    Raises:
        RequestError: the package is not installed.
    """
    return packaged_language_model(init) if init in PACKAGED else Path(init)


def is_pretrained(path: Path) -> bool:
    """Whether a path is a language model as it comes, not a checkpoint of a run."""
    if path.suffix == GGUF:
        if not path.is_file():
            raise RequestError("init", f"no file {path}", "a GGUF file, a model folder, or a run")
        return True
    return (path / "config.json").is_file() and not (path / _CATALOGUE).is_dir()


def write_language_model(
    language: Language, settings: TextSettings, *, seed: int, dtype: torch.dtype, target: Path
) -> None:
    """Write the `hf` folder of a pretrained model with the tokens of a catalogue; the same seed gives the same file.

    Raises:
        RequestError: the weights cannot be read.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = load_weights(language.source)
    vocabulary = language.catalogue.vocabulary
    assert vocabulary.text is not None
    if vocabulary.size != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for matrix_VH in {id(m): m for m in matrices(model)}.values():
        start_new_rows(matrix_VH, language, settings, generator)
    config = model.config.get_text_config()
    config.pad_token_id, config.bos_token_id, config.eos_token_id = vocabulary.pad, vocabulary.bos, vocabulary.eos
    model.generation_config = _ids_only(config)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    model.to(dtype).save_pretrained(target)
    language.tokenizer.save(target)
    language.catalogue.save(target / _CATALOGUE)


def load_weights(source: Path) -> Any:
    """The model of a folder or of a GGUF file, in float32.

    Raises:
        RequestError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    folder, extra = gguf_arguments(source)
    options: dict[str, Any] = dict(extra)
    if extra:
        from transformers import GgufConfig

        # Without it the model counts as quantised: it could neither be saved nor, with some packages, be trained.
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        legal = "a causal language model that transformers loads"
        raise RequestError("init", f"{source} ({first_line(error)})", legal) from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model


def matrices(model: Any) -> list[Tensor]:
    """Embedding and head; the same one twice where they are tied."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@torch.no_grad()
def start_new_rows(matrix_VH: Tensor, language: Language, settings: TextSettings, generator: torch.Generator) -> None:
    """Set the rows behind the tokenizer's own: of code tokens as `settings.code_init` says, of padding to the mean."""
    vocabulary = language.catalogue.vocabulary
    assert vocabulary.text is not None
    own_VH = matrix_VH[: vocabulary.text.tokens]
    mean_H = own_VH.mean(0)
    spread = float((own_VH - mean_H).std())
    start_NH = mean_H.repeat(vocabulary.tokens - vocabulary.first_code, 1)
    if settings.code_init is CodeInit.CONTENT and len(start_NH):
        for token, row_H in content_rows(own_VH, language).items():
            start_NH[token - vocabulary.first_code] = row_H
    noise_NH = torch.randn(start_NH.shape, generator=generator) * (settings.init_noise * spread)
    matrix_VH[vocabulary.first_code : vocabulary.tokens] = start_NH + noise_NH
    matrix_VH[vocabulary.tokens :] = mean_H


def content_rows(own_VH: Tensor, language: Language) -> dict[int, Tensor]:
    """By code token: the mean, over the items that have the code, of the mean row of the tokens of the item's title."""
    catalogue = language.catalogue
    rows: dict[int, list[Tensor]] = defaultdict(list)
    for item, ids in enumerate(language.tokenizer.encode_all(catalogue.titles)):
        if not ids:
            continue
        title_H = own_VH[torch.tensor(ids)].mean(0)
        for token in catalogue.tokens(item).tolist():
            if token >= catalogue.vocabulary.first_code:
                rows[token].append(title_H)
    return {token: torch.stack(found).mean(0) for token, found in rows.items()}


def _ids_only(config: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
