"""Tiny random language models of the supported families, each with a byte-pair tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("qwen2", "qwen3", "llama", "gemma", "gemma3", "smollm")
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = [
    "A customer chose the items below, oldest first. Answer with the item that the customer chooses next.",
    "What are the codes of this item? What is the title of this item? item-00 item-11 item-22 item-33 item-44",
]


def write_tokenizer(folder: Path, *, pad: bool = True, chat: bool = True, end: bool = True) -> int:
    """Write a tokenizer whose tokens are bytes and a few merges; returns how many it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    names: dict[str, Any] = {"bos_token": "<|start|>"}
    names |= {"eos_token": "<|end|>"} if end else {}
    names |= {"pad_token": "<|pad|>"} if pad else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if chat:
        wrapped.chat_template = CHAT
    wrapped.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return len(wrapped)


def write_language(
    folder: Path,
    family: str = "smollm",
    *,
    seed: int = 0,
    rows: int | None = None,
    spread: float = 3.0,
    **tokenizer: bool,
) -> Path:
    """Write a random language model of a family; returns the folder.

    Args:
        rows: of its embedding; by default as many as the tokenizer has tokens.
        spread: factor on the matrices; larger makes the distributions sharper.
        tokenizer: arguments of `write_tokenizer`.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder, **tokenizer)
    shape: dict[str, Any] = {
        # Qwen2 has more rows than tokens, and transformers gives its tokenizer one token more than the file has.
        "vocab_size": rows or (tokens if family != "qwen2" else 352),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config: Any
    match family:
        case "qwen2":
            del shape["head_dim"]
            config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
        case "qwen3":
            config = transformers.Qwen3Config(**shape, tie_word_embeddings=False)
        case "llama":
            config = transformers.LlamaConfig(**shape, tie_word_embeddings=False)
        case "gemma":
            config = transformers.GemmaConfig(**shape)
        case "gemma3":
            layers = ["sliding_attention", "full_attention"]
            config = transformers.Gemma3TextConfig(
                **shape, layer_types=layers, sliding_window=16, query_pre_attn_scalar=32
            )
        case _:
            config = transformers.LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=100_000.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    model.save_pretrained(folder)
    return folder
