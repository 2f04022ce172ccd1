"""A tiny random Qwen3 recommender on disk, as tests of several packages need it: model, tokenizer and catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.catalogue import Catalogue
from data.records import NO_ITEM, Prompt


def tiny_catalogue(items: int = 60, levels: tuple[int, ...] = (6, 5, 4), seed: int = 0) -> Catalogue:
    """Items with distinct random paths of equal length; all codes of the first level occur."""
    total = int(np.prod(levels))
    chosen = np.random.default_rng(seed).choice(total, size=items, replace=False)
    paths = np.stack(np.unravel_index(np.sort(chosen), levels), axis=1)
    return Catalogue.from_codes(paths.tolist())


def write_tiny_model(
    folder: Path,
    catalogue: Catalogue,
    seed: int = 0,
    dtype: str = "float32",
    *,
    hidden: int = 64,
    layers: int = 2,
    tie: bool = True,
    max_positions: int = 512,
    spread: float = 4.0,
) -> Path:
    """Write a random model that `AutoModelForCausalLM`, vLLM and `build_engine` load; returns the folder.

    Args:
        hidden: width of the model, a multiple of 32 (head size 32, half as many key-value heads as heads).
        tie: whether the head shares the embedding, as small Qwen3 models do.
        spread: factor on the weight matrices; larger makes the distributions sharper.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = hidden // 32
    vocabulary = catalogue.vocabulary
    config = Qwen3Config(
        vocab_size=vocabulary.size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=32,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
    )
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    torch.set_rng_state(rng_state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    vocabulary.save_tokenizer(Path(folder))
    catalogue.save(Path(folder) / "catalogue")
    return Path(folder)


def random_prompts(
    catalogue: Catalogue,
    lengths: list[int],
    seed: int = 0,
    *,
    excluded: int = 0,
    first_id: int = 0,
) -> list[Prompt]:
    """Prompts of the given numbers of tokens (random codes after <bos>), each with `excluded` random exclusions."""
    rng = np.random.default_rng(seed)
    special = int(catalogue.vocabulary.level_offsets[0])
    return [
        Prompt(
            prompt_id=first_id + index,
            token_ids=np.concatenate(
                [[catalogue.vocabulary.bos], rng.integers(special, catalogue.vocabulary.size, length - 1)]
            ).astype(np.int32),
            user_id=index,
            history=np.empty(0, np.int32),
            exclusions=np.sort(rng.choice(catalogue.n_items, excluded, replace=False)).astype(np.int32),
            target=NO_ITEM,
        )
        for index, length in enumerate(lengths)
    ]
