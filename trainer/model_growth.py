"""A model for a catalogue that has grown: the weights of the old one, and rows for the new codes.

Old rows of embedding and head stay bit for bit, so the logits of old tokens do not change. New rows begin at the mean
of their level with a little noise, so that new codes are neither likely nor alike.

Suffixes: `_VH` token of the vocabulary, hidden dimension.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.growth import same_tokens
from data.text_items import code_catalogue, title_catalogue
from data.text_settings import ItemForm
from data.text_tokenizer import TextTokenizer
from trainer.export import copy_companions
from trainer.initial_model import CATALOGUE
from trainer.prompt_card import PromptCard

NOISE: Final = 0.5
"""Deviation of a new row around the mean of its level, in deviations of the level."""


def has_grown(parent: Path, catalogue: Catalogue) -> bool:
    """Whether a model is of an earlier state of the catalogue.

    Raises:
        RequestError: the catalogues are not states of one.
    """
    own = Catalogue.load(parent / CATALOGUE)
    if own.digest == catalogue.digest:
        return False
    sizes, words = own.vocabulary.level_sizes, own.vocabulary.further_words
    grown = catalogue.vocabulary.level_sizes
    # Titles have no levels; the last one is compared as a slice, so that they follow each other.
    follows = len(sizes) == len(grown) and sizes[:-1] == grown[:-1] and sizes[-1:] <= grown[-1:]
    if not (same_tokens(own, catalogue) and follows and words == catalogue.vocabulary.further_words):
        raise RequestError(
            f"{parent}: catalogue",
            f"digest {own.digest[:12]}, level sizes {list(sizes)}",
            f"an earlier state of {catalogue.digest[:12]}, {list(grown)} (`windlass data extend`)",
        )
    if words and sizes != grown:
        raise RequestError(f"{parent}: vocabulary", "words of lists behind the codes", "new items on free old codes")
    return True


def later_catalogue(parent: Path, dataset: Dataset, codes: str) -> Catalogue:
    """The catalogue of a dataset in the tokens of a model that was trained on an earlier state of it.

    Raises:
        RequestError: items that cannot be written.
    """
    text = Catalogue.load(parent / CATALOGUE).vocabulary.text
    if text is None:
        return Catalogue.build(dataset, codes)
    settings = PromptCard.read(parent).text
    if settings.items is ItemForm.TITLES:
        tokenizer = TextTokenizer.open(parent, settings.pad_token)
        return title_catalogue(dataset, tokenizer, text, settings.title_tokens)
    return code_catalogue(Catalogue.build(dataset, codes), text)


@torch.no_grad()
def grow_model(parent: Path, catalogue: Catalogue, target: Path, *, seed: int) -> Path:
    """Write the `hf` folder of a model for a later state of its catalogue; a folder that is there is made anew.

    Args:
        parent: `hf` folder of the model.
        catalogue: the later state.
        target: the new folder.
        seed: of the noise.

    Raises:
        RequestError: as `has_grown`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    has_grown(parent, catalogue)
    disable_progress_bar()
    before, after = Catalogue.load(parent / CATALOGUE).vocabulary, catalogue.vocabulary
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(parent, partial)
    shutil.rmtree(partial / CATALOGUE, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype="auto")
    if after.tokens != before.tokens:
        level = slice(before.code_token(before.levels - 1, 0), before.tokens)
        matrices = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
        tied = matrices["input"] is matrices["output"]
        old = {name: weight_VH[: before.tokens].clone() for name, weight_VH in matrices.items()}
        if after.size != before.size:
            model.resize_token_embeddings(after.size, mean_resizing=False)
        generator = torch.Generator().manual_seed(seed)
        resized = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
        for name in ("input",) if tied else ("input", "output"):
            rows_VH = old[name]
            resized[name][: before.tokens] = rows_VH
            new_VH = _new_rows(rows_VH[level], after.tokens - before.tokens, generator)
            resized[name][before.tokens : after.tokens] = new_VH
    model.save_pretrained(partial)
    if after.text is None:
        after.save_tokenizer(partial)
    else:
        tokenizer = TextTokenizer.open(parent)
        tokenizer.extend(after)
        tokenizer.save(partial)
    catalogue.save(partial / CATALOGUE)
    partial.rename(target)
    return target


def _new_rows(level_VH: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Rows around the mean of a level's rows."""
    wide_VH = level_VH.float()
    spread_H = wide_VH.std(0, unbiased=False) if len(wide_VH) > 1 else wide_VH.std().expand(wide_VH.shape[1])
    noise_VH = torch.randn(rows, wide_VH.shape[1], generator=generator)
    return (wide_VH.mean(0) + NOISE * spread_H * noise_VH).to(level_VH.dtype)


def catalogue_digest(folder: Path) -> str:
    """The digest in the catalogue of an `hf` folder, unverified."""
    card = json.loads((folder / CATALOGUE / "catalogue.json").read_text(encoding="utf-8"))
    return str(card["digest"])
