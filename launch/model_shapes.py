"""Shapes of language models that recipes name before their weights are on the machine, for `windlass doctor --plan`.

The numbers are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from data.errors import RequestError
from data.text_tokenizer import GGUF
from trainer.initial_model import SHAPES as PRESET_SHAPES
from trainer.language_model import is_pretrained, language_path

_QWEN: Final = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **_QWEN,
    },
    "Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **_QWEN,
    },
    "Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        **_QWEN,
    },
}
"""By the name of the folder that `init` ends with."""


def model_config(init: str, codes: int) -> Any:
    """The transformers configuration of what `init` names, with room for the tokens of codes.

    Args:
        init: a preset, a folder with config.json (an `hf` folder, a run), or a path that ends with a name of `SHAPES`.
        codes: tokens that are added.

    Raises:
        RequestError: neither.
    """
    from transformers import AutoConfig, Qwen3Config

    from trainer.checkpoints import open_model

    path = language_path(init)
    if init in PRESET_SHAPES:
        return Qwen3Config(vocab_size=4 + codes, tie_word_embeddings=True, **PRESET_SHAPES[init])
    if path.name in SHAPES and not (path / "config.json").is_file():
        shape = dict(SHAPES[path.name])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    elif path.suffix == GGUF:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    else:
        try:
            folder = path if (path / "config.json").is_file() else open_model(path)
        except RequestError as error:
            known = ", ".join(SHAPES)
            raise RequestError("init", init, f"a model on this machine, or a path that ends with {known}") from error
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if not is_pretrained(path):  # a checkpoint of a run has its codes
            return config
    config.vocab_size += codes
    return config
