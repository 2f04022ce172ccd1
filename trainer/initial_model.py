"""Where a policy's first weights come from: a preset with random weights, or a checkpoint that is checked first.

The result is always an `hf` folder: a model that `AutoModelForCausalLM.from_pretrained` loads, its tokenizer, and the
catalogue inside. Engines and learners start from the same folder, so both sides begin with the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import FloatArray
from data.text_settings import TextSettings
from trainer.checkpoints import open_model
from trainer.jobs import PRESETS
from trainer.language_model import Language, write_language_model

CATALOGUE: Final = "catalogue"
"""Folder of the catalogue inside an `hf` folder."""
MAX_POSITIONS: Final = 4096

SHAPES: Final[Mapping[str, Mapping[str, int | float]]] = {
    "mini": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.05,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 64,
    },
}
"""Shapes of the presets; `mini` is the model of the demo (0.13 M parameters at 324 tokens), `small` is the model of the
benchmarks (10.6 M parameters, and 0.4 M for the embedding of 1,031 tokens)."""


def prepare_initial_model(
    init: str,
    catalogue: Catalogue,
    *,
    seed: int,
    dtype: torch.dtype,
    target: Path,
    codebooks: Sequence[FloatArray] | None = None,
    language: tuple[Language, TextSettings] | None = None,
) -> Path:
    """The `hf` folder a job starts from: `target` for a preset or a pretrained language model (written there), the
    given folder otherwise.

    Args:
        init: a preset, or a model folder, checkpoint or run.
        catalogue: what the model is to recommend from.
        seed: of random weights.
        dtype: of the weights on disk.
        target: where a preset is written.
        codebooks: of the catalogue's codes (`data.code_vectors`): a preset's code embeddings start there.
        language: what `init` names where it is a language model.

    Raises:
        RequestError: neither a preset nor a model folder, or a model with another vocabulary or catalogue.
    """
    if init in PRESETS:
        write_preset(init, catalogue, seed=seed, dtype=dtype, target=target, codebooks=codebooks)
        return target
    if language is not None and not language[0].extended:
        write_language_model(*language, seed=seed, dtype=dtype, target=target)
        return target
    folder = open_model(Path(init))
    check_fits(folder, catalogue)
    return folder


def own_initial_model(
    init: str,
    catalogue: Catalogue,
    *,
    seed: int,
    dtype: torch.dtype,
    target: Path,
    resumed: bool,
    codebooks: Sequence[FloatArray] | None = None,
    language: tuple[Language, TextSettings] | None = None,
) -> Path:
    """The initial model of a run, kept in `target`, which is returned: a continued run finds its own there.

    What `init` names may change or go meanwhile: another checkpoint of a run becomes its best one, old ones are
    removed. Files are linked where the file system can, else copied. The other arguments are those of
    `prepare_initial_model`.

    Raises:
        RequestError: as `prepare_initial_model`.
    """
    if resumed and (target / "config.json").is_file():
        check_fits(target, catalogue)
        return target
    found = prepare_initial_model(
        init, catalogue, seed=seed, dtype=dtype, target=target, codebooks=codebooks, language=language
    )
    if found != target:
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(found, target, copy_function=_link_or_copy)
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def check_fits(folder: Path, catalogue: Catalogue) -> None:
    """Refuse a model whose vocabulary or catalogue is not the one of the data."""
    own = Catalogue.load(folder / CATALOGUE)
    if own.vocabulary.text is not None and catalogue.vocabulary.text is None:
        items = "codes" if own.vocabulary.levels else "titles"
        raise RequestError("text.items", "null", f"{items}: {folder} is a language model")
    check_model(folder, catalogue.vocabulary.size)
    if own.digest != catalogue.digest:
        raise RequestError(
            f"{folder}: catalogue",
            f"digest {own.digest[:12]}",
            f"{catalogue.digest[:12]}, the catalogue of the dataset",
        )


def check_model(folder: Path, vocabulary_size: int) -> None:
    """Refuse a folder whose configuration or weights cannot be read, or are of another vocabulary.

    Raises:
        RequestError: names the file.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            str(path), f"cannot be read ({error})", "the configuration of a Hugging Face model"
        ) from error
    if not isinstance(config, dict):
        raise RequestError(str(path), f"holds {type(config).__name__}", "the configuration of a Hugging Face model")
    if config.get("vocab_size") != vocabulary_size:
        raise RequestError(
            f"{folder}: vocab_size", config.get("vocab_size"), f"{vocabulary_size}, the tokens of the codes"
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        raise RequestError(str(folder), "no weights in it", "a model folder with *.safetensors")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise RequestError(str(file), f"is damaged ({error})", "whole weights; take another copy") from error


def write_preset(
    name: str,
    catalogue: Catalogue,
    *,
    seed: int,
    dtype: torch.dtype,
    target: Path,
    codebooks: Sequence[FloatArray] | None = None,
) -> None:
    """Write a Qwen3 of the named shape with random weights; the same seed gives the same file."""
    config = preset_config(name, catalogue)
    write_random_model(config, catalogue, seed=seed, dtype=dtype, target=target, codebooks=codebooks)


def write_random_model(
    config: Any,
    catalogue: Catalogue,
    *,
    seed: int,
    dtype: torch.dtype,
    target: Path,
    codebooks: Sequence[FloatArray] | None = None,
) -> None:
    """Write an `hf` folder with random weights of a transformers configuration; the same seed gives the same file."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        if codebooks is not None:
            start_at_codebooks(model.get_input_embeddings().weight, catalogue, codebooks, config.initializer_range)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    model.to(dtype).save_pretrained(target)
    catalogue.vocabulary.save_tokenizer(target)
    catalogue.save(target / CATALOGUE)


@torch.no_grad()
def start_at_codebooks(
    embedding_VH: Tensor, catalogue: Catalogue, codebooks: Sequence[FloatArray], spread: float
) -> None:
    """Set the embeddings of codes to a random projection of the quantiser's centres, each level scaled to `spread`.

    A random projection keeps distances nearly as they are, so codes begin as near to each other as their items are.
    """
    vocabulary = catalogue.vocabulary
    dims = codebooks[0].shape[1]
    projection_DH = torch.randn(dims, embedding_VH.shape[1]) / dims**0.5
    for level, codebook_CD in enumerate(codebooks):
        first = vocabulary.code_token(level, 0)
        start_CH = torch.from_numpy(codebook_CD).float() @ projection_DH
        embedding_VH[first : first + len(start_CH)] = start_CH * (spread / start_CH.std().clamp_min(1e-12))


def preset_config(name: str, catalogue: Catalogue) -> Any:
    """The transformers configuration of a preset for a catalogue's vocabulary."""
    from transformers import Qwen3Config

    vocabulary = catalogue.vocabulary
    return Qwen3Config(
        vocab_size=vocabulary.size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        **SHAPES[name],
    )
