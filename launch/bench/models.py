"""Models, catalogues and prompts of the benchmarks: random by seed, in the folder layout that every engine loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import IntArray, Prompt
from launch.bench.ceiling import Arithmetic
from launch.bench.settings import BenchSettings
from trainer.checkpoints import open_model
from trainer.initial_model import CATALOGUE, MAX_POSITIONS, preset_config, write_random_model


@dataclass(frozen=True, kw_only=True)
class _Preset:
    codes: int
    """Codes of all levels together."""
    items: int
    """About as many."""
    large: Mapping[str, int] | None = None
    """Shape of a Qwen2.5 with its own vocabulary, of which the codes take the first tokens; none is a preset of the
    trainer."""


_QWEN_VOCABULARY: Final = 151_936
PRESETS: Final = {
    "tiny": _Preset(codes=60, items=500),
    # With the four special tokens a vocabulary of 1,031.
    "small": _Preset(codes=1027, items=20_000),
    "0.5b": _Preset(
        codes=1027,
        items=20_000,
        large={
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "1.5b": _Preset(
        codes=1027,
        items=20_000,
        large={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model folder and what the benchmarks need to know about it."""

    hf_dir: Path
    catalogue: Catalogue
    config: Any
    """The transformers configuration."""
    arithmetic: Arithmetic

    @property
    def levels(self) -> int:
        """Tokens of the longest item."""
        return self.catalogue.trie().depth

    def record(self) -> dict[str, int]:
        """Size of model and catalogue, for the answer."""
        return {
            "parameters": self.arithmetic.parameters,
            "parameters_without_embedding": self.arithmetic.products,
            "layers": self.config.num_hidden_layers,
            "width": self.config.hidden_size,
            "vocabulary": self.config.vocab_size,
            "items": self.catalogue.n_items,
            "levels": self.levels,
        }


@contextmanager
def bench_model(settings: BenchSettings) -> Iterator[BenchModel]:
    """The model of `--model`, a preset in a temporary folder while the context is open.

    Raises:
        RequestError: neither a preset nor a model folder with a catalogue, a device that is not there, or a prompt or a
            width that does not fit the model.
    """
    settings.check_device()
    with tempfile.TemporaryDirectory(prefix="windlass-bench-") as temporary:
        if settings.model in PRESETS:
            folder = Path(temporary) / settings.model
            catalogue = random_catalogue(settings)
            write_random_model(
                _preset_config(settings.model, catalogue),
                catalogue,
                seed=settings.seed,
                dtype=getattr(torch, settings.dtype.value),
                target=folder,
            )
        else:
            folder = _folder(settings.model)
            catalogue = Catalogue.load(folder / CATALOGUE)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        model = BenchModel(hf_dir=folder, catalogue=catalogue, config=config, arithmetic=Arithmetic.of(config))
        check_fits(settings, model)
        yield model


def bench_catalogue(settings: BenchSettings) -> Catalogue:
    """The catalogue of `--model` alone.

    Raises:
        RequestError: neither a preset nor a model folder with a catalogue.
    """
    if settings.model in PRESETS:
        return random_catalogue(settings)
    return Catalogue.load(_folder(settings.model) / CATALOGUE)


def _folder(model: str) -> Path:
    if not Path(model).is_dir():
        raise RequestError("--model", model, f"{', '.join(PRESETS)}, or a model folder")
    return open_model(Path(model))


def _preset_config(name: str, catalogue: Catalogue) -> Any:
    large = PRESETS[name].large
    if large is None:
        return preset_config(name, catalogue)
    from transformers import Qwen2Config

    vocabulary = catalogue.vocabulary
    return Qwen2Config(
        vocab_size=_QWEN_VOCABULARY,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        **large,
    )


def random_catalogue(settings: BenchSettings) -> Catalogue:
    """Items of `--levels` random codes; every first code exists, and all later levels branch alike.

    A random set of paths would leave most prefixes with one continuation, and the later levels with nothing to choose.
    """
    preset = PRESETS[settings.model]
    levels, random = settings.levels, np.random.default_rng(settings.seed)
    sizes = [preset.codes // levels + (level < preset.codes % levels) for level in range(levels)]
    fanout = 1 if levels == 1 else max(2, round((preset.items / sizes[0]) ** (1 / (levels - 1))))
    path_NL = np.arange(sizes[0])[:, None]
    for size in sizes[1:]:
        child_NF = random.random((len(path_NL), size)).argsort(1)[:, :fanout]
        path_NL = np.column_stack([path_NL.repeat(child_NF.shape[1], 0), child_NF.ravel()])
    return Catalogue.from_codes(path_NL.tolist())


def check_fits(settings: BenchSettings, model: BenchModel) -> None:
    """Refuse what the model cannot do.

    Raises:
        RequestError: names the option.
    """
    if len(np.unique(np.diff(model.catalogue.path_start))) > 1:
        raise RequestError("--model", "items of different numbers of tokens", "a catalogue whose items have the same")
    longest = int(model.config.max_position_embeddings) - model.levels
    if settings.prompt_len > longest:
        raise RequestError("--prompt-len", settings.prompt_len, f"1 to {longest}, the model's length less an item")
    if settings.width > model.catalogue.n_items:
        raise RequestError("--width", settings.width, f"1 to {model.catalogue.n_items}, the items of the catalogue")


def bench_prompts(settings: BenchSettings, model: BenchModel, *, draw: int = 0) -> list[Prompt]:
    """Prompts of random codes; another `draw` gives others."""
    random = np.random.default_rng((settings.seed, draw))
    first = int(model.catalogue.vocabulary.level_offsets[0])
    none: IntArray = np.zeros(0, dtype=np.int32)
    return [
        Prompt(
            prompt_id=row,
            token_ids=random.integers(first, model.catalogue.vocabulary.size, settings.prompt_len).astype(np.int32),
            user_id=row,
            history=none,
            exclusions=none,
        )
        for row in range(settings.prompts)
    ]
