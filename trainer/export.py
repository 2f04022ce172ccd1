"""Hugging Face export: a folder that `AutoModelForCausalLM.from_pretrained` and vLLM load.

Weights and configuration are written anew; everything else of the source folder (tokenizer, `catalogue/`) is copied.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

_REWRITTEN = ("config.json", "generation_config.json")
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".index.json")


def export_hf(
    folder: Path, lm: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], source: Path, dtype: torch.dtype
) -> None:
    """Write the model.

    Args:
        folder: destination; created when it is missing.
        lm: gives class and configuration; its own weights are not read (ZeRO-3 leaves them empty).
        tensors: (name, whole tensor), tied ones once.
        source: the folder the model was loaded from.
        dtype: of the written weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(source, folder)
    config = copy.deepcopy(lm.config)
    config.dtype = dtype
    shell = _shell(lm, config)
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous() for name, value in tensors
    }
    missing, unexpected = shell.load_state_dict(state, strict=False, assign=True)
    shell.tie_weights()
    left = [name for name, value in shell.state_dict().items() if value.is_meta]
    if left or unexpected:
        raise ValueError(f"weights that no tensor came for: {left}; unknown: {unexpected}; missing: {missing}")
    shell.generation_config = _generation_config(lm)
    shell.save_pretrained(folder)


def _shell(lm: PreTrainedModel, config: object) -> PreTrainedModel:
    with torch.device("meta"):
        shell: PreTrainedModel = type(lm)(config)
    return shell


def _generation_config(lm: PreTrainedModel) -> GenerationConfig:
    """What the ids say and nothing else: no length limit and no sampling left over from a base model."""
    config = lm.config.get_text_config()
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a model folder besides weights and configuration."""
    for entry in sorted(source.iterdir()):
        if entry.name in _REWRITTEN or entry.name.endswith(_WEIGHT_ENDINGS):
            continue
        target = folder / entry.name
        if entry.is_dir():
            shutil.copytree(entry, target, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, target)
